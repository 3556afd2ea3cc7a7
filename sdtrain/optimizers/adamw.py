"""AdamW, the default."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from sdprep.recipe import Section
from sdtrain.optimizers._package import Beta, whole_bytes


class Config(Section):
    """AdamW of torch."""

    type: Literal["adamw"] = "adamw"
    works_sharded: ClassVar[tuple[str, ...]] = ("fsdp2", "deepspeed")
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999), description="Decay of the running mean and of the running square."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the root of the running square.")
    weight_decay: float = Field(0.01, ge=0, description="Decay per step, times the rate.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them."
    )
    fused: bool | Literal["auto"] = Field(
        "auto", description='All of a step in one kernel; "auto": where everything is on a GPU.'
    )

    def state_bytes(self, path: str, shape: Sequence[int]) -> int:
        """Bytes of state for one trained parameter."""
        return whole_bytes(shape, 2)

    def build(self, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of parameter groups, each `{"params": […], "lr": …, "name": …}`."""
        groups = list(groups)
        on_cuda = all(p.device.type == "cuda" for group in groups for p in group["params"])
        fused = on_cuda if self.fused == "auto" else self.fused
        return torch.optim.AdamW(
            groups,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=fused or None,
        )
