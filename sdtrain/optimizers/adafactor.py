"""Adafactor: rows and columns in place of whole running squares (transformers)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from sdprep.recipe import Section
from sdtrain.optimizers._package import factored_bytes


class Config(Section):
    """Adafactor with the recipe's own rate: about 20 times AdamW's (1e-5 for 5e-7)."""

    type: Literal["adafactor"] = "adafactor"
    clip_threshold: float = Field(
        1.0, gt=0, description="An update's root mean square is scaled down to this."
    )
    decay_rate: float = Field(
        -0.8, lt=0, description="Exponent of the step count in the decay of the running square."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decay per step, times the rate.")
    max_grad_norm: float = Field(
        0.0,
        ge=0,
        description="Gradients are scaled down to this norm; 0 leaves them, it clips itself.",
    )

    def state_bytes(self, path: str, shape: Sequence[int]) -> int:
        """Bytes of state for one trained parameter."""
        return factored_bytes(shape)

    def build(self, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of parameter groups, each `{"params": […], "lr": …, "name": …}`."""
        from transformers.optimization import Adafactor

        return Adafactor(
            list(groups),
            clip_threshold=self.clip_threshold,
            decay_rate=self.decay_rate,
            weight_decay=self.weight_decay,
            relative_step=False,
            scale_parameter=False,
            warmup_init=False,
        )
