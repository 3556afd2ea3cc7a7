"""Plain stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field

from sdprep.recipe import Section


class Config(Section):
    """SGD of torch; its rate is about 2e-2."""

    type: Literal["sgd"] = "sgd"
    momentum: float = Field(0.0, ge=0, lt=1, description="Decay of the running sum of gradients.")
    weight_decay: float = Field(0.0, ge=0, description="Decay per step, times the rate.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them."
    )

    def build(self, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of parameter groups, each `{"params": […], "lr": …, "name": …}`."""
        return torch.optim.SGD(list(groups), momentum=self.momentum, weight_decay=self.weight_decay)
