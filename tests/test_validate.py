"""`sdtrain validate` measures any checkpoint as the run itself would, beside the base model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdprep.errors import DataError, UserError
from sdtrain.matrices import find
from sdtrain.probe import LossMatrix
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import open_setup
from sdtrain.trackers.jsonl import read_metrics
from sdtrain.validate import loaded, report, to_json, validate_checkpoints
from tests.evaluated import WITH_EVALUATION


def test_checkpoints_read_what_the_run_read(evaluated_run: Path, tmp_path: Path) -> None:
    recipe = load_train_recipe(evaluated_run / "recipe.toml")
    paths = [evaluated_run / "checkpoints" / clock for clock in ("12", "8")]
    before = sorted(p.relative_to(evaluated_run) for p in evaluated_run.rglob("*"))
    found = validate_checkpoints(recipe, [*paths, evaluated_run / "model"], tmp_path / "to")
    assert sorted(p.relative_to(evaluated_run) for p in evaluated_run.rglob("*")) == before
    ran = {
        (line["samples_seen"], line["set"]): line
        for line in read_metrics(evaluated_run / "metrics.jsonl")
        if line["kind"] == "validation"
    }
    clocks = {"base": 0, "run-12": 12, "run-8": 8, "run-model": 12}
    assert [row["checkpoint"] for row in found["evaluations"][::2]] == list(clocks)
    for row in found["evaluations"]:
        line = ran[clocks[row["checkpoint"]], row["set"]]
        assert row["probe_id"] == line["probe_id"]
        assert row["mean"] == pytest.approx(line["mean"], rel=1e-6)
        assert Path(row["matrix"]).is_file()
    for pair in found["comparisons"]:
        line = ran[clocks[pair.b.split("@")[1]], pair.name]
        assert pair.a.endswith("@base")
        assert pair.found.change_percent == pytest.approx(line["change_percent"], rel=1e-4)
    assert json.loads(json.dumps(to_json(found)))["comparisons"][0]["verdict"]
    assert "run-model" in report(found)
    with pytest.raises(DataError, match="Name the files|holds several evaluations"):
        find(tmp_path / "to")


def test_a_run_stands_for_its_newest_checkpoint(evaluated_run: Path, tmp_path: Path) -> None:
    recipe = load_train_recipe(evaluated_run / "recipe.toml")
    found = validate_checkpoints(recipe, [evaluated_run], tmp_path / "to")
    newest = f"{evaluated_run.name}-12"
    assert {row["checkpoint"] for row in found["evaluations"]} == {"base", newest}


def test_what_is_no_checkpoint_of_this_model_is_refused(
    evaluated_run: Path, train_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = load_train_recipe(train_recipe(), WITH_EVALUATION)
    with pytest.raises(DataError, match="is no checkpoint"):
        validate_checkpoints(recipe, [tmp_path], tmp_path / "to")
    other = load_train_recipe(train_recipe(), (*WITH_EVALUATION, "model.clip_skip=2"))
    with pytest.raises(DataError, match=r"model\.clip_skip: 1 there, 2 here"):
        validate_checkpoints(other, [evaluated_run / "checkpoints" / "8"], tmp_path / "to")
    none = load_train_recipe(train_recipe())
    with pytest.raises(DataError, match="nothing to evaluate on"):
        validate_checkpoints(none, [evaluated_run / "checkpoints" / "8"], tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prediction_type": "v_prediction"}, "predicts v_prediction, which is not epsilon"),
        ({"beta_end": 0.02}, "has another noise schedule"),
    ],
)
def test_a_model_whose_loss_is_another_quantity_is_refused(
    evaluated_run: Path,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    changed: dict[str, object],
    words: str,
) -> None:
    other = shutil.copytree(tiny_model("sd15"), tmp_path / "other")
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    recipe = load_train_recipe(evaluated_run / "recipe.toml")
    with pytest.raises(DataError, match=words):
        validate_checkpoints(recipe, [other], tmp_path / "to")


SHORT = ("validation.images=2", "validation.timesteps_per_image=2")


def other_vae(folder: Path, to: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a model whose VAE's tensors are changed by name."""
    other = shutil.copytree(folder, to)
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: change(k, v).contiguous() for k, v in load_file(file).items()}, file)
    return other


def test_a_vae_that_makes_the_same_latents_is_no_other_one(
    train_recipe: Callable[..., Path],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Most files are rounded to fp16, and many came with a decoder that was trained on."""
    recipe, base = load_train_recipe(train_recipe(), SHORT), tiny_model("sd15")
    rounded = other_vae(base, tmp_path / "half", lambda _, t: t.half().float())
    decoder = other_vae(
        base, tmp_path / "decoder", lambda k, t: t * 1.5 if k.startswith("decoder.") else t
    )
    found = validate_checkpoints(recipe, [rounded, decoder], tmp_path / "to")
    assert len({row["mean"] for row in found["evaluations"]}) == 1  # on the base model's latents
    said = capsys.readouterr().err
    assert f"{rounded}: its VAE's latents are 0.0" in " ".join(said.split())
    encoder = other_vae(
        base, tmp_path / "encoder", lambda k, t: t * 1.05 if k.startswith("encoder.") else t
    )
    with pytest.raises(DataError, match=r"has another VAE, with latents .* % apart"):
        validate_checkpoints(recipe, [encoder], tmp_path / "to")


def test_what_cannot_be_measured_is_refused_before_anything_is(
    train_recipe: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = load_train_recipe(train_recipe(), SHORT)
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_nowhere.lora_down.weight": torch.zeros(2, 2)}, lora)
    for path in (tiny_model("sdxl"), lora):
        with pytest.raises((DataError, UserError)):
            validate_checkpoints(recipe, [path], tmp_path / "to")
        assert not list((tmp_path / "to").rglob("*.npz"))


def test_a_damaged_model_is_named(
    train_recipe: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    broken = shutil.copytree(tiny_model("sd15"), tmp_path / "broken one")
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "conv_out.bias": tensors["conv_out.bias"] * float("nan")}, file)
    recipe = load_train_recipe(train_recipe(), SHORT)
    with pytest.raises(DataError, match="^broken one: the loss of .* is not finite"):
        validate_checkpoints(recipe, [broken], tmp_path / "to")


def test_the_base_model_is_put_back_after_each_checkpoint(evaluated_run: Path) -> None:
    setup = open_setup(load_train_recipe(evaluated_run / "recipe.toml"))
    before = {path: p.detach().clone() for path, p in setup.plan.trained().items()}
    with loaded(setup, evaluated_run / "checkpoints" / "12"):
        assert any(not torch.equal(p, before[path]) for path, p in setup.plan.trained().items())
    assert all(torch.equal(p, before[path]) for path, p in setup.plan.trained().items())


def test_two_that_write_the_same_matrix_at_once_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two that validate other checkpoints do with that of the base model."""
    processes = iter((1, 2))
    monkeypatch.setattr("sdtrain.probe.os.getpid", lambda: next(processes))
    matrices = [LossMatrix(np.full((2, 3), n), np.ones((2, 3)), np.ones((2, 3))) for n in (1, 2)]
    real, path = np.savez, tmp_path / "base.npz"

    def savez(scratch: Path, **arrays: np.ndarray) -> None:
        real(scratch, **arrays)
        if len(matrices) == 2:
            matrices.pop().save(path, ["a", "b"])  # before the first has its name

    monkeypatch.setattr(np, "savez", savez)
    matrices[0].save(path, ["a", "b"])
    assert LossMatrix.load(path).loss.tolist() == matrices[0].loss.tolist()
    assert [each.name for each in tmp_path.iterdir()] == ["base.npz"]
