"""The three classic journeys: shipped recipes, run as a user runs them, keep what they promise."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from sdprep.cli import app
from sdprep.prompts import PromptPolicy, render_prompt

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "prep"
Row = dict[str, Any]
SharedData = Callable[[str], Path]


class Journey:
    """One run of a recipe, and what was published."""

    def __init__(self, home: Path, recipe: str, source: Path, **settings: str) -> None:
        settings |= {
            "source.folder.path": str(source),
            "table": str(home / "photos.lance"),
            "publish.to": str(home / "prepared"),
        }
        given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        done = CliRunner().invoke(app, ["run", str(RECIPES / f"{recipe}.toml"), "--json", *given])
        assert done.exit_code == 0, (done.output, done.exception)
        stages = json.loads(done.stdout)["stages"]
        self.stages: dict[str, Row] = {stage["stage"]: stage for stage in stages}
        self.splits = {split: self._rows(home, split) for split in ("train", "validation")}
        manifest = json.loads((home / "prepared" / "sdprep.json").read_text("utf-8"))
        self.policy = PromptPolicy.model_validate_json(json.dumps(manifest["policy"]))
        self.left_out = manifest["left_out"]

    @staticmethod
    def _rows(home: Path, split: str) -> list[Row]:
        shards = sorted((home / "prepared" / "data").glob(f"{split}-*.parquet"))
        return [row for shard in shards for row in pq.read_table(shard).to_pylist()]

    @property
    def rows(self) -> list[Row]:
        return self.splits["train"] + self.splits["validation"]

    def prompts(self, visits: int) -> list[tuple[Row, Any]]:
        """Every image, as often as `visits` says."""
        numbers = range(visits)
        return [(row, render_prompt(row, self.policy, 0, n)) for row in self.rows for n in numbers]


def share(parts: list[bool]) -> float:
    return sum(parts) / len(parts)


def tag_names(row: Row) -> list[str]:
    return [tag["name"] for tag in row["tags"]]


# --- twenty photos of one thing -------------------------------------------------------------------


@pytest.fixture(scope="module")
def dreambooth(shared_data: SharedData, tmp_path_factory: pytest.TempPathFactory) -> Journey:
    """Twenty photos in kohya's folder, and a smaller re-encoding of one of them."""
    from PIL import Image

    home = tmp_path_factory.mktemp("dreambooth")
    folder = home / "subject" / "10_sks dog"
    folder.mkdir(parents=True)
    for subject in ("dog", "dog3", "dog6", "duck_toy"):
        for path in (shared_data("dreambooth") / subject).iterdir():
            shutil.copy(path, folder / f"{subject}-{path.name}")
    with Image.open(folder / "dog-00.jpg") as image:
        image.resize((400, 400)).save(folder / "small copy.jpg", quality=70)
    return Journey(home, "dreambooth", home / "subject", **{"policy.triggers": '["sks dog"]'})


def test_dreambooth_holds_out_three_of_twenty_and_drops_the_copy(dreambooth: Journey) -> None:
    assert dreambooth.stages["ingest"]["added"] == 21
    assert dreambooth.stages["dedup"]["rejected"] == 1
    sizes = {split: len(rows) for split, rows in dreambooth.splits.items()}
    assert sizes == {"train": 17, "validation": 3}
    assert {row["width"] for row in dreambooth.rows} >= {896}
    assert 400 not in {row["width"] for row in dreambooth.rows}


def test_dreambooth_repeats_come_from_the_folder(dreambooth: Journey) -> None:
    assert {row["repeats"] for row in dreambooth.rows} == {10}


def test_dreambooth_prompts_start_with_the_trigger_and_have_no_score_tags(
    dreambooth: Journey,
) -> None:
    prompts = dreambooth.prompts(40)
    texts = [(row, prompt) for row, prompt in prompts if not prompt.dropped]
    assert abs(share([prompt.dropped for _, prompt in prompts]) - 0.05) < 0.035
    for row, prompt in texts:
        assert prompt.text.startswith("sks dog")
        assert "score_" not in prompt.text
        if prompt.mode == "caption":
            assert row["caption"] in prompt.text
    assert abs(share([prompt.mode == "caption" for _, prompt in texts]) - 0.5) < 0.08
    assert all(row["validation_prompt"].startswith("sks dog, ") for row in dreambooth.rows)


# --- booru tags with scores -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def booru(shared_data: SharedData, tmp_path_factory: pytest.TempPathFactory) -> Journey:
    """Fifteen pictures: two watermarked, two that name a tag by another name."""
    home = tmp_path_factory.mktemp("booru")
    folder = home / "booru"
    folder.mkdir()
    for path in (shared_data("layouts") / "kohya" / "img").rglob("*.*"):
        shutil.copy(path, folder / path.name)
    extra = {"dog_00": "watermark", "dog_01": "watermark", "dog_02": "hires", "dog_03": "longhair"}
    for stem, tag in extra.items():
        file = folder / f"{stem}.txt"
        file.write_text(f"{file.read_text('utf-8')}, {tag}, tagme", "utf-8")
    aliases = home / "danbooru.csv"  # its common part, which reads in a tenth of the time
    lines = (shared_data("tags") / "danbooru.csv").read_text("utf-8").splitlines(keepends=True)
    aliases.write_text("".join(lines[:16_000]), "utf-8")
    names = home / "implications.csv"
    names.write_text("antecedent_name,consequent_name,status\ncorgi,canine,active\n", "utf-8")
    return Journey(
        home,
        "booru",
        folder,
        **{
            "tags.aliases": str(aliases),
            "tags.implications": str(names),
            "policy.length.mean": "4.0",  # so that sixteen tags are many
            "policy.length.sd": "2.0",
            "policy.length.min": "2",
        },
    )


