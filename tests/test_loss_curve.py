"""The loss against noise level: the fit on made-up losses, and the command on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sdprep.errors import DataError
from sdtrain.loss_curve import SEED_STUDY, curve_of, loss_curve
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import open_setup

WANTED = (-2.0, 0.5, -0.04)


def made_up(noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels, ln SNR and losses of 12 images x 64 levels on a known curve."""
    u = np.tile((np.arange(64) + 0.5) / 64, (12, 1))
    logsnr = 6 - 12 * u
    own = noise * np.random.default_rng(2).standard_normal(u.shape)
    a, b, c = WANTED
    return u, logsnr, np.exp(a + b * logsnr + c * logsnr**2 + own)


def test_a_known_curve_is_found_again() -> None:
    curve = curve_of(*made_up(0.0))
    assert curve.coefficients == pytest.approx(WANTED)
    assert curve.explained is not None
    assert curve.explained > 0.99  # what is left is the slope within a bin
    noisy = curve_of(*made_up(0.5))
    assert noisy.coefficients == pytest.approx(WANTED, abs=0.1)
    assert noisy.explained is not None
    assert 0.3 < noisy.explained < curve.explained


def test_few_losses_do_not_explain_themselves() -> None:
    u = np.sort(np.random.default_rng(3).uniform(size=(3, 16)), axis=1)
    loss = np.exp(0.3 * np.random.default_rng(4).standard_normal(u.shape))  # whatever the level
    found = curve_of(u, 6 - 12 * u, loss)
    assert found.explained is not None
    assert found.explained < 0.5
    alone = np.arange(3)[:, None] / 4 + 0.1
    assert curve_of(alone, 6 - 12 * alone, loss[:, :1]).explained is None
    assert curve_of(u, 6 - 12 * u, np.ones_like(u)).explained is None


def test_what_has_no_logarithm_is_counted_and_left_out() -> None:
    u, logsnr, loss = made_up(0.0)
    logsnr[:, -1], loss[0, 0] = -np.inf, 0.0
    curve = curve_of(u, logsnr, loss)
    assert curve.num_left_out == 13
    assert curve.coefficients == pytest.approx(WANTED)
    with pytest.raises(DataError, match="fewer than three"):
        curve_of(u, np.full_like(logsnr, -np.inf), loss)


def test_bins_hold_every_loss_once() -> None:
    curve = curve_of(*made_up(0.1))
    bins = curve.bins(8)
    assert [each["from"] for each in bins] == [k / 8 for k in range(8)]
    assert np.mean([each["loss"] for each in bins]) == pytest.approx(curve.loss.mean())
    assert all(each["p10"] < each["loss"] < each["p90"] for each in bins)
    assert list(SEED_STUDY) == sorted(SEED_STUDY)


def test_a_run_stands_for_its_newest_checkpoint_and_a_model_is_refused(
    evaluated_run: Path, tmp_path: Path
) -> None:
    recipe = load_train_recipe(evaluated_run / "recipe.toml")
    found = loss_curve(recipe, evaluated_run, 2, 3, tmp_path / "curve.png")
    assert found["model"] == str(evaluated_run / "checkpoints" / "12")
    with pytest.raises(DataError, match="neither a checkpoint nor a run folder"):
        loss_curve(recipe, evaluated_run / "model", 2, 3, tmp_path / "curve.png")


@pytest.mark.slow
def test_the_command_draws_and_tells(train_recipe: Callable[..., Path], tmp_path: Path) -> None:
    to = tmp_path / "new folder" / "curve.png"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sdtrain.cli", "loss-curve", str(train_recipe()), "--json"),
            *("--to", str(to), "--images", "2", "--levels", "8"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads(to.with_suffix(".json").read_text())
    assert (found["images"], found["levels"]) == (2, 8)
    assert to.stat().st_size > 10_000
    # ln SNR of a bin lies between those of its ends.
    setup = open_setup(load_train_recipe(train_recipe()))
    import torch

    for each in found["bins"]:
        ends = setup.family.logsnr(torch.tensor([each["from"], min(each["to"], 0.999)]))
        assert ends[1] - 1e-4 <= each["log_snr"] <= ends[0] + 1e-4
