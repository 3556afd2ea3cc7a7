"""Correct a test for having been made at every evaluation of a run.

Looks at one run are nearly copies of each other: what one of them sees by chance, its neighbours
see, too. A correction that takes them for independent chances (Holm's) pays for forty looks where
there were perhaps three. Turning the sign of all changes of an image at once keeps what the looks
share, and says how large the largest of them gets when nothing has changed (step-down max-t;
Westfall and Young, 1993). Simulated with 8 to 64 images and 8 or 40 looks: false alarms 2 to 5 %,
for skewed changes, too, and a change of three standard errors is found in 65 to 81 % of runs,
where Holm's finds 11 to 63 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from sdprep.seeding import rng_for
from sdtrain.paired import holm

FEWEST_IMAGES = 6
"""With fewer even the most extreme of all signs is not rare: 2 / 2^5 > 0.05."""

MOST_SIGNS = 4096


def over_looks(changes: np.ndarray, p_values: Sequence[float]) -> list[float]:
    """P-values of each look, corrected for there being many.

    Args:
        changes: (looks, images) mean change of each image since the evaluation compared with.
        p_values: of each look alone, two-sided.

    Returns:
        (looks) corrected; those of one look are as they were, few images have Holm's.
    """
    num_looks, num_images = changes.shape
    if num_looks < 2 or num_images < FEWEST_IMAGES:
        return holm(p_values)
    drawn = _sizes(_signs(num_images), changes)  # (signs, looks)
    seen = drawn[0]  # the signs as they are come first
    order = np.argsort(-seen, kind="stable")
    corrected = np.empty(num_looks)
    # A look competes with those that saw less: the ones before it have been rejected by then.
    largest = np.maximum.accumulate(drawn[:, order[::-1]], axis=1)[:, ::-1]
    as_large = (largest >= seen[order] - 1e-9).mean(0)
    corrected[order] = np.maximum.accumulate(as_large)
    return [float(p) for p in corrected]


def _signs(num_images: int) -> np.ndarray:
    """(s, n) of 1 and -1, all ones first; all there are but for a common sign, or a sample."""
    if 2 ** (num_images - 1) <= MOST_SIGNS:
        rest = np.array(list(product((1.0, -1.0), repeat=num_images - 1)))
        return np.hstack([np.ones((len(rest), 1)), rest])
    rng = rng_for("signs", num_images)
    signs = rng.choice(np.array([1.0, -1.0]), (MOST_SIGNS, num_images))
    signs[0] = 1.0
    return signs


def _sizes(signs: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """(s, k) in 0..1: how much the images agree; it rises with t, and has no division by zero."""
    norms = np.sqrt(changes.shape[1] * (changes**2).sum(1))
    sizes: np.ndarray = np.abs(signs @ changes.T) / np.where(norms > 0, norms, np.inf)
    return sizes
