"""Show the training loss without the jumps that the drawn timesteps cause.

Most of the variance of the ordinary curve is which noise levels a step happened to draw. A fit of
log L = a + b·s + c·s² over s = ln SNR says what loss a noise level usually has; the curve of
loss / fit then shows learning. For display only: nothing is trained or judged by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

PRIOR = (-2.12587, 0.55227, -0.03490)
"""a, b, c measured on SD 1.5 with the epsilon objective (spec, section 3): where the fit starts."""

PRIOR_SAMPLES = 4
"""How many samples the prior counts for."""


class LossFit:
    """Recursive least squares of log loss on (1, s, s²), s = ln SNR."""

    def __init__(self) -> None:
        # The prior as if measured at seven noise levels, so that it holds in all directions.
        levels = features(np.linspace(-6.0, 6.0, 7))
        weight = PRIOR_SAMPLES / len(levels)
        self._moments = weight * levels.T @ levels
        self._sums = weight * levels.T @ (levels @ np.array(PRIOR))

    def expected(self, logsnr: Sequence[float]) -> np.ndarray:
        """The loss that each noise level usually has; shape (B,), > 0."""
        coefficients = np.linalg.solve(self._moments, self._sums)
        return np.exp(features(np.asarray(logsnr)) @ coefficients)

    def debiased(self, losses: Sequence[float], logsnr: Sequence[float]) -> float | None:
        """Mean of loss / fit over one step, then learn from that step.

        Args:
            losses: (B,) unweighted per-sample losses.
            logsnr: (B,) ln SNR of the same samples; infinite ones are left out.

        Returns:
            About 1 while nothing is learnt; None if no sample has a finite noise level.
        """
        pairs = zip(losses, logsnr, strict=True)
        usable = [(loss, s) for loss, s in pairs if math.isfinite(s) and loss > 0]
        if not usable:
            return None
        values = np.array([loss for loss, _ in usable])
        levels = np.array([s for _, s in usable])
        ratio = float(np.mean(values / self.expected(levels.tolist())))
        rows = features(levels)
        self._moments = self._moments + rows.T @ rows
        self._sums = self._sums + rows.T @ np.log(values)
        return ratio

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON holds it without loss."""
        return {"moments": self._moments.tolist(), "sums": self._sums.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self._moments = np.array(state["moments"])
        self._sums = np.array(state["sums"])


def features(logsnr: np.ndarray) -> np.ndarray:
    """1, s and s² of ln SNR, shape (…, 3)."""
    # Beyond ±12 the parabola says nothing sensible; hold it there.
    s = np.clip(logsnr, -12.0, 12.0)
    return np.stack([np.ones_like(s), s, s * s], axis=1)
