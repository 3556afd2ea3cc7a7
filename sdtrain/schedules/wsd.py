"""Warm-up, stable, decay: the full learning rate for most of the run, then down."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from sdprep.recipe import Section
from sdtrain.schedule import Schedule, with_warmup


class Config(Section):
    """Warm-up, stable, decay (arXiv:2405.18392)."""

    type: Literal["wsd"] = "wsd"
    warmup_samples: int = Field(0, ge=0, description="Samples over which the rate rises.")
    decay_share: float = Field(
        0.2, gt=0, le=1, description="Share of the samples after the warm-up in which it falls."
    )
    shape: Literal["sqrt", "linear", "cosine"] = Field(
        "sqrt", description="How it falls: 1 - √x, 1 - x, or half a cosine wave."
    )
    final_factor: float = Field(
        0.0, ge=0, le=1, description="Share of the full rate that is left at the end of the run."
    )

    def build(self, total_samples: int, batch_size: int = 1) -> Schedule:
        """The schedule of a run of `total_samples`."""

        def after(progress: float) -> float:
            decayed = min(1.0, max(0.0, 1 - (1 - progress) / self.decay_share))
            return self.final_factor + (1 - self.final_factor) * self._left(decayed)

        return with_warmup(after, self.warmup_samples, total_samples)

    def _left(self, decayed: float) -> float:
        if self.shape == "sqrt":
            return 1 - math.sqrt(decayed)
        if self.shape == "linear":
            return 1 - decayed
        return (1 + math.cos(math.pi * decayed)) / 2