def test_booru_tags_are_canonical_with_what_they_entail(booru: Journey) -> None:
    names = [name for row in booru.rows for name in tag_names(row)]
    assert len(booru.rows) == 15
    assert not [name for name in names if re.search(r"[A-Z ]", name)]
    assert {"long_hair", "highres", "canine"} <= set(names)
    assert not {"hires", "longhair", "tagme"} & set(names)
    corgis = [row for row in booru.rows if "welsh_corgi" in tag_names(row)]  # as Danbooru has it
    assert len(corgis) == 5
    assert all("canine" in tag_names(row) for row in corgis)
    assert booru.stages["tags"]["implied"] == 5
    assert booru.stages["tags"]["blacklisted"] == 4


def test_booru_prompts_show_scores_first_and_never_lose_the_watermark(booru: Journey) -> None:
    prompts = booru.prompts(60)
    texts = [(row, prompt) for row, prompt in prompts if not prompt.dropped]
    assert abs(share([prompt.dropped for _, prompt in prompts]) - 0.1) < 0.04
    assert {row["score"] for row, _ in texts} <= set(range(1, 10))
    watermarked = 0
    for row, prompt in texts:
        rank = row["score"]
        allowed = {f"score_{each}_up" for each in range(1, rank + 1)} | {f"score_{rank}"}
        assert 1 <= len(prompt.score_tags) <= 3
        assert set(prompt.score_tags) <= allowed
        assert prompt.text.startswith(prompt.score_tags[0])
        assert prompt.chunks <= 3
        if "watermark" in tag_names(row):
            assert "watermark" in prompt.tags
            watermarked += 1
    assert watermarked > 60
    assert any(len(prompt.tags) < len(tag_names(row)) for row, prompt in texts)


def test_booru_prompts_sometimes_use_another_name(booru: Journey) -> None:
    assert "longhair" in booru.policy.aliases["long_hair"]
    row = next(row for row in booru.rows if "long_hair" in tag_names(row))
    others = {name.replace("_", " ") for name in booru.policy.aliases["long_hair"]}
    shown, renamed = 0, 0
    for visit in range(400):
        prompt = render_prompt(row, booru.policy, 0, visit)
        if "long_hair" in prompt.tags:
            words = prompt.text.replace("_", " ")
            shown += 1
            renamed += "long hair" not in words
            assert "long hair" in words or any(other in words for other in others)
    assert shown > 50
    assert abs(renamed / shown - 0.2) < 0.15
    assert not re.search("longhair|/lh", row["validation_prompt"])


# --- captions and tags ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioned(shared_data: SharedData, tmp_path_factory: pytest.TempPathFactory) -> Journey:
    """Photos of three things; one has no caption, one no tags, one is blurred, one is tiny."""
    from PIL import Image, ImageFilter

    home = tmp_path_factory.mktemp("captioned")
    folder = home / "photos"
    for subject in ("cat", "teapot", "vase"):
        shutil.copytree(shared_data("dreambooth") / subject, folder / subject)
    (folder / "cat" / "00.caption").unlink()
    (folder / "cat" / "01.txt").unlink()
    with Image.open(folder / "vase" / "00.jpg") as image:
        image.filter(ImageFilter.GaussianBlur(16)).save(folder / "vase" / "00.jpg", quality=30)
    with Image.open(folder / "vase" / "01.jpg") as image:
        image.resize((300, 300)).save(folder / "vase" / "01.jpg")
    return Journey(home, "captioned", folder)


def test_captioned_rejects_blurred_and_tiny_photos(captioned: Journey) -> None:
    assert captioned.stages["ingest"]["added"] == 16
    assert captioned.stages["select"]["rejected"] == 2
    assert len(captioned.rows) == 14
    assert len(captioned.splits["validation"]) == 2


def test_captioned_prompts_are_now_tags_now_the_caption(captioned: Journey) -> None:
    both = [row for row in captioned.rows if row["caption"] and row["tags"]]
    assert len(both) == 12
    texts = [(r, p) for r, p in captioned.prompts(40) if not p.dropped]
    modes = [prompt.mode for row, prompt in texts if row in both]
    assert abs(share([mode == "tags" for mode in modes]) - 0.3) < 0.08
    for row, prompt in texts:
        assert "score_" not in prompt.text
        if not row["caption"]:
            assert prompt.mode == "tags"
        elif prompt.mode == "caption":
            assert prompt.text == row["caption"]


def test_captioned_can_put_both_in_one_text(captioned: Journey) -> None:
    concat = PromptPolicy.model_validate_json(
        json.dumps({**captioned.policy.model_dump(mode="json"), "mode": "concat"})
    )
    row = next(row for row in captioned.rows if row["caption"] and row["tags"])
    texts = [render_prompt(row, concat, 0, visit) for visit in range(20)]
    texts = [prompt for prompt in texts if not prompt.dropped]
    assert len(texts) > 10
    for prompt in texts:
        assert prompt.text.endswith(row["caption"])
        assert len(prompt.tags) > 0
