"""Tiny models: equal bytes, loadable by plain diffusers, and able to learn."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from sdprep.errors import UserError
from sdprep.plugins import config_for
from sdtrain.adapters.full import Full
from sdtrain.batch import Batch
from sdtrain.freezing import Rule, build_plan
from sdtrain.losses.mse import mse
from sdtrain.noise import noise_for, stratified_u
from sdtrain.step import denoising_loss
from sdtrain.tiny import write_tiny
from tests.test_families import load_pipeline
from tests.tiny import SEED, load_tiny, tiny_batch

FAMILIES = ("sd15", "sdxl")


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_seed_gives_the_same_bytes_and_leaves_the_ambient_generator_alone(
    tiny_model: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    first = hashes(tiny_model(name))
    state = torch.get_rng_state()
    torch.rand(3)  # whatever was drawn before makes no difference
    again = hashes(write_tiny(name, tmp_path / "with a space" / "again", SEED))
    torch.rand(1)
    assert again == first
    torch.set_rng_state(state)
    other = hashes(write_tiny(name, tmp_path / "other", SEED + 1))
    assert torch.equal(torch.get_rng_state(), state)
    changed = {path for path in first if first[path] != other[path]}
    assert "unet/diffusion_pytorch_model.safetensors" in changed
    assert "text_encoder/model.safetensors" in changed
    assert all(path.endswith(".safetensors") and "vae" not in path for path in changed)


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_diffusers_opens_and_samples_it(
    tiny_model: Callable[[str], Path], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = load_pipeline(tiny_model(name))
    assert not [r for r in caplog.records if "newly initialized" in r.message]
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a cat", num_inference_steps=2, generator=generator, output_type="pt").images
    assert image.shape == (1, 3, 64, 64)
    assert bool(torch.isfinite(image).all())
    saved = dict(load_tiny(tiny_model(name)).named_parameters())
    loaded = pipeline.text_encoder.state_dict()
    for key, tensor in loaded.items():
        canonical = f"text_encoder.text_model.{key.removeprefix('text_model.')}"
        assert torch.equal(tensor, saved[canonical]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_the_codec_shows_what_it_was_given(tiny_model: Callable[[str], Path], name: str) -> None:
    family = load_tiny(tiny_model(name))
    pixels = torch.nn.functional.interpolate(
        tiny_batch(family, 4, height=64, width=96).pixels, (8, 12), mode="area"
    )
    pixels = torch.nn.functional.interpolate(pixels, (64, 96), mode="bilinear")
    latents = family.encode_images(pixels)
    assert latents.shape == (4, 4, 16, 24)
    back = family.decode_latents(latents)
    inside = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    assert float((back - pixels)[inside].square().mean().sqrt()) < 0.05
    flat = torch.tensor([0.8, -0.4, 0.1]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    shown = family.decode_latents(family.encode_images(flat))[0, :, 32, 32]
    torch.testing.assert_close(shown, flat[0, :, 0, 0], rtol=0, atol=2e-3)


def test_sizes_scale_down(tiny_model: Callable[[str], Path]) -> None:
    for name in FAMILIES:
        family = load_tiny(tiny_model(name))
        assert (family.default_resolution_px, family.bucket_multiple_px) == (64, 8)
        assert (family.vae_scale_factor, family.latent_channels) == (4, 4)
        assert family.prediction_type == "epsilon"


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sd15"):
        write_tiny("sd51", tmp_path / "model")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        write_tiny("sd15", tmp_path / "used")


@pytest.mark.parametrize("name", FAMILIES)
def test_it_learns_a_picture_in_few_steps(tiny_model: Callable[[str], Path], name: str) -> None:
    family = load_tiny(tiny_model(name))
    plan = build_plan(family, [Rule("unet.**", lr=2e-3)], Full())
    optimizer = config_for("optimizer", "adamw")().build(plan.optimizer_groups())
    picture = tiny_batch(family, 4)

    def loss_at(step: int, purpose: str) -> torch.Tensor:
        noise = torch.stack(
            [noise_for(step, purpose, name, 0, picture.noise.shape[1:]) for name in picture.ids]
        )
        parts = vars(picture) | {"noise": noise, "u": stratified_u(step, 0, 4)}
        return denoising_loss(family, Batch(**parts), mse).mean()

    with torch.no_grad():
        before = sum(float(loss_at(step, "check")) for step in range(4)) / 4
    for step in range(40):
        loss_at(step, "train").backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = sum(float(loss_at(step, "check")) for step in range(4)) / 4
    assert after < 0.6 * before
