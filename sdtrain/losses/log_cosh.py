"""Log-cosh loss: half the square of small errors, the size of large ones."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sdprep.recipe import Section
from sdtrain.family import Loss
from sdtrain.loss_masks import mean_per_sample


class Config(Section):
    """Log-cosh loss, ln cosh d: d²/2 for small errors, |d| - ln 2 for large ones."""

    type: Literal["log_cosh"] = "log_cosh"

    def build(self) -> Loss:
        """The loss."""
        return log_cosh


def log_cosh(
    prediction: Tensor, target: Tensor, *, mask: Tensor | None = None, **level: Tensor
) -> Tensor:
    """Mean over everything but the batch of ln cosh of the difference.

    Args:
        prediction: (B, …).
        target: (B, …).
        mask: how much each element counts, see `mean_per_sample`; None: all alike.
        **level: u and logsnr, which this loss does not look at.

    Returns:
        (B,) float32.
    """
    size = (prediction.float() - target.float()).abs()
    # cosh itself overflows at 89, and the form for large errors loses all digits of small ones.
    large = size + softplus(-2 * size) - math.log(2)
    small = -torch.log1p(-size.clamp(max=1).tanh().square()) / 2
    return mean_per_sample(torch.where(size < 1, small, large), mask)
