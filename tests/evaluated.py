"""A short run with evaluations and pictures, which several tests look at."""

from __future__ import annotations

from pathlib import Path

from sdtrain.recipe import load_train_recipe
from sdtrain.trainer import train
from tests.train_data import write_recipe

WITH_EVALUATION = (
    *("validation.images=3", "validation.train_probe_images=3", "validation.every_samples=8"),
    *("validation.timesteps_per_image=3", "train.samples=12", "checkpoint.every_samples=8"),
)
PROMPTS = ["", "a photo of a dog <b>"]
WITH_PICTURES = (
    'sampling.prompts=["", "a photo of a dog <b>"]',
    "sampling.num_inference_steps=2",
)


def write_run(folder: Path, model: Path, data: Path) -> Path:
    """Train in `folder`; the run folder."""
    path = write_recipe(
        folder / "recipe.toml", model=model, data=data, output=folder / "run", family=model.name
    )
    train(load_train_recipe(path, (*WITH_EVALUATION, *WITH_PICTURES)))
    return folder / "run"
