"""Every service gets the same curves, both ends of intervals and the pictures."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdprep.errors import MissingExtraError, RecipeError
from sdtrain import tracking
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import open_setup
from sdtrain.trackers.curves import bins, curves
from sdtrain.trainer import train
from tests.evaluated import WITH_EVALUATION, WITH_PICTURES

Recipe = Callable[..., Path]


def test_a_line_becomes_curves_with_both_ends_of_its_intervals() -> None:
    line = {
        **{"kind": "validation", "samples_seen": 8, "set": "validation_ema", "mean": 0.5},
        **{"ci95_percent": [-2.0, 1.0], "ci95_new_images_percent": None, "probe_id": "x"},
        "bins": [
            {"from": 0.0, "to": 0.5, "loss": 1.0, "relative": 0.9},
            {"from": 0.5, "to": 1.0, "loss": 2.0, "relative": None},
        ],
    }
    found = curves(line)
    assert found["validation_ema/mean"] == 0.5
    assert found["validation_ema/ci95_percent/low"] == -2.0
    assert found["validation_ema/ci95_percent/high"] == 1.0
    assert "samples_seen" not in " ".join(found)
    assert bins(line) == ([1.0, 2.0], [0.0, 0.5, 1.0])
    train_line = {"kind": "train", "samples_seen": 4, "lr": {"unet.**": 1e-5}, "loss": float("nan")}
    assert curves(train_line) == {"train/lr/unet.**": 1e-5}
    assert bins(train_line) is None


def test_a_service_that_is_not_installed_is_told_before_anything_is_opened(
    train_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "wandb" else True)
    recipe = load_train_recipe(train_recipe(), ('tracking.with=["wandb"]',))
    with pytest.raises(MissingExtraError, match="needs wandb, which is not installed"):
        open_setup(recipe)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('tracking.project="x"', "neither is in `with`"),
        ('tracking.with=["wandb", "wandb"]', "each service is named once"),
        ('tracking.with=["mlflow"]', "tracking.with"),
    ],
)
def test_a_key_without_effect_is_refused(train_recipe: Recipe, override: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_train_recipe(train_recipe(), (override,))
    assert words in str(caught.value)


def test_the_resolved_recipe_reads_back(train_recipe: Recipe, tmp_path: Path) -> None:
    from sdtrain.toml_text import toml_text

    recipe = load_train_recipe(train_recipe(), ("tracking.with=[]",))
    (tmp_path / "again.toml").write_text(toml_text(recipe.resolved()), encoding="utf-8")
    assert load_train_recipe(tmp_path / "again.toml").tracking.services == ()


def test_tensorboard_has_curves_intervals_and_pictures(evaluated_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(evaluated_run / "tensorboard"))
    found.Reload()
    tags = found.Tags()
    for name in ("train/loss", "train/grad_norm", "validation/ci95_new_images_percent/high"):
        assert name in tags["scalars"]
    assert [event.step for event in found.Images("samples/(empty prompt)")] == [0, 12]


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_a_run_goes_to_a_service_and_a_resumed_one_to_the_same_run(
    service: str, train_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(service) is None:
        pytest.skip(f"{service} is not installed (extra track)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    wanted = (*WITH_EVALUATION, *WITH_PICTURES, f'tracking.with=["{service}"]')
    path = train_recipe()
    train(load_train_recipe(path, wanted))
    run = tmp_path / "run"
    name = json.loads((run / "tracking.json").read_text(encoding="utf-8"))[service]
    train(load_train_recipe(path, wanted), resume=str(run / "checkpoints" / "8"))
    assert json.loads((run / "tracking.json").read_text(encoding="utf-8"))[service] == name
    assert not (run / "tensorboard").exists()
    if service == "wandb":
        found = list((run / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
        assert found
        assert all(file.stat().st_size > 1000 for file in found)
    else:
        assert _numbers_of_trackio(name)["validation/change_percent"]


def _numbers_of_trackio(run: str) -> dict[str, Any]:
    from trackio.sqlite_storage import SQLiteStorage

    found: dict[str, Any] = {}
    for line in SQLiteStorage.get_logs("sdtrain", run):
        found |= line
    return found
