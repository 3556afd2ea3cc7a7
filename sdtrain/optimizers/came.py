"""CAME: little memory, with the confidence in each step (the authors' package)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from sdprep.recipe import Section
from sdtrain.optimizers._package import UNUSED_LR, Beta, factored_bytes, optional, whole_bytes

Positive = Annotated[float, Field(gt=0)]


class Config(Section):
    """CAME (arXiv:2307.02047): rows and columns in place of whole running squares."""

    type: Literal["came"] = "came"
    betas: tuple[Beta, Beta, Beta] = Field(
        (0.9, 0.999, 0.9999), description="Decay of the mean, the square and the instability."
    )
    eps: tuple[Positive, Positive] = Field(
        (1e-30, 1e-16), description="Added to the squared gradient and to the instability."
    )
    clip_threshold: float = Field(
        1.0, gt=0, description="An update's root mean square is scaled down to this."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decay per step, times the rate.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them."
    )

    def state_bytes(self, path: str, shape: Sequence[int]) -> int:
        """Bytes of state for one trained parameter."""
        squares = factored_bytes(shape) * (2 if len(shape) > 1 else 1)  # square and instability
        return whole_bytes(shape, 1) + squares

    def require(self) -> None:
        """Refuse a package that is not installed, before anything is opened."""
        optional("came_pytorch", self.type)

    def build(self, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of parameter groups, each `{"params": […], "lr": …, "name": …}`."""
        came = optional("came_pytorch", self.type)
        optimizer: torch.optim.Optimizer = came.CAME(
            list(groups),
            lr=UNUSED_LR,
            betas=self.betas,
            eps=self.eps,
            clip_threshold=self.clip_threshold,
            weight_decay=self.weight_decay,
        )
        return optimizer
