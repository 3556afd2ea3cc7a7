"""The learning-rate finder: bounds on constructed ramps, and a short real one."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdprep.errors import UserError
from sdtrain import lr_figure, lr_find
from sdtrain.lr_bounds import (
    SAFE_SHARE,
    Bound,
    Bounds,
    Ramp,
    advised_lr,
    find_bounds,
    refusals,
    smoothed,
)
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import open_setup
from tests.train_data import prepared_row, write_prepared, write_recipe

LOOKS, IMAGES = 30, 24
LR = np.geomspace(1e-8, 1e-4, LOOKS)


def ramp(
    validation: Callable[[np.ndarray], np.ndarray],
    train: Callable[[np.ndarray], np.ndarray],
    *,
    noise: float = 2e-4,
    images: int = IMAGES,
) -> Ramp:
    """Losses about 1 of images that differ, each moved by the same curve of log10 lr, and noise."""
    rng = np.random.default_rng(5)
    base = rng.uniform(0.8, 1.2, images)

    def losses(curve: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        moved = np.concatenate([[0.0], curve(np.log10(LR))])
        own = 1 + 0.1 * rng.standard_normal(images)  # images follow the curve more or less
        return base + moved[:, None] * own + noise * rng.standard_normal((LOOKS + 1, images))

    return Ramp(LR, np.cumsum(LR) * 2, losses(validation), losses(train))


def valley(bottom: float, depth: float, width: float) -> Callable[[np.ndarray], np.ndarray]:
    """Falls to `-depth` at log10 lr = bottom and rises again."""
    return lambda x: -depth * np.exp(-(((x - bottom) / width) ** 2))


def falling(until: float, depth: float) -> Callable[[np.ndarray], np.ndarray]:
    """Falls ever on, and breaks beyond log10 lr = until."""
    return lambda x: -depth * (x + 8) / 4 + np.where(x > until, 3 * (x - until), 0.0)


def test_effort_runs_out_while_training_images_still_get_better() -> None:
    found = find_bounds(ramp(valley(-6.5, 0.02, 0.6), falling(-4.6, 0.05)), 1)
    assert found.limit == "effort"
    assert found.best.value == pytest.approx(10**-6.5, rel=0.4)
    assert found.effort.value == pytest.approx(
        2 * LR[LR / found.best.value <= 1.01].sum(), rel=0.01
    )
    assert found.divergence is not None
    assert 10**-4.7 < found.divergence.value < 10**-4.2
    assert refusals(found, IMAGES, IMAGES) == []
    lr, most = advised_lr(found, num_steps=100_000, batch_size=4)
    assert most == pytest.approx(SAFE_SHARE * found.divergence.value)
    assert lr == pytest.approx(found.effort.value / (100_000 * 2))
    plenty = replace(found, effort=Bound(100.0, 100.0, 100.0))
    assert advised_lr(plenty, num_steps=100_000, batch_size=4)[0] == most


def test_a_rate_that_is_too_high_breaks_both_sets() -> None:
    both = falling(-5.0, 0.05)
    found = find_bounds(ramp(both, both), 1)
    assert found.limit == "rate"
    assert found.rise is not None
    assert found.divergence is not None
    assert found.rise.value == pytest.approx(found.divergence.value, rel=0.5)
    lr, most = advised_lr(found, num_steps=10**9, batch_size=1)
    assert lr == most


def test_learning_starts_where_a_tenth_of_the_drop_is_made() -> None:
    line = lambda x: -0.04 * (x + 8) / 4  # noqa: E731  a tenth of it at log10 lr = -7.6
    found = find_bounds(ramp(line, falling(-4.6, 0.05), noise=1e-5), 1)
    assert found.start is not None
    assert np.log10(found.start.value) == pytest.approx(-7.6, abs=0.05)
    # Tests of significance would have fired at the very first look.
    assert found.start.value > 2 * LR[0]


@pytest.mark.parametrize(
    ("validation", "train", "images", "words"),
    [
        (lambda x: 0.0 * x, falling(-4.6, 0.05), IMAGES, "no descent"),
        (valley(-6.5, 0.02, 0.6), lambda x: -0.01 * (x + 8), IMAGES, "raise --upto"),
        (valley(-6.5, 0.02, 0.6), falling(-4.6, 0.05), 7, "8 are needed"),
    ],
)
def test_refuses_when_the_data_cannot_say(
    validation: Any, train: Any, images: int, words: str
) -> None:
    found = find_bounds(ramp(validation, train, images=images), 1)
    assert words in "; ".join(refusals(found, images, images))


def test_refuses_a_bound_that_images_do_not_fix() -> None:
    few = 12
    clear = ramp(valley(-6.5, 0.02, 0.6), falling(-4.6, 0.05), images=few)
    breaks_at, strength = np.linspace(-7.5, -5.5, few), np.geomspace(0.01, 1, few)  # each its own
    train = np.ones((LOOKS + 1, few))
    train[1:] += np.maximum(0, np.log10(LR)[:, None] - breaks_at) * strength
    train[1:] -= 0.001 * np.arange(LOOKS)[:, None]
    found = find_bounds(Ramp(clear.lr, clear.effort, clear.validation, train), 1)
    assert found.divergence is not None
    assert not found.divergence.is_sharp
    assert "divergence is known only between" in "; ".join(refusals(found, few, few))


def test_a_run_that_broke_is_as_good_as_one_that_diverged() -> None:
    whole = ramp(valley(-6.5, 0.02, 0.6), lambda x: -0.01 * (x + 8))
    broken = Ramp(whole.lr, whole.effort, whole.validation, whole.train, broke_at=2e-4)
    found = find_bounds(broken, 1)
    assert found.divergence is not None
    assert found.divergence.value == 2e-4
    assert not refusals(found, IMAGES, IMAGES)


def test_bounds_are_the_same_every_time_and_json_holds_them() -> None:
    measured = ramp(valley(-6.5, 0.02, 0.6), falling(-4.6, 0.05))
    assert find_bounds(measured, 1) == find_bounds(measured, 1)
    json.dumps(find_bounds(measured, 1).to_json(), allow_nan=False)


def test_smoothing_takes_out_one_spike_and_keeps_the_ends() -> None:
    assert smoothed(np.array([0.0, 9.0, 1.0, 2.0, 3.0])).tolist() == [0.0, 1.0, 2.0, 2.0, 3.0]
    assert smoothed(np.array([1.0, 2.0])).tolist() == [1.0, 2.0]


@pytest.fixture(scope="module")
def small_recipe(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]
) -> Path:
    """Eight images in each split."""
    folder = tmp_path_factory.mktemp("lr find")
    rows = [prepared_row(number, size=(96, 96), caption=f"a dog {number}") for number in range(16)]
    data = write_prepared(folder / "data", rows[:8], rows[8:])
    return write_recipe(
        folder / "recipe.toml",
        model=tiny_model("sd15"),
        data=data,
        output=folder / "run",
        family="sd15",
    )


SHORT = (
    *("data.micro_batch_size=8", "data.batch_size=8", "validation.images=8"),
    *("validation.train_probe_images=8", "validation.timesteps_per_image=1"),
)


@pytest.mark.slow
def test_a_real_ramp_writes_curves_numbers_and_recipes(small_recipe: Path) -> None:
    recipe = load_train_recipe(small_recipe, SHORT)
    found = lr_find.find_lr(recipe, start=1e-4, end=10.0, steps=20, to=None)
    folder = Path(found["path"])
    assert folder == recipe.output.with_name("run-lr-find")
    assert not recipe.output.exists()
    assert (folder / "lr-find.png").stat().st_size > 10_000
    assert not (folder / "checkpoints").exists()  # the weights are thrown away
    assert not (folder / "model").exists()
    bounds = Bounds(**found["bounds"])
    assert bounds.drop_t < -2
    rates = [line["lr"]["unet.**"] for line in lr_find._lines(lr_find.RunFolder(folder), "train")]
    growth = np.diff(np.log(rates))
    assert rates[0] == pytest.approx(1e-4)
    assert growth == pytest.approx(np.full(len(growth), np.log(1e5) / 20))
    advice = found["advice"]["recipes"]
    assert list(advice) == ["constant", "cyclical"]
    for name in advice:
        written = load_train_recipe(advice[name]["path"])
        assert written.schedule.type == name
        assert written.train.rules[0].lr == pytest.approx(advice[name]["lr"], 1e-2)
        assert written.train.samples == recipe.train.samples
        assert written.output == recipe.output
        tomllib.loads(advice[name]["fragment"])
    before = (folder / "metrics.jsonl").read_bytes()
    again = lr_find.find_lr(recipe, start=1e-4, end=10.0, steps=20, to=None)
    assert again == found
    assert (folder / "metrics.jsonl").read_bytes() == before  # nothing was trained again
    assert "training breaks at" in lr_find.report(found)


def test_bounds_at_one_rate_share_a_label() -> None:
    from matplotlib.figure import Figure

    low, high = Bound(1e-6, 1e-6, 2e-6), Bound(1e-4, 1e-4, float("inf"))
    bounds = Bounds(-1.0, -5.0, low, high, high, high, "rate", high)
    axes = Figure().subplots()
    lr_figure.mark(axes, bounds, 1e-3)
    labels = {text.get_text(): text.xy[0] for text in axes.texts}
    assert labels == {"learning starts": 1e-6, "best, held-out rises, breaks": 1e-4}


AVERAGING = ('optimizer={type="schedule_free"}', 'schedule={type="constant"}')


def test_what_cannot_be_found_is_said_before_anything_is_trained(small_recipe: Path) -> None:
    to = small_recipe.parent / "never"
    for settings, words in (
        ((*SHORT, "validation.images=5"), "the set validation has 5 images, 8 are needed"),
        ((*SHORT, "validation.train_probe_images=0"), "the set train_probe has 0 images"),
        ((*SHORT, 'optimizer={type="prodigy"}'), "finds its learning rates itself"),
        ((*SHORT, *AVERAGING), "schedule_free' cannot go with a rate that grows"),
    ):
        with pytest.raises(UserError, match=words):
            lr_find.find_lr(
                load_train_recipe(small_recipe, settings), start=1e-4, end=1.0, steps=20, to=to
            )
    short = load_train_recipe(small_recipe, SHORT)
    with pytest.raises(UserError, match="goes from 0 to"):  # not the default
        lr_find.find_lr(short, start=0.0, end=1.0, steps=20, to=to)
    with pytest.raises(UserError, match=r"to 1e\+39"):  # no step could be taken there
        lr_find.find_lr(short, start=None, end=1e39, steps=20, to=to)
    assert not to.exists()


def test_a_ramp_has_its_own_length_and_no_early_stop(small_recipe: Path) -> None:
    kept = ("train.samples=64", "train.schedule_samples=6400", "validation.stop={patience=1}")
    recipe = load_train_recipe(small_recipe, (*SHORT, *kept))
    trial = lr_find.ramp_recipe(recipe, lr_find.Range(1e-5, 1.0, 20), 1e-3, Path("x"))
    assert trial.train.samples == 160
    assert trial.train.schedule_samples is None
    assert trial.validation.stop is None


def test_all_parts_train_throughout_a_ramp(
    small_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its few steps would end before the second phase begins."""
    sets = (
        'train.phases=[{samples=400,parts=["unet"]},{samples=400,parts=["text_encoder"]}]',
        "train.repeat_phases=true",
        'train.rules=[{match="unet.**",lr=1e-3},{match="text_encoder.**",lr=5e-4}]',
    )
    recipe = load_train_recipe(small_recipe, (*SHORT, *sets, "train.samples=1600"))
    trial = lr_find.ramp_recipe(recipe, lr_find.Range(1e-5, 1.0, 20), 1e-3, Path("x"))
    assert not trial.train.phases
    assert not trial.train.repeat_phases
    assert open_setup(trial).phases is None
    with pytest.raises(UserError, match="the ramp goes from 1 to 2"):
        lr_find.find_lr(recipe, start=1.0, end=2.0, steps=20, to=None)
    assert "the ramp has no [[train.phases]]" in capsys.readouterr().err


