"""Paired comparison of two loss matrices on the same points, with two intervals.

"This set" asks: on these very images, did the loss change? "New images" asks: would it have
changed on other images of the same kind? The first is far narrower.

What is printed is a ratio, the change in percent, so both intervals are those of a ratio
(Fieller's): they hold every change c for which the mean of b - (1 + c) a is nothing that chance
could not make. That of no change, c = 0, is the plain paired t test of the differences.
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
        resolves_percent: two standard errors of no change on this set: what would be seen; None
            also where every loss is the same.
        resolves_new_images_percent: the same for new images.
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
    def is_same(self) -> bool:
        """Whether not one loss differs."""
        return self.ci95_percent == (0.0, 0.0)

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
        resolves = self.resolves_new_images_percent
        if resolves is None or difference_percent <= 0:
            return None
        return int(np.ceil(self.num_images * (resolves / difference_percent) ** 2))


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
    change = float((b - a).mean()) / mean_a if mean_a else float("nan")
    here, new = _on_this_set(a, b, u), _on_new_images(a, b)
    return Comparison(
        mean_a=mean_a,
        mean_b=mean_b,
        change_percent=100 * change,
        ci95_percent=here.interval() if here else None,
        ci95_new_images_percent=new.interval() if new else None,
        resolves_percent=here.resolves_percent if here else None,
        resolves_new_images_percent=new.resolves_percent if new else None,
        p_value=here.p_value() if here else None,
        p_value_new_images=new.p_value() if new else None,
        num_images=n,
        num_levels=m,
    )


@dataclass(frozen=True)
class _Ratio:
    """What is known of mean(d) / mean(a), d being the difference of two losses.

    Args:
        mean_d: the mean difference.
        mean_a: what it is a share of.
        variances: of mean(d), its covariance with mean(a), variance of mean(a).
        freedom: degrees of freedom of the three.
    """

    mean_d: float
    mean_a: float
    variances: tuple[float, float, float]
    freedom: float

    def error(self, change: float) -> float:
        """Standard error of the ratio where it is `change` (delta method)."""
        dd, da, aa = self.variances
        return float(np.sqrt(max(0.0, dd - 2 * change * da + change**2 * aa)) / abs(self.mean_a))

    def interval(self) -> tuple[float, float]:
        """95 %, in percent."""
        dd, da, aa = self.variances
        times = _t(self.freedom)
        change = self.mean_d / self.mean_a
        half = times * self.error(change)
        # The c that solve (mean_d - c mean_a)^2 = times^2 (dd - 2 c da + c^2 aa).
        most = self.mean_a**2 - times**2 * aa
        if most <= 0:  # so few images that their loss itself might be 0: the delta method's
            return 100 * (change - half), 100 * (change + half)
        middle = self.mean_d * self.mean_a - times**2 * da
        square = (half * self.mean_a**2) ** 2 - times**4 * (dd * aa - da**2)
        root = np.sqrt(max(0.0, square))
        return float(100 * (middle - root) / most), float(100 * (middle + root) / most)

    @property
    def resolves_percent(self) -> float | None:
        """Two standard errors of no change; None where nothing scatters to judge by."""
        return 200 * self.error(0.0) or None

    def p_value(self) -> float:
        """Of no difference, two-sided."""
        from scipy.stats import t

        error = self.error(0.0) * abs(self.mean_a)
        if error == 0:
            return 1.0 if self.mean_d == 0 else 0.0
        return float(2 * t.sf(abs(self.mean_d) / error, self.freedom))


def _on_new_images(a: np.ndarray, b: np.ndarray) -> _Ratio | None:
    """From how images differ; None with one image."""
    n = len(a)
    if n < 2:
        return None
    by_image = np.stack([(b - a).mean(1), a.mean(1)])
    return _ratio(a, b, by_image - by_image.mean(1, keepdims=True), n * (n - 1), n - 1)


def _on_this_set(a: np.ndarray, b: np.ndarray, u: np.ndarray | None) -> _Ratio | None:
    """From how neighbouring levels of an image differ; None with one image or one level.

    What an image brings to all its levels falls out of that, as does what a level brings to all
    images; with `u` also a slope within each level.
    """
    n, m = a.shape
    if n < 2 or m < 2:
        return None
    steps = np.diff(np.stack([b - a, a]), axis=2)  # (2, n, m - 1)
    steps = steps - steps.mean(1, keepdims=True)
    left = n - 1
    if u is not None and n >= FEWEST_FOR_SLOPES:
        steps, left = _without_slopes(steps, u), n - 2
    # Neighbouring differences share a level, so of many columns two thirds count.
    freedom = left * (m - 1) * (1 if m == 2 else 2 / 3)
    return _ratio(a, b, steps.reshape(2, -1), 2 * left * (m - 1) * n * m, freedom)


def _ratio(
    a: np.ndarray, b: np.ndarray, scatter: np.ndarray, divisor: float, freedom: float
) -> _Ratio | None:
    """`scatter`: (2, k) of the differences and of a; None where there is no loss to divide by."""
    mean_a = float(a.mean())
    if not mean_a:
        return None
    products = scatter @ scatter.T / divisor
    variances = float(products[0, 0]), float(products[0, 1]), float(products[1, 1])
    return _Ratio(float((b - a).mean()), mean_a, variances, freedom)


def _without_slopes(steps: np.ndarray, u: np.ndarray) -> np.ndarray:
    """(2, n, m - 1) centred columns less their regression on the place within the level.

    The place of an image in one level is the reverse of its place in the next, so one slope a
    column takes both.
    """
    place = u[:, :-1].argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
    place = place - place.mean(0)
    slopes = (place * steps).sum(1, keepdims=True) / (place**2).sum(0)
    without: np.ndarray = steps - slopes * place
    return without


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
