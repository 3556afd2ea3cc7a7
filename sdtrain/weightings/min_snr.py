"""Min-SNR: levels with little noise no longer dominate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from sdprep.recipe import Section
from sdtrain.weighting import Weighting, no_rule


class Config(Section):
    """Min-SNR weighting."""

    type: Literal["min_snr"] = "min_snr"
    gamma: float = Field(
        5.0, gt=0, allow_inf_nan=False, description="Signal-to-noise ratio above which it clamps."
    )

    def build(self) -> Weighting:
        """The weighting."""
        return lambda snr, prediction_type: min_snr_weights(snr, self.gamma, prediction_type)


def min_snr_weights(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weight each sample so that no noise level dominates.

    Args:
        snr: (B,) signal-to-noise ratio in [0, inf].
        gamma: clamp, usually 5.
        prediction_type: `epsilon`, `v_prediction` or `flow`.

    Returns:
        (B,) float32, finite; epsilon: min(snr, gamma)/snr; v: min(snr, gamma)/(snr+1);
        flow: u²·min(snr, gamma) with u = 1/(1+√snr).

    Raises:
        UserError: prediction_type has no rule here.

    Source: arXiv:2303.09556, sections 3.4 and 4.2; the flow form is derived from E(x0) = MSE·u².
    """
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1).float()  # 1 at snr 0, where min(snr, gamma)/snr is 0/0
    if prediction_type == "v_prediction":
        return (snr.clamp(max=gamma) / (snr + 1)).float()
    if prediction_type == "flow":
        return (snr.clamp(max=gamma) / (1 + snr.sqrt()).square()).float()
    raise no_rule("min_snr", prediction_type)
