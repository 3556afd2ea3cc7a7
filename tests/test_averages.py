"""Averaged weights: evaluated, kept and handed over, without touching the training by a bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdprep.errors import RecipeError
from sdtrain import checkpoint, trainer
from sdtrain.averages import Ema, EmaSection, restored
from sdtrain.matrices import find
from sdtrain.page import write_page
from sdtrain.probe import LossMatrix
from sdtrain.recipe import load_train_recipe
from sdtrain.run import Run
from sdtrain.run_folder import RunFolder
from sdtrain.setup import open_setup
from sdtrain.trackers.jsonl import read_metrics

torch.set_num_threads(1)

Recipe = Callable[..., Path]
JUDGED = (
    *("validation.images=1", "validation.train_probe_images=0", "train.samples=14"),
    *("validation.timesteps_per_image=2", "validation.every_samples=10"),
)
EMA = ("ema.half_life_samples=10", "ema.device=cpu")


def run(path: Path, *overrides: str, resume: str = "auto") -> checkpoint.Snapshot:
    """Train to the end; the last checkpoint."""
    outcome = trainer.train(load_train_recipe(path, [*JUDGED, *overrides]), resume=resume)
    assert outcome.is_finished
    assert outcome.checkpoint is not None
    return checkpoint.read(Path(outcome.checkpoint))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


def test_the_average_halves_over_its_half_life() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    ema = Ema(EmaSection(half_life_samples=100), {"w": weight})
    with torch.no_grad():
        weight.fill_(8.0)
    ema.update({"w": weight}, 100)
    assert torch.equal(ema.values["w"], torch.full((3,), 4.0))
    for _ in range(10):  # any way of cutting 100 samples into steps comes to the same
        ema.update({"w": weight}, 10)
    torch.testing.assert_close(ema.values["w"], torch.full((3,), 6.0))
    half = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    assert Ema(EmaSection(half_life_samples=1), {"w": half}).values["w"].dtype == torch.float32


def test_weights_come_back_even_from_an_error() -> None:
    weight = torch.nn.Parameter(torch.tensor([0.1, 0.2]))
    before = weight.detach().clone()

    def spoil() -> None:
        with restored({"w": weight}), torch.no_grad():
            weight.mul_(3)
            raise KeyError

    with pytest.raises(KeyError):
        spoil()
    assert torch.equal(weight, before)


@pytest.mark.slow
def test_an_average_changes_nothing_else_and_survives_a_stop(train_recipe: Recipe) -> None:
    plain = run(train_recipe(output="plain"))
    whole = run(train_recipe(output="whole"), *EMA)
    assert same(plain.trained, whole.trained)
    assert same(plain.optimizer, whole.optimizer)
    assert plain.more == {}
    assert whole.more["ema"].keys() == whole.trained.keys()
    assert not same(whole.more["ema"], whole.trained)

    path = train_recipe(output="whole")
    folder = RunFolder(path.parent / "whole")
    metrics = read_metrics(folder.metrics)
    again = run(path, *EMA, resume=str(folder.checkpoints / "8"))
    assert same(again.more["ema"], whole.more["ema"])
    assert same(again.trained, whole.trained)
    assert read_metrics(folder.metrics) == metrics

    lines = [line for line in metrics if line["kind"] == "validation"]
    sets = {(line["samples_seen"], line["set"]): line["mean"] for line in lines}
    assert len(sets) == 6
    assert sets[0, "validation"] == sets[0, "validation_ema"]
    assert sets[14, "validation"] != sets[14, "validation_ema"]
    probe_id = lines[0]["probe_id"]
    raw = LossMatrix.load(folder.validation / probe_id / "14.npz")
    average = LossMatrix.load(folder.validation / "ema" / probe_id / "14.npz")
    assert (raw.mean, average.mean) == (sets[14, "validation"], sets[14, "validation_ema"])
    assert find(folder.path)["validation"].path == folder.validation / probe_id / "14.npz"
    assert find(folder.validation / "ema")["validation"].load().mean == average.mean
    assert "Held-out images, EMA" in write_page(folder.path).read_text(encoding="utf-8")


def test_the_average_is_the_plain_recurrence(train_recipe: Recipe) -> None:
    recipe = load_train_recipe(train_recipe(), EMA)
    going = Run(open_setup(recipe), RunFolder(recipe.output))
    assert going.ema is not None
    expected = {path: p.detach().clone().double() for path, p in going.trained.items()}
    for _, parts in zip(range(3), trainer.steps(going), strict=False):
        trainer.take_step(going, parts)
        keep = 0.5 ** (4 / 10)
        for path, p in going.trained.items():
            expected[path] = keep * expected[path] + (1 - keep) * p.detach().double()
    for path, value in going.ema.values.items():
        torch.testing.assert_close(value.double(), expected[path], rtol=0, atol=1e-6)


def test_what_is_handed_over_is_the_average_if_asked(train_recipe: Recipe) -> None:
    from safetensors.torch import load_file

    snapshot = run(train_recipe(), *EMA, "ema.hand_over=true", *JUDGED[:2])
    model = train_recipe().parent / "run" / "model" / "unet"
    saved = load_file(next(model.glob("*.safetensors")))
    assert all(torch.equal(snapshot.more["ema"][f"unet.{name}"], saved[name]) for name in saved)


def test_schedule_free_saves_what_it_means_and_goes_on_exactly(train_recipe: Recipe) -> None:
    pytest.importorskip("schedulefree")
    free = ("optimizer.type=schedule_free", "schedule.type=constant")
    path = train_recipe()
    whole = run(path, *free)
    assert whole.more["training_point"].keys() == whole.trained.keys()
    assert not same(whole.more["training_point"], whole.trained)
    folder = RunFolder(path.parent / "run")
    metrics = read_metrics(folder.metrics)
    again = run(path, *free, resume=str(folder.checkpoints / "8"))
    assert same(again.trained, whole.trained)
    assert same(again.optimizer, whole.optimizer)
    assert same(again.more["training_point"], whole.more["training_point"])
    assert read_metrics(folder.metrics) == metrics
    unseen = run(train_recipe(output="unseen"), *free, "validation.images=0")
    assert same(unseen.trained, whole.trained)  # looking at it changes nothing


def test_what_does_not_go_together_is_refused(train_recipe: Recipe) -> None:
    free = ["optimizer.type=schedule_free"]
    for overrides, words in (
        (free, "schedule_free cannot go with schedule cosine"),
        ([*free, "schedule.type=constant", *EMA], "takes no ema: it averages by itself"),
        (["optimizer.type=prodigy", "train.lr_scaling=sqrt"], "takes no lr_scaling"),
        (["ema={}"], "ema.half_life_samples  missing"),
        (["ema.half_life_samples=0"], "must be > 0"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_train_recipe(train_recipe(), overrides)


def test_checkpoints_name_what_more_they_hold(train_recipe: Recipe) -> None:
    run(train_recipe(), *EMA)
    last = checkpoint.checkpoints(train_recipe().parent / "run" / "checkpoints")[-1]
    assert json.loads((last / "state.json").read_text(encoding="utf-8"))["more"] == ["ema"]
    (last / "ema.safetensors").unlink()
    with pytest.raises(checkpoint.DataError, match=r"ema\.safetensors is missing"):
        checkpoint.read(last)
