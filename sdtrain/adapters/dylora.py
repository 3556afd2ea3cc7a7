"""DyLoRA: a LoRA that is good at every smaller rank too, so that it can be cut down afterwards.

Source: arXiv:2210.07558. Each step draws a rank, a multiple of `unit`; only the last `unit` rows
and columns of it train, those before them take part. The draw is keyed by the run's seed and the
clock, so that it depends on neither micro-batch nor resume. Evaluation and pictures use the full
rank. The scale at rank b is alpha / b, which is what a reader of a file cut to b takes. peft has
none; lycoris-lora's neither reloads nor merges convolutions rightly.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sdprep.recipe import Section
from sdprep.seeding import integer
from sdtrain.adapters._layers import LayerAdapter, OwnKind
from sdtrain.adapters._low_rank import Factors, LowRank
from sdtrain.adapters._scale import rate_note
from sdtrain.adapters._targets import REACHES, Targets, is_target


class Config(Section):
    """LoRA that works at every smaller rank too."""

    type: Literal["dylora"] = "dylora"
    rank: int = Field(32, ge=1, le=1024, description="The largest rank.")
    unit: int = Field(4, ge=1, le=1024, description="Ranks are multiples of it; divides `rank`.")
    alpha: float | None = Field(
        None, gt=0, description="Output is scaled by alpha / rank; rank / 4 if left out."
    )
    targets: Targets = Field("attention+ff", description="Which layers get one.")
    seed: int = Field(0, description="Keys the first values of the inner matrices.")

    @model_validator(mode="after")
    def _divides(self) -> Config:
        if self.rank % self.unit:
            raise ValueError(f"unit {self.unit} does not divide rank {self.rank}")
        return self

    def build(self) -> LayerAdapter:
        """The adapter."""
        alpha = self.rank / 4 if self.alpha is None else self.alpha
        scale_note = rate_note("dylora", self.rank, alpha, alpha / self.rank)

        def make(base: Any, path: str) -> Dylora:
            return Dylora(base, rank=self.rank, alpha=alpha, seed=self.seed, unit=self.unit)

        def describe(num_layers: int) -> list[str]:
            lines = [*scale_note(num_layers), f"dylora: trains ranks {self.unit}, … {self.rank}"]
            if not self.rank / 4 <= alpha <= self.rank:
                lines.append(f"dylora: alpha {alpha:g} is outside rank / 4 … rank, which suits it")
            return lines

        return LayerAdapter(
            "dylora",
            OwnKind(make),
            partial(is_target, self.targets),
            REACHES[self.targets],
            describe,
        )


class Dylora(LowRank):
    """See the module."""

    def __init__(self, base: Any, *, rank: int, alpha: float, seed: int, unit: int) -> None:
        super().__init__(base, rank=rank, alpha=alpha, seed=seed)
        self.unit = unit
        self.block: int | None = None

    def begin_step(self, seed: int, samples_seen: int) -> None:
        """Draw the step's rank; the same in every layer."""
        self.block = integer(seed, "dylora", samples_seen) % (self.rank // self.unit)

    def forward(self, x: Tensor) -> Tensor:
        """At the step's rank in training, else at the full one."""
        if not self.training or self.block is None:
            return super().forward(x)
        first = self.block * self.unit
        factors = self._cut(first, first + self.unit)
        scale = self.alpha / (first + self.unit)
        return self.base_layer(x) + scale * self.beside(x, factors)

    def _cut(self, first: int, last: int) -> Factors:
        """The factors up to `last`, of which the part before `first` does not train."""
        down, _, up = super().factors()
        inner = torch.cat([down[:first].detach(), down[first:last]])
        return inner, None, torch.cat([up[:, :first].detach(), up[:, first:last]], dim=1)
