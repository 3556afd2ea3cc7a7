"""Exports: every format holds the trained model, and says where it comes from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from sdprep.errors import DataError, UserError
from sdprep.plugins import config_for
from sdtrain.cli import app
from sdtrain.export import export
from sdtrain.recipe import load_train_recipe
from sdtrain.trainer import train
from tests.test_adapters import predict
from tests.test_families import load_pipeline
from tests.tiny import load_tiny

FAMILIES = ("sd15", "sdxl")


def header(path: Path) -> dict[str, str]:
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata())


def trained_lora(recipe: Path) -> Path:
    settings = ['adapter.type="lora"', "adapter.rank=2", "adapter.alpha=3.0", "train.samples=8"]
    train(load_train_recipe(recipe, settings))
    return recipe.parent / "run"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_diffusers_folder_becomes_a_file_and_a_folder_again(
    tiny_model: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = tiny_model(name)
    path = tmp_path / "out" / "my model.safetensors"
    arguments = ["export", str(folder), "--format", "single-file", "--to", str(path), "--json"]
    result = CliRunner().invoke(app, [*arguments, "--author", "Ann", "--dtype", "fp32"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bytes"] == path.stat().st_size
    about = header(path)
    architecture = {"sd15": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}[name]
    assert about["modelspec.sai_model_spec"] == "1.0.0"
    assert about["modelspec.architecture"] == architecture
    assert about["modelspec.title"] == "my model"
    assert about["modelspec.author"] == "Ann"
    assert about["modelspec.prediction_type"] == "epsilon"
    assert about["modelspec.resolution"] == "64x64"
    assert about["modelspec.implementation"].startswith("https://")
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert about["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data).hexdigest()

    again = config_for("family", name)(config=str(folder)).build(str(path))
    again.save(tmp_path / "back")
    for file in folder.rglob("*.safetensors"):
        before, after = (
            load_file(str(file)),
            load_file(str(tmp_path / "back" / file.relative_to(folder))),
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_is_merged_or_written_alone(
    train_recipe: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    run = trained_lora(train_recipe(name))
    base = predict(load_tiny(tiny_model(name)))
    merged = tmp_path / "merged.safetensors"
    export(run, "single-file", merged)
    export(run, "diffusers", tmp_path / "merged")
    family = config_for("family", name)(config=str(tiny_model(name))).build(str(merged))
    by_folder = config_for("family", name)().build(str(tmp_path / "merged"))
    expected = predict(family)
    assert (expected - base).abs().max() > 1e-5
    assert torch.equal(predict(by_folder), expected)
    record = header(merged)
    assert record["sdtrain.samples_seen"] == "8"
    assert json.loads(record["sdtrain.recipe"])["adapter"]["rank"] == 2
    assert str(tmp_path) not in record["sdtrain.recipe"]
    assert str(tiny_model(name)) not in record["sdtrain.recipe"]
    assert not json.loads(record["sdtrain.recipe"])["output"].startswith("/")
    assert {"sdtrain.versions", "sdtrain.data", "sdtrain.freeze_table"} <= record.keys()

    export(run, "lora-kohya", tmp_path / "k.safetensors")
    export(run, "lora-diffusers", tmp_path / "d")
    files = [tmp_path / "k.safetensors", tmp_path / "d" / "pytorch_lora_weights.safetensors"]
    for file in files:
        assert header(file)["modelspec.architecture"].endswith("/lora")
        pipeline = load_pipeline(tiny_model(name))
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        pipeline.fuse_lora()
        fused: Any = pipeline.unet.state_dict()
        for key, tensor in family.parts["unet"].state_dict().items():
            found = next(fused[each] for each in (key, with_base(key)) if each in fused)
            torch.testing.assert_close(found, tensor, rtol=1e-5, atol=1e-6)


def with_base(key: str) -> str:
    """The name of a weight below peft's wrapper."""
    module, _, kind = key.rpartition(".")
    return f"{module}.base_layer.{kind}"


def test_precision_is_what_was_asked(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_model("sd15")
    export(folder, "single-file", tmp_path / "half.safetensors", dtype="fp16")
    kinds = {t.dtype for t in load_file(str(tmp_path / "half.safetensors")).values()}
    assert kinds == {torch.float16, torch.int64}
    export(folder, "diffusers", tmp_path / "half", dtype="bf16")
    for file in (tmp_path / "half").rglob("*.safetensors"):
        assert {t.dtype for t in load_file(str(file)).values()} == {torch.bfloat16}
    family = load_tiny(folder)
    with torch.no_grad():
        next(family.parts["unet"].parameters()).view(-1)[0] = 1e6
    family.save(tmp_path / "large")
    with pytest.raises(DataError, match="beyond torch.float16"):
        export(tmp_path / "large", "single-file", tmp_path / "l.safetensors", dtype="fp16")
    assert not list(tmp_path.glob("*l.safetensors*"))


def test_what_cannot_be_exported_is_said(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_model("sd15")
    with pytest.raises(UserError, match="holds no adapter"):
        export(folder, "lora-kohya", tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="end it in"):
        export(folder, "single-file", tmp_path / "a")
    with pytest.raises(UserError, match="is not known"):
        export(folder, "ckpt", tmp_path / "a.safetensors")
    (tmp_path / "there.safetensors").write_bytes(b"precious")
    with pytest.raises(UserError, match="is there already"):
        export(folder, "single-file", tmp_path / "there.safetensors")
    with pytest.raises(DataError, match="neither a checkpoint"):
        export(tmp_path, "single-file", tmp_path / "b.safetensors")
