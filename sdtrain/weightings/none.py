"""No weighting: every noise level counts as the loss says."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sdprep.recipe import Section
from sdtrain.weighting import Weighting


class Config(Section):
    """Every sample has weight 1."""

    type: Literal["none"] = "none"

    def build(self) -> Weighting:
        """The weighting."""
        return ones


def ones(snr: Tensor, prediction_type: str) -> Tensor:
    """One for each sample: (B,) float32."""
    return torch.ones_like(snr, dtype=torch.float32)
