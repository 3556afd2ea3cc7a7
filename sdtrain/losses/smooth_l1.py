"""Smooth L1 loss, 2(√(d²+c²) - c): linear for all but the smallest errors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from sdprep.recipe import Section
from sdtrain.family import Loss
from sdtrain.robust import bend, pseudo_huber


class Config(Section):
    """Smooth L1 loss, 2(√(d²+c²) - c): linear for all but the smallest errors."""

    type: Literal["smooth_l1"] = "smooth_l1"
    c: float = Field(0.1, gt=0, lt=1, description="Where the loss bends, at the noisiest end.")
    schedule: Literal["constant", "exponential", "snr"] = Field(
        "constant", description="How c depends on the noise level; see sdtrain/robust.py."
    )

    def build(self) -> Loss:
        """The loss."""

        def smooth_l1(
            prediction: Tensor,
            target: Tensor,
            *,
            u: Tensor,
            logsnr: Tensor,
            mask: Tensor | None = None,
        ) -> Tensor:
            """Like twice the absolute error for differences far above c. (B,) float32."""
            c = bend(self.schedule, self.c, u=u, logsnr=logsnr)
            return 2 * pseudo_huber(prediction, target, c, mask)

        return smooth_l1
