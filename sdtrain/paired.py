"""Paired comparison of two loss matrices on the same points, with two intervals.

"This set" asks: on these very images, did the loss change? "New images" asks: would it have
changed on other images of the same kind? The first is far narrower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LEVEL = 0.95


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


def compare(a: np.ndarray, b: np.ndarray) -> Comparison:
    """Compare two matrices of the same probe.

    Args:
        a: (n, m) weighted losses, float.
        b: the same points later, or of another model.

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
    difference = (b - a) * scale
    change = float(difference.mean())
    error, freedom = _this_set(difference)
    new_error = float(difference.mean(1).std(ddof=1) / np.sqrt(n)) if n > 1 else None
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


def _this_set(difference: np.ndarray) -> tuple[float | None, float]:
    """Standard error on these images and its degrees of freedom.

    With three levels or more from the differences of neighbouring levels, which forgives a trend
    over noise levels; with two from the residual of images and levels.
    """
    n, m = difference.shape
    if n < 2 or m < 2:
        return None, 0
    if m == 2:
        residual = difference - difference.mean(1, keepdims=True) - difference.mean(0)
        residual += difference.mean()
        error = np.sqrt((residual**2).sum() / ((n - 1) * (m - 1))) / np.sqrt(n * m)
        return float(error), (n - 1) * (m - 1)
    steps = np.diff(difference, axis=1)  # (n, m - 1)
    squares = ((steps - steps.mean(0)) ** 2).sum()
    error = np.sqrt(squares / (2 * (n - 1) * (m - 1) * n * m))
    return float(error), 2 / 3 * (n - 1) * (m - 1)


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
