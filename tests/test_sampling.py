"""Pictures depend on the model and the prompt, and drawing them changes nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdprep.errors import DataError, UserError
from sdtrain import checkpoint, contact_sheet
from sdtrain.sample_files import draw_grid, read_prompts, save_pictures, slug
from sdtrain.sampling import Style, load_checkpoint, pictures_of, sample_checkpoint
from tests.evaluated import PROMPTS
from tests.tiny import load_tiny

torch.set_num_threads(1)
STYLE = Style(seed=7, side_px=64, num_inference_steps=2, guidance_scale=5.0)


def values(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)


@pytest.mark.parametrize("family_name", ["sd15", "sdxl"])
def test_a_picture_is_what_the_pipeline_draws_from_the_same_noise(
    family_name: str, tiny_model: Callable[[str], Path]
) -> None:
    from sdtrain.noise import noise_for

    family = load_tiny(tiny_model(family_name))
    (ours,) = pictures_of(family, ["a photo of a cat"], STYLE)
    side = 64 // family.vae_scale_factor
    noise = noise_for(7, "sample", "a photo of a cat", 0, (family.latent_channels, side, side))
    pipeline = family.pipeline()
    size = {"height": 64, "width": 64}
    theirs = pipeline(  # their own text encoding, their own decoding
        "a photo of a cat",
        negative_prompt="",
        latents=noise[None],
        num_inference_steps=2,
        guidance_scale=5.0,
        **size,
    ).images[0]
    assert ours.size == (64, 64)
    assert np.abs(values(ours).astype(int) - values(theirs).astype(int)).max() <= 1


def test_a_prompts_picture_ignores_the_others_and_the_seed_moves_it(
    tiny_model: Callable[[str], Path],
) -> None:
    family = load_tiny(tiny_model("sd15"))
    both = pictures_of(family, ["", "red car"], STYLE)
    (alone,) = pictures_of(family, ["red car"], STYLE)
    assert (values(both[1]) == values(alone)).all()
    assert (values(both[0]) != values(alone)).any()
    other = pictures_of(family, ["red car"], Style(8, 64, 2, 5.0))[0]
    assert (values(other) != values(alone)).any()


def test_drawing_leaves_modes_gradients_and_the_ambient_generator_alone(
    tiny_model: Callable[[str], Path],
) -> None:
    family = load_tiny(tiny_model("sd15"))
    family.parts["unet"].train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    weights = {k: v.clone() for k, v in family.parts["unet"].state_dict().items()}
    config = dict(family.folder.scheduler.config)
    pictures_of(family, ["a", ""], STYLE)
    assert torch.equal(torch.get_rng_state(), before)
    assert family.parts["unet"].training
    assert not family.parts["vae"].training
    assert all(p.grad is None for p in family.parts["unet"].parameters())
    assert all(torch.equal(v, weights[k]) for k, v in family.parts["unet"].state_dict().items())
    assert dict(family.folder.scheduler.config) == config


def test_a_run_draws_every_prompt_at_its_ends_and_a_grid_over_time(evaluated_run: Path) -> None:
    samples = evaluated_run / "samples"
    for clock in ("0", "12"):
        entries = json.loads((samples / clock / "prompts.json").read_text(encoding="utf-8"))
        assert [entry["prompt"] for entry in entries] == PROMPTS
        for entry in entries:
            with Image.open(samples / clock / entry["file"]) as picture:
                assert picture.format == "PNG"
                assert picture.info == {}, "no metadata"
        assert (samples / clock / "all.png").is_file()
    name = entries[0]["file"]
    first, last = (Image.open(samples / clock / name) for clock in ("0", "12"))
    assert (values(first) != values(last)).any()
    with Image.open(samples / "grid.png") as grid:
        assert grid.height > 2 * 192


def test_a_checkpoint_draws_what_the_run_drew(evaluated_run: Path, tmp_path: Path) -> None:
    found = sample_checkpoint(evaluated_run, PROMPTS, tmp_path / "pictures")
    assert found["samples_seen"] == 12
    for entry in found["pictures"]:
        ours = Image.open(tmp_path / "pictures" / entry["file"])
        theirs = Image.open(evaluated_run / "samples" / "12" / entry["file"])
        assert (values(ours) == values(theirs)).all()
    _, family, _ = load_checkpoint(evaluated_run / "checkpoints" / "8")
    saved = checkpoint.read_trained(evaluated_run / "checkpoints" / "8")
    assert torch.equal(
        dict(family.named_parameters())["unet.conv_in.bias"], saved["unet.conv_in.bias"]
    )
    with pytest.raises(DataError, match="neither a checkpoint nor a run folder"):
        sample_checkpoint(tmp_path, [""], tmp_path / "x")


def test_prompts_are_one_a_line_and_an_empty_line_is_the_empty_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffred car\r\n\r\n日本 \n".encode())
    assert read_prompts(file) == ["red car", "", "日本"]
    file.write_text("a dog\u2028a cat\n\n", encoding="utf-8")
    assert read_prompts(file) == ["a dog\u2028a cat", ""]
    file.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        read_prompts(file)
    with pytest.raises(UserError, match="cannot read"):
        read_prompts(tmp_path / "absent.txt")


def test_file_names_are_plain_and_labels_whole(tmp_path: Path) -> None:
    prompts = ["", "a/b\\c: ../d", "日本", "x" * 400]
    pictures = [Image.new("RGB", (64, 64), (10 * k, 0, 0)) for k in range(4)]
    names = save_pictures(tmp_path / "0", prompts, pictures, "title")
    assert names[:3] == ["00-empty-prompt.png", "01-a-b-c-d.png", "02-prompt.png"]
    assert all(len(name) < 64 for name in names)
    assert slug("A photo, of a CAT!") == "a-photo-of-a-cat"
    assert draw_grid(tmp_path / "none") is None


def test_the_grid_over_time_leaves_out_what_came_after(tmp_path: Path) -> None:
    for clock in (0, 8, 16):
        pictures = [Image.new("RGB", (64, 64), (clock, 0, 0))]
        save_pictures(tmp_path / str(clock), ["a"], pictures, "title")
    heights = []
    for until in (16, 8):
        path = draw_grid(tmp_path, until)
        assert path is not None
        heights.append(Image.open(path).height)
    assert heights[0] - heights[1] == 192 + 12


def test_many_moments_are_thinned_and_small_pictures_enlarged_whole() -> None:
    assert contact_sheet.spread(range(1000), 5) == [0, 250, 500, 749, 999]
    assert contact_sheet.spread([3, 4], 5) == [3, 4]
    dot = Image.new("RGB", (2, 1), "red")
    dot.putpixel((1, 0), (0, 0, 255))
    sheet = values(contact_sheet.sheet([dot], ["label"], "title")).reshape(-1, 3)
    red, blue = ((sheet == colour).all(1).sum() for colour in ((255, 0, 0), (0, 0, 255)))
    assert red == blue == 192 * 192 // 4
