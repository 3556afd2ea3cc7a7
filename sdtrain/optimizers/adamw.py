"""AdamW, the default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from sdprep.recipe import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class Config(Section):
    """AdamW of torch; fused on CUDA."""

    type: Literal["adamw"] = "adamw"
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999), description="Decay of the running mean and of the running square."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the root of the running square.")
    weight_decay: float = Field(0.01, ge=0, description="Decay per step, times the rate.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them."
    )

    def build(self, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of parameter groups, each `{"params": […], "lr": …, "name": …}`."""
        groups = list(groups)
        on_cuda = all(p.device.type == "cuda" for group in groups for p in group["params"])
        return torch.optim.AdamW(
            groups,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=on_cuda or None,
        )
