"""`--ema`: the averaged weights of a checkpoint, measured, drawn with and exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from sdprep.errors import UserError
from sdtrain import trainer
from sdtrain.cli import app
from sdtrain.recipe import load_train_recipe
from sdtrain.trackers.jsonl import read_metrics
from tests.train_data import write_recipe

SETTINGS = (
    *("validation.images=1", "validation.train_probe_images=0", "train.samples=8"),
    *("validation.timesteps_per_image=2", "validation.every_samples=8"),
    *("ema.half_life_samples=6", "checkpoint.every_samples=8"),
)


def call(*arguments: str | Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    if result.exception is not None:
        raise result.exception
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    prepared_folder: Path,
    tiny_model: Callable[[str], Path],
) -> Path:
    """A run of two steps with an average; never change it."""
    folder = tmp_path_factory.mktemp("averaged")
    names = {"model": tiny_model("sd15"), "data": prepared_folder, "output": folder / "run"}
    recipe = write_recipe(folder / "recipe.toml", family="sd15", **names)
    trainer.train(load_train_recipe(recipe, SETTINGS), keeps_model=False)
    return folder / "run"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a dog\n", encoding="utf-8")
    return path


def test_validate_measures_both_as_the_run_did(run: Path, tmp_path: Path) -> None:
    recipe, last = run / "recipe.toml", run / "checkpoints" / "8"
    found = call("validate", recipe, "--checkpoint", last, "--to", tmp_path, "--ema")
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "validation"]
    ran = {line["set"]: line["mean"] for line in lines if line["samples_seen"] == 8}
    means = {row["checkpoint"]: row["mean"] for row in found["evaluations"]}
    assert means["run-8"] == pytest.approx(ran["validation"], rel=1e-6)
    assert means["run-8-ema"] == pytest.approx(ran["validation_ema"], rel=1e-6)
    assert means["run-8"] != means["run-8-ema"] != means["base"]
    assert len(found["comparisons"]) == 2
    again = call("validate", recipe, "--checkpoint", last, "--to", tmp_path)
    assert [row["checkpoint"] for row in again["evaluations"]] == ["base", "run-8"]


def test_export_writes_the_average(run: Path, tmp_path: Path) -> None:
    found = call("export", run, "--format", "diffusers", "--to", tmp_path / "out", "--ema")
    assert found["ema"] is True
    written = load_file(next((tmp_path / "out" / "unet").glob("*.safetensors")))
    average = load_file(run / "checkpoints" / "8" / "ema.safetensors")
    assert len(average) == len(written)
    assert all(torch.equal(written[k.removeprefix("unet.")], v) for k, v in average.items())
    with pytest.raises(UserError, match="only checkpoints hold averages"):
        call("export", tmp_path / "out", "--format", "diffusers", "--to", tmp_path / "b", "--ema")


def test_pictures_are_drawn_with_the_average(run: Path, prompts: Path, tmp_path: Path) -> None:
    call("export", run, "--format", "diffusers", "--to", tmp_path / "average", "--ema")
    common = ("--prompts", prompts, "--steps", "2")
    sampled = call("sample", run, *common, "--to", tmp_path / "ema", "--ema")
    plain = call("sample", run, *common, "--to", tmp_path / "plain")
    grid = call("grid", run, tmp_path / "average", *common, "--to", tmp_path / "g.png", "--ema")
    assert grid["rows"] == ["run @ 8 average", "average"]
    with Image.open(tmp_path / "g.png") as image:
        assert image.width > 0

    def pixels(found: dict[str, Any]) -> np.ndarray:
        with Image.open(Path(found["path"]) / found["pictures"][0]["file"]) as picture:
            return np.array(picture).astype(int)

    assert np.abs(pixels(sampled) - pixels(plain)).max() > 0
    from sdtrain.in_turn import InTurn, candidates
    from sdtrain.sampling import Style, pictures_of

    models, style = InTurn("cpu"), Style(7, 64, 2, 5.0)
    rows = candidates([run, tmp_path / "average"], ema=True)
    first, second = (np.array(pictures_of(models.family(r), ["a dog"], style)[0]) for r in rows)
    assert np.array_equal(first, second)


def test_a_run_without_averages_is_told(evaluated_run: Path, prompts: Path, tmp_path: Path) -> None:
    last = evaluated_run / "checkpoints" / "12"
    recipe = evaluated_run / "recipe.toml"
    to = ("--to", tmp_path / "x.png", "--ema")
    for command in (
        ("sample", last, "--prompts", prompts),
        ("grid", last, "--prompts", prompts),
        ("export", last, "--format", "diffusers"),
        ("validate", recipe, "--checkpoint", last),
    ):
        with pytest.raises(UserError, match=r"holds no average .* no \[ema\]"):
            call(*command, *to)
    with pytest.raises(UserError, match="only those hold averages"):
        call("validate", recipe, "--checkpoint", evaluated_run / "model", *to)
    with pytest.raises(UserError, match="--ema is not for --follow"):
        call("grid", "--follow", evaluated_run, "--prompts", prompts, *to)
