"""What a learning-rate ramp says: where learning starts, where it stops, where it breaks.

Every bound comes from paired differences of the same images, and its interval from drawing the
images again. A bound that the images do not fix is no bound; `refusals` says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from sdprep.seeding import rng_for
from sdtrain.paired import holm

START_SHARE = 0.10
"""Learning has started where the held-out loss made this share of its whole drop."""

SIGNIFICANT_T = 2.0
LEVEL = 0.05
RESAMPLES = 400
INTERVAL = (0.10, 0.90)
WIDEST_INTERVAL = 4.0
"""Upper over lower end of an 80 % interval; beyond it the bound is too vague to act on."""

FEWEST_IMAGES = 8
SAFE_SHARE = 0.3
"""The largest advised rate, as a share of the one at which training breaks."""

Limit = Literal["effort", "rate"]


@dataclass(frozen=True)
class Ramp:
    """What was measured.

    Args:
        lr: (K,) rate of the last step before each look, rising.
        effort: (K,) sum of rate times the root of the step's samples up to each look.
        validation: (K + 1, n) mean loss of each held-out image, first at sample 0.
        train: (K + 1, n') the same of training images.
        broke_at: rate at which a loss or gradient was no number any more; None: never.
    """

    lr: np.ndarray
    effort: np.ndarray
    validation: np.ndarray
    train: np.ndarray
    broke_at: float | None = None

    def __post_init__(self) -> None:
        looks = len(self.lr) + 1
        lengths = {len(self.effort) + 1, len(self.validation), len(self.train)}
        assert lengths == {looks}, f"looks of a ramp differ in number: {looks}, {lengths}"


@dataclass(frozen=True)
class Bound:
    """One rate or effort with its 80 % interval over images; `high` is infinite if it is open."""

    value: float
    low: float
    high: float

    @property
    def is_sharp(self) -> bool:
        """Whether it is known well enough to act on."""
        return self.high <= WIDEST_INTERVAL * self.low


@dataclass(frozen=True)
class Bounds:
    """What a ramp says; None where it does not say it.

    Args:
        drop_percent: how far the held-out loss fell, in percent of its start.
        drop_t: t of that drop over images; below -2 it is real.
        start: rate at which learning starts.
        best: rate at which the held-out loss was lowest.
        effort: effort spent until then.
        rise: rate at which the held-out loss had risen again.
        limit: what ended learning: `effort`, if the training images still got better, or `rate`.
        divergence: rate at which the training images got worse.
    """

    drop_percent: float
    drop_t: float
    start: Bound | None
    best: Bound
    effort: Bound
    rise: Bound | None
    limit: Limit | None
    divergence: Bound | None

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it; an open end is null."""
        return _plain(asdict(self))


def find_bounds(ramp: Ramp, seed: int) -> Bounds:
    """Read a ramp.

    Args:
        ramp: at least one look after sample 0, two images or more in each set.
        seed: keys the draws of images.
    """
    point = _read(ramp)
    n, n_train = ramp.validation.shape[1], ramp.train.shape[1]
    drawn: list[_Reading] = []
    for k in range(RESAMPLES):
        rng = rng_for(seed, "lr bounds", k)
        images, others = rng.integers(0, n, n), rng.integers(0, n_train, n_train)
        again = Ramp(ramp.lr, ramp.effort, ramp.validation[:, images], ramp.train[:, others])
        drawn.append(_read(again))
    divergence = _bound(point.divergence, [each.divergence for each in drawn])
    if divergence is None and ramp.broke_at is not None:
        divergence = Bound(ramp.broke_at, float(ramp.lr[-1]), ramp.broke_at)
    base = ramp.validation[0].mean()
    fall = ramp.validation[point.best] - ramp.validation[0]
    return Bounds(
        drop_percent=float(100 * fall.mean() / base) if base else 0.0,
        drop_t=float(_t_of(fall)),
        start=_bound(point.start, [each.start for each in drawn]),
        best=_certain(_lr_at(ramp, point.best), [_lr_at(ramp, each.best) for each in drawn]),
        effort=_certain(
            _effort_at(ramp, point.best), [_effort_at(ramp, each.best) for each in drawn]
        ),
        rise=_bound(point.rise, [each.rise for each in drawn]),
        limit=point.limit,
        divergence=divergence,
    )


def too_few(num_validation: int, num_train: int) -> list[str]:
    """What sets have too few images for a rate, in sentences."""
    return [
        f"the set {name} has {count} images, {FEWEST_IMAGES} are needed"
        for name, count in (("validation", num_validation), ("train_probe", num_train))
        if count < FEWEST_IMAGES
    ]


def refusals(bounds: Bounds, num_validation: int, num_train: int) -> list[str]:
    """Why no rate can be advised, in sentences; empty if one can."""
    reasons = too_few(num_validation, num_train)
    if not bounds.drop_t < -SIGNIFICANT_T:
        reasons.append(
            f"no descent: the held-out loss moved by {bounds.drop_percent:+.3f} % at best, "
            f"t = {bounds.drop_t:.1f}; -2 is needed"
        )
    if bounds.divergence is None:
        reasons.append("the ramp ended before training broke; raise --upto")
    used = {"divergence": bounds.divergence}
    if bounds.limit == "effort":
        used["useful effort"] = bounds.effort
    for name, bound in used.items():
        if bound is not None and not bound.is_sharp:
            reasons.append(
                f"the {name} is known only between {bound.low:.2g} and {_shown(bound.high)} "
                f"(80 %), a factor of {WIDEST_INTERVAL:g} at most is allowed; give more images"
            )
    return reasons


def advised_lr(bounds: Bounds, num_steps: int, batch_size: int) -> tuple[float, float]:
    """The constant rate for a planned length, and the largest safe one.

    Args:
        bounds: without refusals.
        num_steps: optimizer steps of the planned run.
        batch_size: samples per step.
    """
    assert bounds.divergence is not None, "refused before"
    most = SAFE_SHARE * bounds.divergence.value
    if bounds.limit != "effort":
        return most, most
    return min(most, bounds.effort.value / (num_steps * math.sqrt(batch_size))), most


@dataclass(frozen=True)
class _Reading:
    """One reading of a ramp: rates, and the index of the best look (0: sample 0)."""

    best: int
    start: float | None
    rise: float | None
    divergence: float | None
    limit: Limit | None


def _read(ramp: Ramp) -> _Reading:
    moved = smoothed((ramp.validation - ramp.validation[0]).mean(1))
    best = int(moved.argmin())
    rise = _first_rise(ramp.validation, best)
    trained = smoothed((ramp.train - ramp.train[0]).mean(1))
    divergence = _first_rise(ramp.train, int(trained.argmin()))
    limit: Limit | None = None
    if rise is not None:
        falls_still = (ramp.train[rise] - ramp.train[best]).mean() < 0
        limit = "effort" if falls_still else "rate"
    return _Reading(
        best=best,
        start=_start(moved, best, ramp.lr),
        rise=None if rise is None else float(ramp.lr[rise - 1]),
        divergence=None if divergence is None else float(ramp.lr[divergence - 1]),
        limit=limit,
    )


def smoothed(values: np.ndarray) -> np.ndarray:
    """Median of every look and its two neighbours; the ends stay."""
    if len(values) < 3:
        return values
    middle = np.median(np.stack([values[:-2], values[1:-1], values[2:]]), axis=0)
    return np.concatenate([values[:1], middle, values[-1:]])


def _start(moved: np.ndarray, best: int, lr: np.ndarray) -> float | None:
    """The rate at which a tenth of the drop was made, between two looks if need be.

    A test for significance would fire at the first look: paired differences see almost nothing.
    """
    if best == 0 or moved[best] >= 0:
        return None
    wanted = START_SHARE * moved[best]
    at = int(np.flatnonzero(moved[: best + 1] <= wanted)[0])
    if at <= 1:
        return float(lr[0])
    share = (moved[at - 1] - wanted) / (moved[at - 1] - moved[at])
    return float(lr[at - 2] * (lr[at - 1] / lr[at - 2]) ** share)


def _first_rise(losses: np.ndarray, best: int) -> int | None:
    """The first look after the best at which the loss is above it, corrected for many looks."""
    later = range(best + 1, len(losses))
    values = [_t_of(losses[k] - losses[best]) for k in later]
    if not values:
        return None
    adjusted = holm(_p_values(values, losses.shape[1] - 1))
    for k, value, p in zip(later, values, adjusted, strict=True):
        if value > SIGNIFICANT_T and p <= LEVEL:
            return k
    return None


def _t_of(difference: np.ndarray) -> float:
    """Mean over images in standard errors; infinite where all images agree exactly."""
    mean = difference.mean()
    error = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    if not math.isfinite(mean):
        return math.inf
    if error == 0:
        return 0.0 if mean == 0 else math.copysign(math.inf, mean)
    return float(mean / error)


def _p_values(values: Sequence[float], freedom: int) -> list[float]:
    from scipy.stats import t

    return (2 * t.sf(np.abs(values), max(freedom, 1))).tolist()


def _lr_at(ramp: Ramp, look: int) -> float:
    return float(ramp.lr[max(look - 1, 0)])


def _effort_at(ramp: Ramp, look: int) -> float:
    return float(ramp.effort[max(look - 1, 0)])


def _bound(value: float | None, drawn: Sequence[float | None]) -> Bound | None:
    """The interval of a bound that draws may lack; those count as beyond every rate."""
    if value is None:
        return None
    return _certain(value, [math.inf if each is None else each for each in drawn])


def _certain(value: float, drawn: Sequence[float]) -> Bound:
    ordered = sorted(drawn)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in INTERVAL)
    return Bound(value, min(low, value), max(high, value))


def _shown(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else "no upper end"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
