"""A recipe from photos to a data set: resumed after any kill, repeated without effect."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sdprep.history import history
from sdprep.pipeline import STAGES
from sdprep.table import PhotoTable

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "tools" / "demo_photos" / "photos"


def recipe(folder: Path, photos: Path = PHOTOS) -> list[str]:
    settings = {
        "table": folder / "photos.lance",
        "source.folder.path": photos,
        "tags.aliases": ROOT / "recipes" / "tiny" / "aliases.csv",
        "publish.to": folder / "prepared",
    }
    arguments = [str(ROOT / "recipes" / "tiny" / "prep.toml")]
    for key, value in settings.items():
        arguments += ["--set", f"{key}={value}"]
    return arguments


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sdprep.cli", *arguments]


def run(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(command(*arguments, "--json"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def content(path: Path) -> list[dict[str, Any]]:
    """Every value of every column, in order of arrival."""
    table = PhotoTable.open(path)
    return table.read(sorted(table.columns())).to_pylist()


def published(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix == ".parquet"
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed run")
    report = run("run", *recipe(folder))
    stages = [stage["stage"] for stage in report["stages"]]
    assert stages == ["ingest", "annotate", "tags", "select", "dedup", "split", "publish"]
    return folder


def test_a_run_does_what_its_recipe_says(undisturbed: Path) -> None:
    table = PhotoTable.open(undisturbed / "photos.lance")
    assert table.count() > 60
    assert table.count("reject_ingest IS NOT NULL") == 1
    assert table.count("reject_duplicates IS NOT NULL") >= 3
    assert table.count("split = 'validation'") == 8
    assert table.count("score_technical IS NULL AND reject_ingest IS NULL") == 0


def test_the_same_command_again_changes_nothing(undisturbed: Path) -> None:
    table = PhotoTable.open(undisturbed / "photos.lance")
    stages, version = len(history(table)), table.version
    before = published(undisturbed / "prepared")
    report = run("run", *recipe(undisturbed))
    table.refresh()
    assert len(history(table)) == stages
    assert table.version == version
    assert published(undisturbed / "prepared") == before
    annotators = next(s for s in report["stages"] if s["stage"] == "annotate")["annotators"]
    assert [a["done"] for a in annotators] == [0, 0, 0]


@pytest.mark.slow
def test_kill_at_random_moments_then_again_ends_in_the_same_content(
    undisturbed: Path, tmp_path: Path
) -> None:
    expected, files = content(undisturbed / "photos.lance"), published(undisturbed / "prepared")
    rng = random.Random(20)
    kills = 0
    for attempt in range(4):
        folder = tmp_path / f"killed {attempt}"
        for _ in range(2):
            stage = rng.choice(STAGES)
            most = 0.1 if stage in STAGES[-2:] else 0.4  # the last ones are soon over
            kills += killed_in(stage, rng.uniform(0.0, most), *recipe(folder))
        run("run", *recipe(folder))
        assert content(folder / "photos.lance") == expected
        assert published(folder / "prepared") == files
    assert kills >= 6, "the kills came too late to test anything"


def killed_in(stage: str, seconds: float, *arguments: str) -> bool:
    """Run a recipe and kill it some time after a stage began; whether that was in time."""
    process = subprocess.Popen(
        command("run", *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.strip() == stage:
            time.sleep(seconds)
            break
    is_running = process.poll() is None
    process.kill()
    process.stderr.close()
    process.wait()
    return is_running


def test_added_photos_move_none_between_splits(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    everything = sorted(p for p in PHOTOS.rglob("*.jpg") if "found_again" not in p.parts)
    for file in everything[::2]:
        target = photos / file.relative_to(PHOTOS)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    run("run", *recipe(tmp_path, photos))
    rows = PhotoTable.open(tmp_path / "photos.lance").kept(["id", "split"]).to_pylist()
    first = {row["id"]: row["split"] for row in rows}
    shutil.copytree(PHOTOS, photos, dirs_exist_ok=True)
    run("run", *recipe(tmp_path, photos), "--set", "split.validation_count=12")
    table = PhotoTable.open(tmp_path / "photos.lance")
    now = {row["id"]: row["split"] for row in table.kept(["id", "split"]).to_pylist()}
    assert len(now) > len(first)
    moved = {id_ for id_, side in first.items() if id_ in now and now[id_] != side}
    assert moved == set()


def test_dry_run_says_what_would_happen_and_writes_nothing(tmp_path: Path) -> None:
    report = run("run", *recipe(tmp_path), "--dry-run")
    assert report["dry_run"] is True
    assert [stage["stage"] for stage in report["stages"]][0] == "ingest"
    assert list(tmp_path.iterdir()) == []


def test_from_stage_leaves_earlier_stages_out(undisturbed: Path) -> None:
    report = run("run", *recipe(undisturbed), "--from", "split")
    assert [stage["stage"] for stage in report["stages"]] == ["split", "publish"]
    done = subprocess.run(
        command("run", *recipe(undisturbed), "--from", "splitt"), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Did you mean split?" in done.stderr


def test_every_section_takes_the_recipes_seed_unless_it_has_its_own(tmp_path: Path) -> None:
    from sdprep.pipeline import _seeded
    from sdprep.plugins import config_for
    from sdprep.split import SplitConfig

    captioner = config_for("captioner", "blip")
    assert _seeded(captioner(), 7).seed == 7
    assert _seeded(captioner(seed=0), 7).seed == 0
    assert _seeded(SplitConfig(), 7).seed == 7
    assert _seeded(SplitConfig(seed=3), 7).seed == 3
