"""The page of `sdtrain inspect`: everything it shows is recomputed here in another way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from sdprep.clip_tokens import VOCABULARY
from sdtrain.inspect import inspect
from sdtrain.inspect_marks import levels
from sdtrain.noise import noise_for
from sdtrain.pixels import picture_of
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import Setup, open_setup
from tests.train_data import prepared_row, write_prepared

TAGS = ("1girl", "solo", "sky", "hat", "blue_eyes", "red_dress")
POLICY = {
    "mode": "concat",
    "dropout_p": 0.35,
    "alias_p": 0.7,
    "aliases": {"solo": ["alone"], "sky": ["heaven"]},
    "length": {"law": "truncated_normal", "mean": 3, "sd": 1, "min": 2},
}


def row(number: int) -> dict[str, Any]:
    tags = [{"name": name, "category": "general"} for name in TAGS]
    tags.append({"name": "rating_general", "category": "rating"})
    caption = f"<b>photo</b> {number} & more" + " of a cat" * (90 if number % 3 == 0 else 1)
    boxes = [{"label": "logo", "score": 0.9, "x0": 0.5, "y0": 0.5, "x1": 1.0, "y1": 0.75}]
    return prepared_row(
        number,
        caption=caption,
        captions=[{"text": caption, "source": "human"}],
        tags=tags,
        boxes=boxes if number % 2 else [],
    )


@pytest.fixture
def look(
    tmp_path: Path, train_recipe: Callable[..., Path]
) -> Callable[..., tuple[Setup, dict[str, Any], Path]]:
    """Inspects a small set of images with tags, captions, boxes and a prior."""

    def write(family: str, *settings: str) -> tuple[Setup, dict[str, Any], Path]:
        data = write_prepared(tmp_path / "set", [row(n) for n in range(8)], policy=POLICY)
        prior = write_prepared(tmp_path / "prior", [prepared_row(n) for n in range(40, 43)])
        recipe = train_recipe(family, data=data)
        more = (f"prior.path={prior}", "prior.fraction=0.25", "prior.weight=0.5")
        usual = ('mask.boxes=["logo"]', "data.flip_prob=0.5", "data.max_upscale=1.2")
        setup = open_setup(load_train_recipe(recipe, (*usual, *more, *settings)))
        to = tmp_path / "look"
        return setup, inspect(setup, to, 3), to

    return write


def test_every_number_and_picture_is_what_the_model_gets(look: Callable[..., Any]) -> None:
    setup, found, to = look("sd15", "data.max_aspect=1.0", "model.max_chunks=2")
    family, samples = setup.family, found["samples"]
    assert len(samples) == 12
    assert json.loads((to / "samples.json").read_text(encoding="utf-8")) == samples
    assert {sample["flipped"] for sample in samples} == {True, False}
    assert any(sample["crop"][1] > 0 for sample in samples)
    for sample in samples:
        is_prior = sample["id"].startswith("prior/")
        assert sample["prior"] is is_prior
        rows = setup.prior.data.train if is_prior else setup.data.train
        at = list(rows.ids).index(sample["id"].removeprefix("prior/"))
        source = rows.image(at)
        assert sample["source_size_hw"] == [source.height, source.width]
        with Image.open(to / sample["source"]) as shown:
            assert shown.size == source.size
        # the crop, cut out again by the box that is drawn
        top, left, tall, wide = sample["crop"]
        _, _, _, _, height, width = sample["time_ids"]
        resized = source.resize(
            (round(width / wide), round(height / tall)), Image.Resampling.LANCZOS
        )
        y, x = round(top * resized.height), round(left * resized.width)
        crop = resized.crop((x, y, x + width, y + height))
        if sample["flipped"]:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        with Image.open(to / sample["picture"]) as picture:
            assert np.array_equal(np.array(picture), np.array(crop))
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() / 127.5 - 1
        # with the noise of this visit at this level
        latents = family.encode_images(pixels[None])
        noise = noise_for(7, "noise", sample["id"], sample["visit"], latents.shape[1:])
        alphas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        kept = (1 - alphas).cumprod(0)[sample["timestep"]]
        noisy = kept.sqrt().float() * latents + (1 - kept).sqrt().float() * noise
        with Image.open(to / sample["noisy"]) as picture:
            expected = np.array(picture_of(family.decode_latents(noisy)[0])).astype(int)
            assert np.abs(np.array(picture).astype(int) - expected).max() <= 1
        # min-SNR by its formula, a prior's weight, and the share of the step
        snr = float(kept / (1 - kept))
        assert np.exp(sample["logsnr"]) == pytest.approx(snr, rel=1e-4)
        assert sample["weight"] == pytest.approx(min(snr, 5) / snr, rel=1e-4)
        assert sample["slot_weight"] == (0.5 if is_prior else 1)
        assert sample["counts"] == pytest.approx(sample["weight"] * sample["slot_weight"] / 4)
    for step in found["steps"]:
        inside = np.searchsorted(step["strata"], sorted(step["u"])) - 1
        assert inside.tolist() == [0, 1, 2, 3]
    assert [step["samples_seen"] for step in found["steps"]] == [0, 4, 8]


def test_prompts_are_told_token_by_token_and_tag_by_tag(look: Callable[..., Any]) -> None:
    _, found, to = look("sd15", "model.max_chunks=2")
    tokenizer = CLIPTokenizer.from_pretrained(str(VOCABULARY))
    samples = [each for each in found["samples"] if each["prompt"]]
    cut = [sample for sample in samples if sample["tokens_cut"]]
    assert cut
    for sample in samples:
        parts = ["".join(chunk["tokens"]) for chunk in sample["layout"]]
        assert "".join(parts) == sample["prompt"]
        lengths = [len(tokenizer(p, add_special_tokens=False)["input_ids"]) for p in parts]
        assert [len(chunk["tokens"]) for chunk in sample["layout"]] == lengths
        read = [chunk for chunk in sample["layout"] if chunk["is_read"]]
        assert len(read) == sample["chunks"]
        assert all(len(c["tokens"]) + c["num_padding"] == 75 for c in read)
        assert sum(lengths[len(read) :]) == sample["tokens_cut"]
        if sample["prior"]:
            continue
        rendering = sample["rendering"]
        assert rendering["never"] == ["rating_general"]
        assert sorted(rendering["tags"] + rendering["left_out"]) == sorted(TAGS)
        for name, other in rendering["spelled"].items():
            assert POLICY["aliases"][name] == [other]  # type: ignore[index]
            assert re.search(rf"\b{other}\b", sample["prompt"])
            assert not re.search(rf"\b{name}\b", sample["prompt"])
        for name in set(rendering["tags"]) & {"solo", "sky"} - set(rendering["spelled"]):
            assert re.search(rf"\b{name}\b", sample["prompt"])
    assert any(sample["rendering"]["spelled"] for sample in samples)
    shortened = [sample for sample in samples if sample["units_removed"]]
    for sample in shortened:
        assert len(sample["rendering"]["whole"]) > len(sample["prompt"])
    dropped = [sample for sample in found["samples"] if sample["dropped"]]
    assert dropped
    assert all(sample["rendering"]["whole"] for sample in dropped)
    page = (to / "index.html").read_text(encoding="utf-8")
    assert "<b>photo</b>" not in page
    assert "<b>photo</b> 0 & more" in unescape(re.sub(r"</?span>", "", page))
    assert not re.search(r"(?:src|href)=\"(?:https?:|//|data:)", page)
    for name in re.findall(r"(?:src|href)=\"([^\"]+)\"", page):
        assert (to / name).is_file(), name
    assert page.count("cut off: ") == len(cut)
    assert page.count("loss mask") == len(found["samples"])
    assert page.count("caption dropped: the model gets the empty prompt") == len(dropped)


def test_what_an_empty_prompt_becomes_is_asked_of_the_family(look: Callable[..., Any]) -> None:
    _, found, to = look("sdxl", "model.uncond_zero_prob=0.5", "model.uncond_zero_sizes=true")
    empty = [sample for sample in found["samples"] if not sample["prompt"]]
    assert {sample["uncond"] for sample in empty} == {"zeros", "empty prompt"}
    assert all(sample["time_ids"] == [0] * 6 for sample in empty)
    others = [sample for sample in found["samples"] if sample["prompt"]]
    assert all(sample["uncond"] is None for sample in others)
    assert all(min(sample["time_ids"][4:]) > 0 for sample in others)
    page = (to / "index.html").read_text(encoding="utf-8")
    zeros = sum(sample["uncond"] == "zeros" for sample in empty)
    assert page.count("the model gets zeros in place of all of its text") == zeros


def test_dots_that_would_overlap_are_piled() -> None:
    samples = [{"u": u, "slot": at, "forward": 1} for at, u in enumerate((0.5, 0.501, 0.9))]
    drawn = re.findall(r'cx="([\d.]+)" cy="(\d+)"', levels({"strata": None}, samples))
    assert [y for _, y in drawn] == ["44", "33", "44"]
    assert drawn[0][0] != drawn[1][0]
