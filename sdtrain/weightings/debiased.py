"""Debiased estimation: weights that undo the bias of predicting noise for a clean picture."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from sdprep.errors import UserError
from sdprep.recipe import Section
from sdtrain.weighting import Weighting, no_rule, noise_fraction

MAX_SNR = 1000.0
MIN_SNR = 1e-6  # epsilon prediction is not admitted at snr 0; this only keeps the weight finite

VForm = Literal["derived", "sd_scripts", "onetrainer"]


class Config(Section):
    """Debiased-estimation weighting."""

    type: Literal["debiased"] = "debiased"
    v_form: VForm = Field(
        "derived",
        description="Formula for v prediction: the derived √S/(S+1), or that of another trainer.",
    )

    def require(self, prediction_type: str) -> None:
        """Refuse a formula that would not be asked.

        Raises:
            UserError: `v_form` was set, and the model predicts something else.
        """
        if prediction_type != "v_prediction" and self.v_form != "derived":
            raise UserError(
                f"weighting.v_form = {self.v_form!r} is for v prediction, and this model predicts "
                f"{prediction_type}",
                "Leave it out, or set model.prediction_type if the model predicts v.",
            )

    def build(self) -> Weighting:
        """The weighting."""
        return lambda snr, prediction_type: debiased_weights(snr, prediction_type, self.v_form)


def debiased_weights(snr: Tensor, prediction_type: str, v_form: VForm = "derived") -> Tensor:
    """Weight each sample by the root of what its target's error means for the clean picture.

    Args:
        snr: (B,) signal-to-noise ratio in [0, inf].
        prediction_type: `epsilon`, `v_prediction` or `flow`.
        v_form: `derived`: √snr/(snr+1); `sd_scripts`: 1/(min(snr, 1000)+1);
            `onetrainer`: 1/√(min(snr, 1000)+1).

    Returns:
        (B,) float32, finite; epsilon: 1/√min(snr, 1000); flow: u(1-u) with u = 1/(1+√snr).

    Raises:
        UserError: prediction_type has no rule here.

    Source: arXiv:2310.08442 for epsilon; the v and flow forms are derived from it.
    """
    if prediction_type == "epsilon":
        return snr.clamp(MIN_SNR, MAX_SNR).rsqrt().float()
    if prediction_type == "v_prediction":
        return _v_weights(snr, v_form)
    if prediction_type == "flow":
        fraction = noise_fraction(snr)
        return (fraction * (1 - fraction)).float()
    raise no_rule("debiased", prediction_type)


def _v_weights(snr: Tensor, v_form: VForm) -> Tensor:
    if v_form == "sd_scripts":
        return (1 / (snr.clamp(max=MAX_SNR) + 1)).float()
    if v_form == "onetrainer":
        return (snr.clamp(max=MAX_SNR) + 1).rsqrt().float()
    root = snr.sqrt()
    return (1 / (root + 1 / root)).float()  # √S/(S+1), finite at both ends
