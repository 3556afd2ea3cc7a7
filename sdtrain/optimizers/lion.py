"""Lion: steps of one size, by the sign of a running mean (bitsandbytes)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from sdprep.recipe import Section
from sdtrain.optimizers._package import Beta, optional, whole_bytes


class Config(Section):
    """Lion (arXiv:2302.06675): a third to a tenth of AdamW's rate, 3 to 10 times its decay."""

    type: Literal["lion"] = "lion"
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.99), description="Share of the old mean in the step, and decay of the mean."
    )
    weight_decay: float = Field(0.03, ge=0, description="Decay per step, times the rate.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them."
    )

    def state_bytes(self, path: str, shape: Sequence[int]) -> int:
        """Bytes of state for one trained parameter."""
        return whole_bytes(shape, 1)

    def require(self) -> None:
        """Refuse a package that is not installed, before anything is opened."""
        optional("bitsandbytes", self.type)

    def build(self, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of parameter groups, each `{"params": […], "lr": …, "name": …}`."""
        bnb = optional("bitsandbytes", self.type)
        optimizer: torch.optim.Optimizer = bnb.optim.Lion32bit(
            list(groups), betas=self.betas, weight_decay=self.weight_decay
        )
        return optimizer
