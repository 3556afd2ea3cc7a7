"""The picture of a learning-rate ramp: both sets, their bands, and the bounds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdtrain.lr_bounds import Bounds, Ramp, smoothed
from sdtrain.page_figures import COLOURS, DIM, INK, NAMES, styled_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAND_SIGMAS = 1.28  # 80 %
_SPANS = {
    "start": ("learning starts", "#1a7f37"),
    "best": ("best", "#0b6bcb"),
    "rise": ("held-out rises", "#9a6700"),
    "divergence": ("breaks", "#cf222e"),
}


def draw(ramp: Ramp, bounds: Bounds, path: Path) -> None:
    """Write a PNG: change of the loss in percent against the rate."""
    with styled_axes(path, size_inches=(9.0, 5.2)) as (axes,):
        for name, losses in (("validation", ramp.validation), ("train_probe", ramp.train)):
            _curve(axes, ramp.lr, losses, name)
        axes.axhline(0, color=DIM, lw=1, ls=(0, (4, 3)))
        axes.set_xscale("log")
        axes.set_xlabel("learning rate of the last step")
        axes.set_ylabel("change of the loss since the start, %")
        axes.set_ylim(*_limits(ramp))
        axes.legend(loc="lower left")
        mark(axes, bounds, float(ramp.lr[-1]))


def mark(axes: Axes, bounds: Bounds, last: float) -> None:
    """Draw the bounds with their intervals; words at one rate stand in one line."""
    words_at: dict[float, list[str]] = {}
    for name, (words, colour) in _SPANS.items():
        bound = getattr(bounds, name)
        if bound is not None:
            high = bound.high if math.isfinite(bound.high) else last
            axes.axvspan(bound.low, high, color=colour, alpha=0.12, lw=0)
            axes.axvline(bound.value, color=colour, lw=1.4)
            words_at.setdefault(bound.value, []).append(words)
    colours = dict(_SPANS.values())
    for value, names in words_at.items():
        axes.annotate(
            ", ".join(names),
            (value, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -4),
            textcoords="offset points",
            rotation=90,
            va="top",
            fontsize=9,
            color=colours[names[-1]],
        )


def _curve(axes: Axes, lr: np.ndarray, losses: np.ndarray, name: str) -> None:
    change = 100 * (losses - losses[0]) / losses[0].mean()  # (K + 1, n)
    middle = smoothed(change.mean(1))[1:]
    error = change.std(1, ddof=1)[1:] / math.sqrt(change.shape[1]) if change.shape[1] > 1 else 0.0
    colour = COLOURS.get(name, INK)
    half = _BAND_SIGMAS * np.asarray(error)
    axes.fill_between(lr, middle - half, middle + half, color=colour, alpha=0.2, lw=0)
    axes.plot(lr, middle, color=colour, lw=1.8, marker="o", ms=3, label=NAMES.get(name, name))


def _limits(ramp: Ramp) -> tuple[float, float]:
    """A blown-up end must not flatten the descent, which is what the picture is for."""
    changes = [
        100 * smoothed((each - each[0]).mean(1)) / each[0].mean()
        for each in (ramp.validation, ramp.train)
    ]
    low = min(float(each.min()) for each in changes)
    high = max(float(each[np.isfinite(each)].max()) for each in changes)
    depth = max(-low, 0.1)
    return low - 0.25 * depth, min(max(high, 0.0), 1.5 * depth) + 0.25 * depth
