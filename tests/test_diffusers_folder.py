"""Diffusers folders of others: variants, and what is said of folders that are damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdprep.errors import DataError, UserError
from sdprep.plugins import config_for
from tests.tiny import load_tiny


@pytest.fixture
def copied(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny model that a test may damage."""
    shutil.copytree(tiny_model("sdxl"), tmp_path / "sdxl")
    return tmp_path / "sdxl"


def edited(path: Path, **entries: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **entries}), encoding="utf-8")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5_000])


def test_a_folder_that_has_only_half_precision_is_read(
    copied: Path, tiny_model: Callable[[str], Path]
) -> None:
    for file in copied.rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    found = dict(load_tiny(copied).named_parameters())
    for name, parameter in load_tiny(tiny_model("sdxl")).named_parameters():
        assert torch.equal(found[name], parameter), name


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: cut(f / "text_encoder/model.safetensors"), "text_encoder cannot be loaded"),
        (lambda f: edited(f / "unet/config.json", block_out_channels=[64, 64]), "unet cannot"),
        (lambda f: edited(f / "text_encoder/config.json", intermediate_size=96), "text_encoder c"),
        (lambda f: shutil.rmtree(f / "scheduler"), "scheduler cannot be loaded"),
        (lambda f: shutil.rmtree(f / "tokenizer_2"), "tokenizer_2 has no vocabulary, only 2"),
        (lambda f: (f / "model_index.json").write_text("{"), r"model_index\.json cannot be read"),
        (lambda f: edited(f / "model_index.json", scheduler=None), "unknown scheduler"),
    ],
)
def test_damage_is_named(copied: Path, damage: Callable[[Path], Any], said: str) -> None:
    damage(copied)
    with pytest.raises(DataError, match=said):
        load_tiny(copied)


def test_noise_levels_of_another_kind_are_refused(copied: Path) -> None:
    edited(copied / "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
    config = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, "prediction_type": "epsilon"}
    (copied / "scheduler/scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="noise levels of EDM"):
        load_tiny(copied)


def test_a_vae_with_a_scale_for_each_channel(copied: Path) -> None:
    mean, std = [1.0, -2.0, 0.5, 4.0], [2.0, 3.0, 0.5, 1.5]
    edited(copied / "vae/config.json", latents_mean=mean, latents_std=std)
    family = config_for("family", "sdxl")().build(str(copied))
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    plain = family.posterior(pixels)[0]
    expected = (plain - torch.tensor(mean).view(1, 4, 1, 1)) * family.parts["vae"].config[
        "scaling_factor"
    ]
    expected = expected / torch.tensor(std).view(1, 4, 1, 1)
    latents = family.encode_images(pixels)
    torch.testing.assert_close(latents, expected)
    with torch.no_grad():
        again = family.parts["vae"].decode(plain).sample.clamp(-1, 1)
    torch.testing.assert_close(family.decode_latents(latents), again, rtol=0, atol=1e-4)
