"""Schedule-free AdamW: an average of the path in place of a falling rate (schedulefree)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from sdprep.recipe import Section
from sdtrain.optimizers._package import Beta, optional, whole_bytes

COUNTED = ("k", "train_mode", "weight_sum", "lr_max", "scheduled_lr")
"""What it counts in its groups; a checkpoint brings it back."""


class Config(Section):
    """Schedule-free AdamW (arXiv:2405.15682): a warm-up and then one rate.

    It trains at one point and means another one to be used; evaluations, pictures, checkpoints and
    the finished model hold the latter. See `averages.py`.
    """

    type: Literal["schedule_free"] = "schedule_free"
    keeps_training_point: ClassVar[bool] = True
    works_sharded: ClassVar[tuple[str, ...]] = ("fsdp2",)
    only_schedules: ClassVar[tuple[str, ...]] = ("constant",)
    refuses: ClassVar[dict[str, str]] = {
        "ema": "it averages by itself",
        "bf16 parameters": "its step counts for all weights at once",
    }
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999), description="Pull of the average on the point of training; running square."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the root of the running square.")
    weight_decay: float = Field(0.01, ge=0, description="Decay per step, times the rate.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them."
    )

    def state_bytes(self, path: str, shape: Sequence[int]) -> int:
        """Bytes of state for one trained parameter."""
        return whole_bytes(shape, 2)

    def require(self) -> None:
        """Refuse a package that is not installed, before anything is opened."""
        optional("schedulefree", self.type)

    def build(self, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of parameter groups, each `{"params": […], "lr": …, "name": …}`."""
        schedulefree = optional("schedulefree", self.type)
        optimizer: Any = schedulefree.AdamWScheduleFree(
            list(groups), betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )
        optimizer.counted_keys = COUNTED
        optimizer.train()
        return optimizer  # type: ignore[no-any-return]
