"""P2: less weight for what little noise hides, which a network learns early."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from sdprep.recipe import Section
from sdtrain.weighting import Weighting, no_rule


class Config(Section):
    """P2 weighting, (1 + SNR)^-gamma; for epsilon and v prediction."""

    type: Literal["p2"] = "p2"
    gamma: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="How steeply; 0: every sample alike."
    )

    def build(self) -> Weighting:
        """The weighting."""
        return lambda snr, prediction_type: p2_weights(snr, self.gamma, prediction_type)


def p2_weights(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weight each sample by a power of its share of noise.

    Args:
        snr: (B,) signal-to-noise ratio in [0, inf].
        gamma: the power, ≥ 0.
        prediction_type: `epsilon` or `v_prediction`, which get the same (as in OneTrainer).

    Returns:
        (B,) float32, finite: (1 + snr)^-gamma.

    Raises:
        UserError: prediction_type has no rule here.

    Source: arXiv:2204.00227, equation 8 with k = 1.
    """
    if prediction_type in ("epsilon", "v_prediction"):
        return (1 + snr).reciprocal().pow(gamma).float()
    raise no_rule("p2", prediction_type)
