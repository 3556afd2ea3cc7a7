"""Cosmap: noise levels count as if they had been drawn from the cosine schedule."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from sdprep.recipe import Section
from sdtrain.weighting import Weighting, no_rule, noise_fraction


class Config(Section):
    """Cosmap weighting, 2/(π(1-2u+2u²)); for flow matching."""

    type: Literal["cosmap"] = "cosmap"

    def build(self) -> Weighting:
        """The weighting."""
        return cosmap_weights


def cosmap_weights(snr: Tensor, prediction_type: str) -> Tensor:
    """Weight the middle of the noise levels up to twice as much as their ends.

    Args:
        snr: (B,) signal-to-noise ratio in [0, inf].
        prediction_type: `flow`.

    Returns:
        (B,) float32: 2/(π(1 - 2u + 2u²)), u the fraction of noise; 2/π at both ends, mean 1 over u.

    Raises:
        UserError: prediction_type has no rule here.

    Source: arXiv:2403.03206, section 3.1.
    """
    if prediction_type != "flow":
        raise no_rule("cosmap", prediction_type)
    u = noise_fraction(snr)
    return (2 / (math.pi * (1 - 2 * u + 2 * u.square()))).float()
