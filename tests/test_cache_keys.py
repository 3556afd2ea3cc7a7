"""What must be encoded again, and what must not."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdprep.buckets import Bucket
from sdtrain.cache.fill import fill, wanted_slots, wanted_texts
from sdtrain.cache.keys import text_key
from sdtrain.dataset import open_data
from sdtrain.pixels import CropRule
from sdtrain.recipe import DataSection, load_train_recipe
from sdtrain.setup import Setup, open_setup
from tests.train_data import prepared_row, small_jpeg, write_prepared

torch.set_num_threads(1)

Recipe = Callable[..., Path]
CACHED = (
    *("cache.latents=true", "cache.text=true", "data.cached_crops=2", "data.flip_prob=0.5"),
    *("prompt.score.position=none", "train.samples=6"),
)


def setup_of(path: Path, *overrides: str) -> Setup:
    return open_setup(load_train_recipe(path, (*CACHED, *overrides)))


def with_recipe(setup: Setup, path: Path, *overrides: str) -> Setup:
    """The same data and model under another recipe."""
    return replace(setup, recipe=load_train_recipe(path, (*CACHED, *overrides)))


def pictures(setup: Setup) -> dict[str, bytes]:
    """Key of the first crop of each image."""
    rows = range(len(setup.train.kept))
    return {slot.sample_id: key for slot, key in reversed(list(wanted_slots(setup, rows)))}


def texts(setup: Setup) -> set[bytes]:
    kept = setup.caches.text
    assert kept is not None
    rows = range(len(setup.train.kept))
    return {text_key(kept.kind, text) for text in wanted_texts(setup, rows)}


def test_what_must_hit_hits_and_what_must_miss_misses(train_recipe: Recipe) -> None:
    path = train_recipe()
    setup = setup_of(path)
    latents, prompts = pictures(setup), texts(setup)
    assert len(latents) == len(set(latents.values())) == 14
    for same in (
        ("train.rules=[{ match = 'unet.**', lr = 1e-5 }]",),
        ("data.batch_size=8", "data.micro_batch_size=1", "data.workers=2"),
        ("output=elsewhere/run", "cache.path=elsewhere"),
        ("train.timesteps=iid", "validation.images=3", "loss.type=huber"),
    ):
        other = with_recipe(setup, path, *same)
        assert pictures(other) == latents, same
        assert texts(other) == prompts, same
    for change, moves_pictures, moves_texts in (
        (("cache.dtype=bf16",), True, True),
        (("cache.posterior=sample",), True, False),
        (("cache.vae_batch=2",), True, False),
        (("seed=8",), None, False),  # other crops, where there is room for others
        (("data.crop=centre",), None, False),
    ):
        other = with_recipe(setup, path, *change)
        assert (texts(other).isdisjoint(prompts)) is moves_texts, change
        moved = [id_ for id_, key in pictures(other).items() if key != latents[id_]]
        assert 0 < len(moved) < 14 if moves_pictures is None else len(moved) == 14, change


def test_another_resolution_encoder_vae_or_tokenizer_misses(
    train_recipe: Recipe, tmp_path: Path
) -> None:
    path = train_recipe()
    setup = setup_of(path)
    latents, prompts = pictures(setup), texts(setup)
    smaller = setup_of(path, "data.resolution_px=48")
    assert not set(pictures(smaller).values()) & set(latents.values())
    assert texts(smaller) == prompts
    family: Any = setup.family
    again = with_recipe(setup, path)
    with torch.no_grad():
        next(family.parts["vae"].parameters()).view(-1)[0].add_(1e-4)
    assert not set(pictures(again).values()) & set(latents.values())
    assert texts(again) == prompts
    with torch.no_grad():
        next(family.parts["text_encoder"].parameters()).view(-1)[0].add_(1e-4)
    assert texts(with_recipe(setup, path)).isdisjoint(prompts)
    now = texts(with_recipe(setup, path))
    family.folder.tokenizers["tokenizer"].pad_token = "!"
    assert texts(with_recipe(setup, path)).isdisjoint(now)


@pytest.mark.parametrize(
    "option", ["clip_skip=2", "chunk_convention=n75+2", "max_chunks=2", "split=comma"]
)
def test_how_prompts_are_cut_and_read_is_in_the_key(
    tiny_model: Callable[[str], Path], option: str
) -> None:
    from tests.tiny import load_tiny

    name, _, value = option.partition("=")
    folder = tiny_model("sd15")
    other = load_tiny(folder, **{name: int(value) if value.isdigit() else value})
    assert load_tiny(folder).text_fingerprint() != other.text_fingerprint()
    assert load_tiny(folder, gradient_checkpointing=True).text_fingerprint() == (
        load_tiny(folder).text_fingerprint()
    )


@pytest.mark.parametrize(
    "option",
    [
        {"density": "shift"},
        {"shift": 2.0},
        {"logit_mean": 0.5},
        {"logit_std": 0.5},
        {"density": "mode", "mode_scale": 0.5},
        {"uncond_zero_prob": 0.5},
        {"uncond_zero_sizes": True},
        {"uncond": "zero"},
    ],
)
def test_how_noise_is_drawn_is_not_in_the_key_of_text(
    tiny_model: Callable[[str], Path], option: dict[str, Any]
) -> None:
    from tests.tiny import load_tiny

    folder = tiny_model("sdxl_flow")
    is_same = load_tiny(folder).text_fingerprint() == load_tiny(folder, **option).text_fingerprint()
    assert is_same is ("uncond" not in option)  # that one decides what is stored of ""


def test_an_edited_pixel_or_caption_re_encodes_just_that(
    train_recipe: Recipe, tmp_path: Path
) -> None:
    rows = [prepared_row(number) for number in range(6)]
    path = train_recipe(data=write_prepared(tmp_path / "first", rows))
    assert fill(setup_of(path))["latents"]["encoded"] == 6
    # The same name and id, another file; and a caption that says something else.
    rows[2] = prepared_row(2, data=small_jpeg(90, (112, 80)), size=(112, 80), id=rows[2]["id"])
    changed = write_prepared(tmp_path / "second", rows)
    done = fill(setup_of(path, f"data.path={changed}"))
    assert done["latents"]["missing"] == 1
    assert done["text"]["missing"] == 0
    rows[3]["caption"] = "a dog that was looked at again"
    rows[3]["captions"] = [{"text": rows[3]["caption"], "source": "human"}]
    other = write_prepared(tmp_path / "third", rows)
    done = fill(setup_of(path, f"data.path={other}"))
    assert done["latents"]["missing"] == 0
    assert done["text"]["missing"] == 1


def test_a_renamed_file_and_a_moved_folder_hit_and_a_replaced_file_misses(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(small_jpeg(number, (96, 96)))
    lines = [f'{{"file_name": "{n}.jpg", "text": "photo {n}"}}' for n in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def digests(where: Path) -> dict[str, str]:
        rows = open_data(DataSection(path=str(where)), _policy()).train
        return {r["caption"]: rows.source_digest(i) for i, r in enumerate(rows.records(range(3)))}

    before = digests(folder)
    moved = tmp_path / "elsewhere" / "photos, größer"
    shutil.copytree(folder, moved)
    (moved / "1.jpg").rename(moved / "renamed.jpg")
    text = (moved / "metadata.jsonl").read_text(encoding="utf-8").replace("1.jpg", "renamed.jpg")
    (moved / "metadata.jsonl").write_text(text, encoding="utf-8")
    assert digests(moved) == before
    (moved / "2.jpg").write_bytes(small_jpeg(7, (96, 96)))
    after = digests(moved)
    assert [after[f"photo {n}"] == before[f"photo {n}"] for n in range(3)] == [True, True, False]


def _policy() -> Any:
    from sdprep.prompt_policy import PromptPolicy

    return PromptPolicy()


def test_kept_crops_repeat_in_turn_and_a_flip_is_a_crop_of_its_own() -> None:
    bucket, key = Bucket(64, 64), (7, "id")
    rule = CropRule(flip_prob=0.5, num_kept=3)
    crops = [rule.crop((300, 64), bucket, (*key, visit)) for visit in range(9)]
    assert crops[:3] == crops[3:6] == crops[6:]
    assert len(set(crops)) == 3
    free = CropRule(flip_prob=0.5)
    assert [free.crop((300, 64), bucket, (*key, visit)) for visit in range(3)] == crops[:3]
    assert len({free.crop((300, 64), bucket, (*key, visit)) for visit in range(40)}) > 20
    centre = CropRule(flip_prob=0.5, place="centre")
    seen = {centre.crop((301, 64), bucket, (*key, visit)) for visit in range(40)}
    assert sorted((crop.top_left, crop.is_flipped) for crop in seen) == [
        ((118, 0), False),
        ((118, 0), True),
    ]
    assert [rule.most_crops, free.most_crops, centre.most_crops] == [3, None, 2]
    assert CropRule(0.0, "centre").most_crops == 1
    visits = [visit for visit, _ in centre.different((301, 64), bucket, 7, "id", 40)]
    assert len(visits) == 2
    assert [visit for visit, _ in rule.different((300, 64), bucket, 7, "id", 40)] == [0, 1, 2]
    assert [visit for visit, _ in rule.different((64, 64), bucket, 7, "id", 1)] == [0]


def test_texts_that_never_repeat_are_not_cached(train_recipe: Recipe, tmp_path: Path) -> None:
    tags = [
        {"name": f"tag_{n}", "category": "general", "score": 1.0, "source": "x"} for n in range(40)
    ]
    rows = [prepared_row(number, tags=tags) for number in range(4)]
    folder = write_prepared(tmp_path / "tags", rows, policy={"mode": "tags"})
    path = train_recipe(data=folder)
    setup = setup_of(path, 'cache.text="auto"')
    assert setup.caches.text is None
    assert "draws new texts" in setup.caches.why_no_text
    fixed = ("prompt.shuffle=false", "prompt.length.law=all", "prompt.tag_style=spaces")
    fixed += ("prompt.delimiter.comma_p=1", "prompt.delimiter.blank_p=1", "prompt.alias_p=0")
    assert setup_of(path, *fixed).caches.why_no_text == ""


def test_the_benchmark_of_compression_gives_back_what_it_packed() -> None:
    path = Path(__file__).resolve().parent.parent / "tools" / "bench" / "latent_compression.py"
    spec = importlib.util.spec_from_file_location("latent_compression", path)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    noise = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(0)).half().numpy()
    table = bench.measure([noise, noise * 0])
    assert table["plain"]["saves_percent"] == 0
    assert table["byte-split + zstd"]["saves_percent"] > 20  # half of it is zeros
