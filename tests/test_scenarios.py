"""Three trainings that people know end with the word that people would say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdtrain.recipe import load_train_recipe
from sdtrain.trackers.jsonl import read_metrics
from sdtrain.trainer import Outcome, train
from tests.train_data import PHOTOS, prepared_row, write_prepared, write_recipe

SIDE_PX = 40
SETTINGS = (
    *("data.resolution_px=32", "data.batch_size=8", "data.micro_batch_size=8"),
    *("validation.images=16", "validation.train_probe_images=16"),
    "validation.timesteps_per_image=4",
)


def usable() -> list[int]:
    """Photos that are no copies of others; one of the copies is broken on purpose."""
    files = sorted(PHOTOS.rglob("*.jpg"))
    return [at for at, file in enumerate(files) if file.parent.name != "found_again"]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]
) -> Callable[..., Outcome]:
    """Trains in a folder of its own; each call is one scenario."""
    root = tmp_path_factory.mktemp("scenarios")
    rows = [prepared_row(at, size=(SIDE_PX, SIDE_PX), caption="a photo") for at in usable()]
    held_out, others = rows[::4][:16], [row for at, row in enumerate(rows) if at % 4]
    data = {
        "many": write_prepared(root / "data-many", others, held_out),
        "ten": write_prepared(root / "data-ten", others[:10], held_out),
    }

    def run(name: str, of: str, model: Path | None, *settings: str) -> Outcome:
        path = write_recipe(
            root / f"{name}.toml",
            model=model or tiny_model("sd15"),
            data=data[of],
            output=root / name,
            family="sd15",
        )
        return train(load_train_recipe(path, (*SETTINGS, *settings)))

    return run


@pytest.fixture(scope="module")
def about_right(trained: Callable[..., Outcome]) -> Outcome:
    """As long as the learning rate has an effect."""
    settings = ("train.samples=2400", "validation.every_samples=240", "train.lr=2e-3")
    return trained("about-right", "many", None, *settings)


def told(outcome: Outcome) -> dict[str, Any]:
    verdict = outcome.verdict
    assert verdict is not None
    assert verdict == read_metrics(Path(outcome.output) / "metrics.jsonl")[-1]
    return verdict


@pytest.mark.slow
def test_too_few_steps_are_still_learning(trained: Callable[..., Outcome]) -> None:
    outcome = trained(
        *("too-few", "many", None, "train.samples=240", "validation.every_samples=24"),
        *("train.lr=2e-4", "schedule.type=constant"),
    )
    verdict = told(outcome)
    assert verdict["verdict"] == "learning", verdict
    assert "still goes on" in verdict["reason"]


@pytest.mark.slow
def test_about_right_is_finished(about_right: Outcome) -> None:
    verdict = told(about_right)
    assert verdict["verdict"] == "finished", verdict
    assert verdict["evidence"][0]["ci95_new_images_percent"][1] < 0


@pytest.mark.slow
def test_ten_images_by_heart_are_overfitting(
    trained: Callable[..., Outcome], about_right: Outcome
) -> None:
    assert about_right.model is not None
    settings = ("train.samples=1600", "validation.every_samples=80", "train.lr=1e-3")
    outcome = trained(
        *("ten", "ten", Path(about_right.model), *settings, "schedule.type=constant"),
        "validation.stop.patience=4",
    )
    verdict = told(outcome)
    assert verdict["verdict"] == "overfitting", verdict
    rise, seen = verdict["evidence"][:2]
    assert (rise["set"], rise["direction"]) == ("validation", 1)
    assert (seen["set"], seen["direction"]) == ("train_probe", -1)
    assert verdict["stopped_early"] == "overfitting at 4 evaluations in a row"
    assert outcome.samples_seen < outcome.total_samples
    assert outcome.is_finished
    assert outcome.model is not None
    best = verdict["best"]["samples_seen"]
    if best:
        assert outcome.best is not None
        assert Path(outcome.best).name == str(best)
        pointer = Path(outcome.output) / "checkpoints" / "best"
        assert json.loads(pointer.read_text(encoding="utf-8"))["checkpoint"] == str(best)
    again = train(
        load_train_recipe(
            Path(outcome.output).with_suffix(".toml"),
            (*SETTINGS, *settings, "schedule.type=constant", "validation.stop.patience=4"),
        )
    )
    assert again.samples_seen == outcome.samples_seen, "a stopped run stays stopped"
