"""Paired comparison of two loss matrices on the same points, with two intervals.

"This set" asks: on these very images, did the loss change? "New images" asks: would it have
changed on other images of the same kind? The first is far narrower.

What is printed is a ratio, the change in percent, so both intervals are those of a ratio: from how
each point departs from b = (1 + change) * a, which to first order is all that moves the ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LEVEL = 0.95
FEWEST_FOR_SLOPES = 5
"""Images from which on a slope within each part of the noise levels is estimated, too."""


@dataclass(frozen=True)
class Comparison:
    """How b differs from a; all in % of the mean of a.

    Args:
        mean_a: mean loss of a.
        mean_b: mean loss of b.
        change_percent: (mean_b - mean_a) / mean_a.
        ci95_percent: interval on this set; None with one image or one level.
        ci95_new_images_percent: interval for new images; None with one image.
        resolves_percent: two standard errors on this set.
        resolves_new_images_percent: two standard errors for new images.
        p_value: of no change on this set, two-sided; None where there is no interval.
        p_value_new_images: of no change on new images, two-sided.
        num_images: n.
        num_levels: m.
    """

    mean_a: float
    mean_b: float
    change_percent: float
    ci95_percent: tuple[float, float] | None
    ci95_new_images_percent: tuple[float, float] | None
    resolves_percent: float | None
    resolves_new_images_percent: float | None
    p_value: float | None
    p_value_new_images: float | None
    num_images: int
    num_levels: int

    @property
    def direction(self) -> int:
        """-1 if the loss fell, 1 if it rose, 0 if this set cannot tell."""
        return side(self.ci95_percent)

    @property
    def direction_new_images(self) -> int:
        """The same for new images of this kind."""
        return side(self.ci95_new_images_percent)

    def images_needed(self, difference_percent: float) -> int | None:
        """Images of this kind that show a difference at two standard errors, new images."""
        if self.ci95_new_images_percent is None or difference_percent <= 0:
            return None
        low, high = self.ci95_new_images_percent
        deviation = (high - low) / 2 / _t(self.num_images - 1) * np.sqrt(self.num_images)
        return int(np.ceil((2 * deviation / difference_percent) ** 2))


def side(interval: Sequence[float] | None) -> int:
    """-1 if an interval lies below 0, 1 if above, 0 if it holds 0 or there is none."""
    if interval is None:
        return 0
    return -1 if interval[1] < 0 else 1 if interval[0] > 0 else 0


def compare(a: np.ndarray, b: np.ndarray, u: np.ndarray | None = None) -> Comparison:
    """Compare two matrices of the same probe.

    Args:
        a: (n, m) weighted losses, float.
        b: the same points later, or of another model.
        u: (n, m) their noise levels. With them the interval on this set forgives slopes within
            the parts of the noise levels, which the lattice cancels in the mean.

    Raises:
        ValueError: shapes differ, or a value is not finite.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"matrices of one probe have one shape, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a loss is not finite")
    a, b = a.astype(np.float64), b.astype(np.float64)
    n, m = a.shape
    mean_a, mean_b = float(a.mean()), float(b.mean())
    scale = 100.0 / mean_a if mean_a else float("nan")
    change = float((b - a).mean() * scale)
    # Of the ratio b / a, to first order (the delta method); without a loss to divide by, nothing.
    departure = (b - a) * scale - change * (a / mean_a if mean_a else a)
    error, freedom = _this_set(departure, u)
    new_error = float(departure.mean(1).std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return Comparison(
        mean_a=mean_a,
        mean_b=mean_b,
        change_percent=change,
        ci95_percent=_interval(change, error, freedom),
        ci95_new_images_percent=_interval(change, new_error, n - 1),
        resolves_percent=None if error is None else 2 * error,
        resolves_new_images_percent=None if new_error is None else 2 * new_error,
        p_value=_p_value(change, error, freedom),
        p_value_new_images=_p_value(change, new_error, n - 1),
        num_images=n,
        num_levels=m,
    )


def _this_set(departure: np.ndarray, u: np.ndarray | None) -> tuple[float | None, float]:
    """Standard error on these images and its degrees of freedom.

    From the differences of neighbouring levels, in which what an image brings to all its levels
    falls out, as does what a level brings to all images; with `u` also a slope within each level.
    """
    n, m = departure.shape
    if n < 2 or m < 2:
        return None, 0
    steps = np.diff(departure, axis=1)  # (n, m - 1)
    steps = steps - steps.mean(0)
    left = n - 1
    if u is not None and n >= FEWEST_FOR_SLOPES:
        steps, left = _without_slopes(steps, u), n - 2
    squares = float((steps**2).sum())
    error = np.sqrt(squares / (2 * left * (m - 1) * n * m))
    # Neighbouring differences share a level, so of many columns two thirds count.
    return float(error), left * (m - 1) * (1 if m == 2 else 2 / 3)


def _without_slopes(steps: np.ndarray, u: np.ndarray) -> np.ndarray:
    """(n, m - 1) centred columns less their regression on the place within the level.

    The place of an image in one level is the reverse of its place in the next, so one slope a
    column takes both.
    """
    place = u[:, :-1].argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
    place = place - place.mean(0)
    slopes = (place * steps).sum(0) / (place**2).sum(0)
    without: np.ndarray = steps - slopes * place
    return without


def _interval(center: float, error: float | None, freedom: float) -> tuple[float, float] | None:
    if error is None:
        return None
    half = _t(freedom) * error
    return center - half, center + half


def _p_value(center: float, error: float | None, freedom: float) -> float | None:
    from scipy.stats import t

    if error is None:
        return None
    if error == 0:
        return 1.0 if center == 0 else 0.0
    return float(2 * t.sf(abs(center) / error, freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for being many: each look at one data set is one more chance to be fooled.

    Args:
        p_values: one per comparison.

    Returns:
        adjusted ones in the same order; reject where they are at most 0.05.
    """
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = largest
    return adjusted


def _t(freedom: float) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + _LEVEL) / 2, freedom))
