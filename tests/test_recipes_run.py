"""Every shipped training recipe trains a tiny model through the command line."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdtrain.cli import app

ROOT = Path(__file__).resolve().parent.parent / "recipes"
RECIPES = sorted(
    path
    for folder in ("train", "tiny")
    for path in (ROOT / folder).glob("*.toml")
    if "train" in tomllib.loads(path.read_text(encoding="utf-8"))
)
STEPS = 2


def test_there_are_recipes_of_both_kinds() -> None:
    assert len(RECIPES) >= 6
    assert {path.parent.name for path in RECIPES} == {"train", "tiny"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_recipe_runs(
    recipe: Path, tiny_model: Callable[[str], Path], prepared_folder: Path, tmp_path: Path
) -> None:
    """What is set here is only what a tiny model on a CPU needs: paths, sizes and length."""
    asked = tomllib.loads(recipe.read_text(encoding="utf-8"))
    samples = STEPS * 2
    settings = {
        "output": str(tmp_path / "run"),
        "model.path": str(tiny_model(asked["model"]["family"])),
        "data.path": str(prepared_folder),
        "data.resolution_px": 64,
        "data.batch_size": 2,
        "data.micro_batch_size": 1,
        "data.workers": 0,
        "train.samples": samples,
        "precision.device": "cpu",
        "precision.mixed": "no",
        "validation.images": 2,
        "validation.train_probe_images": 0,
        "validation.timesteps_per_image": 2,
        "validation.every_samples": samples,
        "checkpoint.every_samples": samples,
    }
    if "schedule" in asked and "warmup_samples" in asked["schedule"]:
        settings["schedule.warmup_samples"] = 1
    if "sampling" in asked:
        settings |= {"sampling.num_inference_steps": 1, "sampling.every_samples": samples}
        settings["sampling.prompts"] = [""]
    texts = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    result = CliRunner().invoke(app, ["run", str(recipe), *texts, "--json"])
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert found["is_finished"] is True
    assert found["samples_seen"] == samples
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds.count("train") == STEPS
    assert "validation" in kinds
    assert any(Path(found["model"]).rglob("*.safetensors"))
