"""Huber loss, 2c(√(d²+c²) - c): squared for small errors, linear for large ones."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from sdprep.recipe import Section
from sdtrain.family import Loss
from sdtrain.robust import bend, pseudo_huber


class Config(Section):
    """Huber loss, 2c(√(d²+c²) - c): squared for small errors, linear for large ones."""

    type: Literal["huber"] = "huber"
    c: float = Field(0.1, gt=0, lt=1, description="Where the loss bends, at the noisiest end.")
    schedule: Literal["constant", "exponential", "snr"] = Field(
        "constant", description="How c depends on the noise level; see sdtrain/robust.py."
    )

    def build(self) -> Loss:
        """The loss."""

        def huber(
            prediction: Tensor,
            target: Tensor,
            *,
            u: Tensor,
            logsnr: Tensor,
            mask: Tensor | None = None,
        ) -> Tensor:
            """Like the squared error for differences far below c. (B,) float32."""
            c = bend(self.schedule, self.c, u=u, logsnr=logsnr)
            return 2 * c * pseudo_huber(prediction, target, c, mask)

        return huber
