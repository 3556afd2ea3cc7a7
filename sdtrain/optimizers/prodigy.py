"""Prodigy finds the size of its steps itself; the rate is a factor on it (prodigyopt)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from math import prod
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from sdprep.console import warn
from sdprep.errors import UserError
from sdprep.recipe import Section
from sdtrain.optimizers._package import FLOAT32_BYTES, Beta, optional, whole_bytes

COUNTED = ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k")
"""What it finds and counts in its groups; a checkpoint brings it back."""


class Config(Section):
    """Prodigy (arXiv:2306.06101): lr = 1 throughout, and no schedule that restarts."""

    type: Literal["prodigy"] = "prodigy"
    finds_its_rates: ClassVar[bool] = True
    shapes_state: ClassVar[tuple[str, ...]] = ("slice_p",)
    refuses_schedules: ClassVar[tuple[str, ...]] = ("restarts",)
    refuses: ClassVar[dict[str, str]] = {
        "lr_scaling": "it finds the size of its steps itself",
        "phases": "it finds one size of step for everything that trains",
        "bf16 parameters": "its step looks at all weights at once",
    }
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999), description="Decay of the running mean and of the running square."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the root of the running square.")
    weight_decay: float = Field(0.01, ge=0, description="Decay per step, times the rate.")
    d_coef: float = Field(1.0, gt=0, description="Factor on the step size that it finds.")
    slice_p: int = Field(
        11, ge=1, description="Only each of so many numbers is looked at for it; saves memory."
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them."
    )

    def state_bytes(self, path: str, shape: Sequence[int]) -> int:
        """Bytes of state for one trained parameter."""
        return whole_bytes(shape, 2) + 2 * FLOAT32_BYTES * -(-prod(shape) // self.slice_p)

    def require(self) -> None:
        """Refuse a package that is not installed, before anything is opened."""
        optional("prodigyopt", self.type)

    def build(self, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of parameter groups, each `{"params": […], "lr": …, "name": …}`.

        Raises:
            UserError: the groups differ in their rates.
        """
        groups = list(groups)
        rates = sorted({float(group["lr"]) for group in groups})
        if len(rates) > 1:
            raise UserError(
                f"optimizer prodigy finds one step size for all, but the rules give {len(rates)} "
                f"learning rates: {', '.join(f'{rate:g}' for rate in rates)}",
                "Give every rule the same one; 1 is usual.",
            )
        if not 0.1 <= rates[0] <= 10:
            warn(f"optimizer prodigy: lr = {rates[0]:g} is a factor on what it finds; 1 is usual")
        prodigyopt = optional("prodigyopt", self.type)
        with redirect_stdout(sys.stderr):  # it prints, and stdout is for data
            optimizer: torch.optim.Optimizer = prodigyopt.Prodigy(
                groups,
                betas=self.betas,
                eps=self.eps,
                weight_decay=self.weight_decay,
                d_coef=self.d_coef,
                slice_p=self.slice_p,
                safeguard_warmup=True,
                use_bias_correction=True,
            )
        optimizer.counted_keys = COUNTED  # type: ignore[attr-defined]
        return optimizer
