"""Folders and files that are no model, given as one: what is said of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdprep.errors import DataError, UserError
from sdprep.plugins import config_for
from sdtrain.stored_formats import model_files, stored_formats

WEIGHTS = "diffusion_pytorch_model"


def build(path: Path) -> None:
    config_for("family", "sd15")().build(str(path))


@pytest.fixture
def folder(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("sd15"), tmp_path / "a m\u00f6del"))


def test_a_unet_for_inpainting(folder: Path) -> None:
    file, config = folder / "unet" / f"{WEIGHTS}.safetensors", folder / "unet" / "config.json"
    tensors = load_file(file)
    first = tensors["conv_in.weight"]
    tensors["conv_in.weight"] = torch.cat([first, torch.zeros(len(first), 5, 3, 3)], dim=1)
    save_file(tensors, file)
    options = {**json.loads(config.read_text("utf-8")), "in_channels": 9}
    config.write_text(json.dumps(options), "utf-8")
    with pytest.raises(DataError, match=r"takes 9 channels(.|\n)*inpainting"):
        build(folder)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        (f"{WEIGHTS}.bf16.safetensors", "Only the variant fp16 is known"),
        (f"{WEIGHTS}.bin", "Only .safetensors are read"),
        (None, "There is nothing in"),
    ],
)
def test_weights_of_another_kind(folder: Path, name: str | None, advice: str) -> None:
    file = folder / "unet" / f"{WEIGHTS}.safetensors"
    if name is None:
        shutil.rmtree(file.parent)
    else:
        file.rename(file.with_name(name))
    with pytest.raises(DataError, match=rf"unet cannot be loaded(.|\n)*{name or ''}.*{advice}"):
        build(folder)


def test_weights_that_are_cut_off(folder: Path) -> None:
    file = folder / "vae" / f"{WEIGHTS}.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(DataError, match=rf"vae cannot be loaded(.|\n)*{WEIGHTS}.*again"):
        build(folder)


def test_a_run_or_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "4"
    checkpoint.mkdir(parents=True)
    for path in (checkpoint, tmp_path / "run"):
        with pytest.raises(UserError, match=r"no diffusers folder\n.*sdtrain export"):
            build(path)
    shutil.copytree(folder, tmp_path / "run" / "model")
    with pytest.raises(UserError, match=r"no diffusers folder\n.*its model is .*model"):
        build(tmp_path / "run")


def test_half_precision_alone_is_named_by_check(folder: Path) -> None:
    for part in ("unet", "vae"):
        file = folder / part / f"{WEIGHTS}.safetensors"
        half = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(half, file.with_name(f"{WEIGHTS}.fp16.safetensors"))
    parts = ("unet", "vae")
    assert stored_formats(str(folder), parts) == {"unet": "F32", "vae": "F32"}
    (folder / "unet" / f"{WEIGHTS}.safetensors").unlink()
    assert stored_formats(str(folder), parts) == {"unet": "F16", "vae": "F32"}
    assert f"unet/{WEIGHTS}.fp16.safetensors" in model_files(str(folder), parts)


def test_a_lora(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, file)
    with pytest.raises(DataError, match=r"is a LoRA(.|\n)*that it was made for"):
        build(file)
