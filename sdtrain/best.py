"""Which evaluation of a run is the best, and which others cannot be told from it.

The lowest of many noisy means is lower than it deserves. The bootstrap over images compares all
evaluations with each other at once, so being the lowest of many is allowed for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sdprep.seeding import rng_for

ALPHA = 0.05
RESAMPLES = 2000
FEWEST_IMAGES = 3
"""Fewer say nothing about how images differ."""

MOST_LOOKS = 40
"""Evaluations that are compared at once; of more, these many, evenly spread."""


@dataclass(frozen=True)
class Best:
    """The evaluation with the lowest mean loss.

    Args:
        samples_seen: its clock.
        mean: its loss.
        change_percent: since the first evaluation.
        ties: clocks of the evaluations that cannot be told from it, itself among them.
        p_values: clock to the chance that images alone make it look that much worse than the best,
            corrected for all the comparisons that there were; None with one or two images.
    """

    samples_seen: int
    mean: float
    change_percent: float
    ties: tuple[int, ...]
    p_values: Mapping[int, float] | None


def find_best(history: Mapping[int, np.ndarray]) -> Best:
    """Find the best evaluation, by the max-t bootstrap over images.

    Args:
        history: clock to (n, m) weighted losses, all of one probe; at least one.

    Returns:
        the earliest evaluation of the lowest mean, and all that may be as good.
    """
    clocks = sorted(history)
    means = {clock: float(history[clock].mean()) for clock in clocks}
    lowest = min(clocks, key=lambda clock: (means[clock], clock))
    p_values = _p_values(history, _spread(clocks, lowest), lowest)
    ties = clocks if p_values is None else [k for k, p in p_values.items() if p > ALPHA]
    start = means[clocks[0]]
    return Best(
        samples_seen=lowest,
        mean=means[lowest],
        change_percent=100 * (means[lowest] / start - 1) if start else 0.0,
        ties=tuple(sorted({*ties, lowest})),
        p_values=p_values,
    )


def _spread(clocks: list[int], lowest: int) -> list[int]:
    """At most `MOST_LOOKS` clocks with the first, the last and the lowest among them."""
    if len(clocks) <= MOST_LOOKS:
        return clocks
    places = np.linspace(0, len(clocks) - 1, MOST_LOOKS - 1).round().astype(int)
    return sorted({lowest, *(clocks[at] for at in places)})


def _p_values(
    history: Mapping[int, np.ndarray], clocks: list[int], lowest: int
) -> dict[int, float] | None:
    """How often the largest difference of any two evaluations exceeds each one's from the best."""
    by_image = np.stack([history[clock].mean(1) for clock in clocks])  # (k, n)
    num_looks, n = by_image.shape
    if n < FEWEST_IMAGES:
        return None
    pairs = by_image[:, None] - by_image[None]  # (k, k, n)
    errors = pairs.std(2, ddof=1) / np.sqrt(n)
    errors = np.where(errors > 0, errors, np.inf)  # equal evaluations differ by nothing
    # Resampled images vary (n - 1) / n times as much as images do.
    centred = (by_image - by_image.mean(1, keepdims=True)) * np.sqrt(n / (n - 1))
    drawn = rng_for("max-t", n, num_looks).integers(n, size=(RESAMPLES, n))
    largest = np.array([np.abs(_t_values(centred[:, row].mean(1), errors)).max() for row in drawn])
    best = clocks.index(lowest)
    observed = _as_normal(_t_values(by_image.mean(1), errors)[:, best], n - 1)
    counts = (largest[None] >= observed[:, None] - 1e-12).sum(1)
    p_values = (counts + 1) / (RESAMPLES + 1)
    return {clock: float(p) for clock, p in zip(clocks, p_values, strict=True)}


def _t_values(means: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """(k, k): how many standard errors each evaluation lies above each other one."""
    values: np.ndarray = (means[:, None] - means[None]) / errors
    return values


def _as_normal(t_values: np.ndarray, freedom: int) -> np.ndarray:
    """Normal values as rare as these t values: with few images a large t is nothing rare."""
    from scipy.stats import norm, t

    values: np.ndarray = np.minimum(norm.isf(t.sf(t_values, freedom)), 1e6)
    return values
