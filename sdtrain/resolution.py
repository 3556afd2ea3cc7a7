"""What a probe will be able to see, said before there is any change to look at.

A mean over N forwards has a standard error of s / √N, s being how much the change scatters from
forward to forward. Two things make it scatter: images differ in their loss, which the evaluation
at sample 0 has measured, and training changes the loss of some points more than of others, which
only published runs can tell. The first change replaces the estimate by a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdtrain.paired import compare
from sdtrain.wording import amount

TYPICAL_CHANGE_PERCENT = 1.5
"""What fine-tuning on some twenty images gains in all (spec: 1.5 to 1.9 %)."""

CHANGE_SCATTER = 0.24
"""How unevenly a change falls on the points, beside its mean: of the published SD 1.5 logs, 68
forwards have a standard error of 0.05 % of the loss at a change of 1.695 %: 0.05 √68 / 1.695."""

USUAL_IMAGE_SCATTER = 0.4
"""How much images differ in their loss at one noise level, beside its mean; until measured."""


def expected_percent(num_forwards: int, image_scatter: float = USUAL_IMAGE_SCATTER) -> float | None:
    """Smallest change that a probe should resolve: two standard errors on its own images.

    Args:
        num_forwards: images times noise levels.
        image_scatter: standard deviation over mean of the loss at one noise level.

    Returns:
        percent of the loss; None without a forward.
    """
    if num_forwards < 1:
        return None
    square = image_scatter**2
    scatter = np.sqrt(square + CHANGE_SCATTER**2 * (1 + square))
    return float(2 * TYPICAL_CHANGE_PERCENT * scatter / np.sqrt(num_forwards))


def expected_from(start: np.ndarray, u: np.ndarray | None = None) -> float | None:
    """The same from the evaluation at sample 0.

    Args:
        start: (n, m) weighted losses.
        u: (n, m) their noise levels.

    Returns:
        percent; None with one image or one noise level, which give no interval at all.
    """
    # Losses against nothing: the "change" is the loss itself, so its error is the scatter.
    found = compare(np.full_like(start, start.mean()), start + start.mean(), u)
    if found.resolves_percent is None or not start.mean() > 0:
        return None
    error = found.resolves_percent / 2 / 100
    return expected_percent(start.size, error * float(np.sqrt(start.size)))


def announcement(lines: Sequence[dict[str, Any]]) -> str:
    """What to say before the first step.

    Args:
        lines: validation lines of sample 0.
    """
    known = [
        f"{line['set']} ({amount(line['images'], 'image')} × {line['timesteps_per_image']}) sees "
        f"about ±{line['resolves_percent_expected']:.2g} %"
        for line in lines
        if line.get("resolves_percent_expected") is not None
    ]
    if not known:
        return ""
    return (
        f"before training: {'; '.join(known)}, judged by the losses at sample 0 and a usual gain "
        f"of {TYPICAL_CHANGE_PERCENT} %; measured at the next evaluation"
    )
