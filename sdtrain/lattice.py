"""Where StableEval looks: an alternating lattice of noise levels, warped to where the loss is.

The n images times m levels are n·m equispaced points of [0, 1). Each image sees every m-th part
of the range once, and two neighbours in the lattice never belong to one image, so the mean over
the matrix is a systematic sample: unbiased over the common offset, and far steadier than draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdprep.seeding import rng_for, uniform

NUM_STRATA = 32
PILOT_REPEATS = 2
_STEPS = 64  # the warp's density is rounded to 1/64, so that two devices agree on it
_FLOOR = 0.1  # of the mean density: no stratum is left out
_BELOW_ONE = float(np.nextafter(1.0, 0.0))


@dataclass(frozen=True)
class Warp:
    """A density q on [0, 1), constant on 32 equal strata; the mean loss is sampled from it.

    Args:
        steps: density of each stratum in 64ths; they sum to 32 * 64, so that q integrates to 1.
    """

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.steps) == NUM_STRATA, f"a warp has {NUM_STRATA} strata"
        assert sum(self.steps) == NUM_STRATA * _STEPS, "a density integrates to 1"
        assert min(self.steps) > 0, "every noise level can be drawn"

    def density(self, u: np.ndarray) -> np.ndarray:
        """q(u), any shape."""
        strata = np.minimum((u * NUM_STRATA).astype(np.int64), NUM_STRATA - 1)
        return np.asarray(self.steps)[strata] / _STEPS

    def quantile(self, v: np.ndarray) -> np.ndarray:
        """Inverse of the distribution function: v in [0, 1) to u in [0, 1), any shape."""
        total = NUM_STRATA * _STEPS
        edges = np.concatenate([[0], np.cumsum(self.steps)]) / total
        strata = np.clip(np.searchsorted(edges, v, side="right") - 1, 0, NUM_STRATA - 1)
        within = (v - edges[strata]) / (np.asarray(self.steps)[strata] / total)
        return np.minimum((strata + np.clip(within, 0, 1)) / NUM_STRATA, _BELOW_ONE)


FLAT = Warp((_STEPS,) * NUM_STRATA)


def warp_from_pilot(mean_losses: np.ndarray) -> Warp:
    """The density that steadies the estimate most: proportional to the root of the mean loss.

    Args:
        mean_losses: (32,) mean loss of each stratum at sample 0, finite and not negative.
    """
    assert mean_losses.shape == (NUM_STRATA,), mean_losses.shape
    density = np.sqrt(np.asarray(mean_losses, np.float64))
    if not density.sum() > 0:
        return FLAT
    density = np.maximum(density, _FLOOR * density.mean())
    ideal = density / density.mean() * _STEPS
    steps = np.maximum(np.floor(ideal), 1)
    missing = NUM_STRATA * _STEPS - int(steps.sum())
    order = np.argsort(-(ideal - steps), kind="stable")  # largest remainder first
    for k in range(abs(missing)):
        steps[order[k % NUM_STRATA]] += np.sign(missing)
    return Warp(tuple(int(step) for step in steps))


def lattice(seed: int, name: str, num_images: int, num_levels: int) -> np.ndarray:
    """The unwarped points: v[i, j] = (j + (p_j(i) + offset) / n) / m.

    p_j is a seeded permutation of the images for even j and its reverse for odd j.

    Args:
        seed: of the evaluation.
        name: of the probe, so that probes do not share their points.
        num_images: n.
        num_levels: m.

    Returns:
        (n, m) float64 in [0, 1).
    """
    order = rng_for(seed, "lattice", name).permutation(num_images)[:, None]
    offset = uniform(seed, "lattice offset", name)
    level = np.arange(num_levels)[None, :]
    place = np.where(level % 2 == 0, order, num_images - 1 - order)
    return np.minimum((level + (place + offset) / num_images) / num_levels, _BELOW_ONE)


def pilot_points(seed: int, name: str, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Which image is seen at which level before there is a warp.

    Returns:
        (64,) image indices, cycling through the probe, and (64,) levels in [0, 1), two a stratum.
    """
    strata = np.repeat(np.arange(NUM_STRATA), PILOT_REPEATS)
    within = [uniform(seed, "pilot", name, k) for k in range(len(strata))]
    return np.arange(len(strata)) % num_images, (strata + np.asarray(within)) / NUM_STRATA
