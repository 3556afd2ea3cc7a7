"""The loss against noise level: the curve that explains most of why a training curve is noisy.

Measured with the noise and the evenly spread levels of StableEval, on images that are not trained
on if there are any, and fitted as log L = a + b·s + c·s² over s = ln SNR.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sdprep.errors import DataError
from sdtrain.debias import PRIOR, features
from sdtrain.outputs import require_file
from sdtrain.probe_sets import plain_probe
from sdtrain.recipe import TrainRecipe
from sdtrain.sampling import checkpoint_folder
from sdtrain.setup import Setup, open_setup
from sdtrain.stable_eval import ProbeSet
from sdtrain.wording import amount

ENDINGS = (".png", ".svg", ".pdf")

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEED_STUDY = {0.0: 0.873, 0.1: 0.356, 0.25: 0.188, 0.5: 0.068, 0.75: 0.0165, 0.999: 0.0024}
"""Mean loss of SD 1.5 at u, epsilon objective (spec, section 15)."""

SEED_STUDY_EXPLAINED = (0.943, 0.976)
"""Share of the variance of single losses that the noise level explained there."""

_NUM_BINS = 32


@dataclass(frozen=True)
class Curve:
    """Losses of images at noise levels, and the fit through them.

    Args:
        u: (n, m) noise levels.
        logsnr: (n, m) ln SNR of them.
        loss: (n, m) unweighted losses.
        coefficients: a, b, c of the fit.
        explained: share of the variance of single losses that the noise level explains; None where
            too few lie in one bin of levels to say.
        num_left_out: losses at an infinite ln SNR, or of no height; the fit cannot use them.
    """

    u: np.ndarray
    logsnr: np.ndarray
    loss: np.ndarray
    coefficients: tuple[float, float, float]
    explained: float | None
    num_left_out: int

    def bins(self, count: int = _NUM_BINS) -> list[dict[str, float]]:
        """Mean and quantiles of the loss in equal bins of u that hold any."""
        which = np.minimum((self.u * count).astype(int), count - 1)
        found = []
        for k in range(count):
            inside = self.loss[which == k]
            if inside.size:
                low, high = np.quantile(inside, [0.1, 0.9])
                middle = float(self.logsnr[which == k].mean())
                found.append(
                    {
                        "from": k / count,
                        "to": (k + 1) / count,
                        "log_snr": middle,
                        "loss": float(inside.mean()),
                        "p10": float(low),
                        "p90": float(high),
                    }
                )
        return found


def curve_of(u: np.ndarray, logsnr: np.ndarray, loss: np.ndarray) -> Curve:
    """Fit single losses.

    Args:
        u: (n, m) noise levels.
        logsnr: (n, m) ln SNR, infinite where nothing of the picture is left.
        loss: (n, m) unweighted losses.

    Raises:
        DataError: fewer than three losses can be used.
    """
    usable = np.isfinite(logsnr) & (loss > 0)
    if usable.sum() < 3:
        raise DataError("fewer than three losses are above zero, so there is no curve to fit")
    levels, values = features(logsnr[usable]), np.log(loss[usable].astype(np.float64))
    a, b, c = np.linalg.lstsq(levels, values, rcond=None)[0]
    return Curve(
        u=u,
        logsnr=logsnr,
        loss=loss,
        coefficients=(float(a), float(b), float(c)),
        explained=_explained(u, loss),
        num_left_out=int((~usable).sum()),
    )


def _explained(u: np.ndarray, loss: np.ndarray) -> float | None:
    """One less the share of the variance that is left within bins of the noise level.

    Both variances are over their degrees of freedom: a bin with one loss in it has nothing left,
    whatever the noise level does.
    """
    which = np.minimum((u * _NUM_BINS).astype(int), _NUM_BINS - 1)
    inside = [loss[which == k] for k in np.unique(which)]
    freedom = loss.size - len(inside)
    total = float(loss.var(ddof=1)) if freedom else 0.0
    if not total:
        return None
    left = sum(float(((part - part.mean()) ** 2).sum()) for part in inside) / freedom
    return max(0.0, 1 - left / total)


def measure(
    recipe: TrainRecipe, checkpoint: Path | None, num_images: int, num_levels: int
) -> Curve:
    """Measure the base model, or a checkpoint of the recipe.

    Args:
        recipe: its data and model.
        checkpoint: `RUN/checkpoints/SAMPLES`; None: the base model.
        num_images: of the validation split, or of the training split if there is none.
        num_levels: noise levels per image, spread evenly.
    """
    from sdtrain.validate import checked_state, loaded, must_fit

    state = None if checkpoint is None else checked_state(checkpoint)
    setup = open_setup(recipe)
    if checkpoint is not None and state is not None:
        must_fit(checkpoint, state, setup)
    with nullcontext() if checkpoint is None else loaded(setup, checkpoint):
        return _measured(setup, num_images, num_levels)


def _measured(setup: Setup, num_images: int, num_levels: int) -> Curve:
    rows, assignment, name = setup.data.validation, setup.validation, "validation"
    if rows is None or assignment is None or not len(assignment.kept):
        rows, assignment, name = setup.data.train, setup.train, "train_probe"
    probe = plain_probe(
        name,
        setup.family,
        rows,
        assignment,
        setup.data.policy,
        seed=setup.evaluation_seed,
        num_images=num_images,
        num_levels=num_levels,
    )
    size = setup.recipe.data.micro_batch_size
    matrix = ProbeSet(setup.family, rows, probe, size, setup.device).evaluate()
    logsnr = setup.family.logsnr(torch.from_numpy(matrix.u.reshape(-1)))
    return curve_of(matrix.u, logsnr.double().numpy().reshape(matrix.u.shape), matrix.loss)


def loss_curve(
    recipe: TrainRecipe, checkpoint: Path | None, num_images: int, num_levels: int, to: Path
) -> dict[str, Any]:
    """Measure, draw, and write the numbers beside the picture; what `--json` prints.

    Raises:
        UserError: `to` is no picture's name, or cannot be written.
        DataError: `checkpoint` is neither a checkpoint of a run nor a run with one.
    """
    require_file(to, ENDINGS)
    checkpoint = None if checkpoint is None else checkpoint_folder(checkpoint)
    curve = measure(recipe, checkpoint, num_images, num_levels)
    to.parent.mkdir(parents=True, exist_ok=True)
    draw(curve, to)
    found = {
        "path": str(to),
        "model": str(checkpoint or recipe.model.path),
        "images": curve.loss.shape[0],
        "levels": curve.loss.shape[1],
        "mean": float(curve.loss.mean()),
        "fit": dict(zip("abc", curve.coefficients, strict=True)),
        "explained_by_noise_level": curve.explained,
        "left_out_of_the_fit": curve.num_left_out,
        "bins": curve.bins(),
        "seed_study": {
            "fit": dict(zip("abc", PRIOR, strict=True)),
            "explained_by_noise_level": SEED_STUDY_EXPLAINED,
            "loss_at_u": SEED_STUDY,
        },
    }
    numbers = to.with_suffix(".json")
    numbers.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def draw(curve: Curve, path: Path) -> None:
    """Write a PNG: loss against u, and against ln SNR with the fit."""
    from sdtrain.page_figures import styled_axes

    with styled_axes(path, size_inches=(11.0, 4.4), columns=2) as axes:
        left, right = axes
        bins = curve.bins()
        _band(left, [(b["from"] + b["to"]) / 2 for b in bins], bins)
        left.plot(
            *zip(*SEED_STUDY.items(), strict=True), "x", color="#6e7781", label="SD 1.5, epsilon"
        )
        left.set_xlabel("noise level u (0: clean picture, 1: pure noise)")
        finite = [each for each in bins if np.isfinite(each["log_snr"])]
        levels = np.array([each["log_snr"] for each in finite])
        _band(right, levels.tolist(), finite)
        smooth = np.linspace(levels.min(), levels.max(), 200)
        for coefficients, colour, label in (
            (curve.coefficients, "#c2570c", "fit"),
            (PRIOR, "#6e7781", "fit of SD 1.5, epsilon"),
        ):
            fitted = np.exp(features(smooth) @ np.array(coefficients))
            right.plot(smooth, fitted, color=colour, lw=1.6, ls="--", label=label)
        right.set_xlabel("ln SNR (left: noise, right: clean)")
        for each in axes:
            each.set_yscale("log")
            each.set_ylabel("mean squared error")
            each.legend(loc="best")


def _band(axes: Axes, at: Sequence[float], bins: Sequence[dict[str, float]]) -> None:
    low, high = [each["p10"] for each in bins], [each["p90"] for each in bins]
    axes.fill_between(at, low, high, color="#0b6bcb", alpha=0.2, lw=0, label="80 % of images")
    axes.plot(at, [each["loss"] for each in bins], color="#0b6bcb", lw=1.8, label="mean")


def report(found: dict[str, Any]) -> str:
    """What `sdtrain loss-curve` prints."""
    fit, study = found["fit"], found["seed_study"]
    low, high = study["explained_by_noise_level"]
    lines = [
        f"{found['model']}: {amount(found['images'], 'image')} x {found['levels']} noise levels, "
        f"mean loss {found['mean']:.6f}",
        "log loss = a + b s + c s², s = ln SNR",
        f"  here    a {fit['a']:+.5f}  b {fit['b']:+.5f}  c {fit['c']:+.5f}",
        "  SD 1.5  " + "  ".join(f"{k} {v:+.5f}" for k, v in study["fit"].items()),
        f"the noise level explains {_share(found['explained_by_noise_level'])} of the variance "
        f"of single losses (SD 1.5: {100 * low:.1f} to {100 * high:.1f} %)",
    ]
    if found["left_out_of_the_fit"]:
        lines.append(f"{found['left_out_of_the_fit']} losses at no signal at all are not fitted")
    return "\n".join([*lines, f"picture: {found['path']}"])


def _share(explained: float | None) -> str:
    return "an unknown share (too few losses)" if explained is None else f"{100 * explained:.1f} %"
