"""AdamW whose moments take a byte each (bitsandbytes)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from sdprep.recipe import Section
from sdtrain.optimizers._package import Beta, optional, quantized_bytes


class Config(Section):
    """AdamW with 8-bit moments; tensors below 4,096 numbers keep 32 bits."""

    type: Literal["adamw8bit"] = "adamw8bit"
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999), description="Decay of the running mean and of the running square."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the root of the running square.")
    weight_decay: float = Field(0.01, ge=0, description="Decay per step, times the rate.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them."
    )

    def state_bytes(self, path: str, shape: Sequence[int]) -> int:
        """Bytes of state for one trained parameter."""
        return quantized_bytes(shape, 2)

    def require(self) -> None:
        """Refuse a package that is not installed, before anything is opened."""
        optional("bitsandbytes", self.type)

    def build(self, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of parameter groups, each `{"params": […], "lr": …, "name": …}`."""
        bnb = optional("bitsandbytes", self.type)
        optimizer: torch.optim.Optimizer = bnb.optim.AdamW8bit(
            list(groups), betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )
        return optimizer
