"""Mean absolute error."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sdprep.recipe import Section
from sdtrain.family import Loss
from sdtrain.loss_masks import mean_per_sample


class Config(Section):
    """Mean absolute error |d|: large errors count no more than their size."""

    type: Literal["l1"] = "l1"

    def build(self) -> Loss:
        """The loss."""
        return l1


def l1(
    prediction: Tensor, target: Tensor, *, mask: Tensor | None = None, **level: Tensor
) -> Tensor:
    """Mean over everything but the batch of the absolute difference.

    Args:
        prediction: (B, …).
        target: (B, …).
        mask: how much each element counts, see `mean_per_sample`; None: all alike.
        **level: u and logsnr, which this loss does not look at.

    Returns:
        (B,) float32.
    """
    return mean_per_sample((prediction.float() - target.float()).abs(), mask)