@pytest.mark.slow
def test_refusal_is_exit_status_2_with_the_plot_kept(small_recipe: Path) -> None:
    output = small_recipe.parent / "refused"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sdtrain.cli", "lr-find", str(small_recipe), "--json"),
            *("--from", "1e-9", "--upto", "1e-7", "--steps", "20", "--to", str(output)),
            *(part for each in SHORT for part in ("--set", each)),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "no learning rate can be advised" in done.stderr
    assert "raise --upto" in done.stderr
    assert (output / "lr-find.png").is_file()
    assert json.loads((output / "lr-find.json").read_text())["advice"] is None


@pytest.mark.slow
def test_a_narrow_ramp_and_missing_held_out_images_are_refused(small_recipe: Path) -> None:
    recipe = load_train_recipe(small_recipe, SHORT)
    with pytest.raises(UserError, match="factor of 10 apart|goes from"):
        lr_find.find_lr(recipe, start=1e-4, end=2e-4, steps=20, to=None)
    blind = load_train_recipe(small_recipe, (*SHORT, "validation.images=0"))
    with pytest.raises(UserError, match="the set validation has 0 images, 8 are needed"):
        lr_find.find_lr(blind, start=1e-4, end=1e-2, steps=20, to=small_recipe.parent / "blind")
    assert not (small_recipe.parent / "blind").exists()
