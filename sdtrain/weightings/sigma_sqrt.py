"""Sigma-sqrt: what diffusers calls so, which is one over the square of the noise."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sdprep.recipe import Section
from sdtrain.weighting import Weighting, no_rule, noise_fraction

SMALLEST_FRACTION = 1e-3  # the least noisy of diffusers' thousand levels


class Config(Section):
    """Sigma-sqrt weighting, u^-2 in spite of its name, as in diffusers; for flow matching."""

    type: Literal["sigma_sqrt"] = "sigma_sqrt"

    def build(self) -> Weighting:
        """The weighting."""
        return sigma_sqrt_weights


def sigma_sqrt_weights(snr: Tensor, prediction_type: str) -> Tensor:
    """Weight each sample by one over the square of its fraction of noise.

    Args:
        snr: (B,) signal-to-noise ratio in [0, inf].
        prediction_type: `flow`.

    Returns:
        (B,) float32: u^-2 for the fraction of noise u, which counts as 0.001 at least.

    Raises:
        UserError: prediction_type has no rule here.

    Source: diffusers' `compute_loss_weighting_for_sd3`.
    """
    if prediction_type != "flow":
        raise no_rule("sigma_sqrt", prediction_type)
    return noise_fraction(snr).clamp(min=SMALLEST_FRACTION).pow(-2).float()
