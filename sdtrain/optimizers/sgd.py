"""Plain stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from sdprep.recipe import Section
from sdtrain.optimizers._package import whole_bytes


class Config(Section):
    """SGD of torch; its rate is about 2e-2."""

    type: Literal["sgd"] = "sgd"
    works_sharded: ClassVar[tuple[str, ...]] = ("fsdp2", "deepspeed")
    momentum: float = Field(0.0, ge=0, lt=1, description="Decay of the running sum of gradients.")
    weight_decay: float = Field(0.0, ge=0, description="Decay per step, times the rate.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them."
    )

    def state_bytes(self, path: str, shape: Sequence[int]) -> int:
        """Bytes of state for one trained parameter."""
        return whole_bytes(shape, 1 if self.momentum else 0)

    def build(self, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of parameter groups, each `{"params": […], "lr": …, "name": …}`."""
        return torch.optim.SGD(list(groups), momentum=self.momentum, weight_decay=self.weight_decay)
