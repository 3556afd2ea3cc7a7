"""One rise to the full learning rate and one long fall, both half cosine waves."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from sdprep.recipe import Section
from sdtrain.schedule import Schedule


class Config(Section):
    """One cycle (arXiv:1708.07120); only the rate cycles, momentum stays."""

    type: Literal["one_cycle"] = "one_cycle"
    rise_share: float = Field(0.3, gt=0, lt=1, description="Share of the run in which it rises.")
    initial_factor: float = Field(
        0.04, gt=0, le=1, description="Share of the full rate at the first step."
    )
    final_factor: float = Field(
        4e-6, ge=0, le=1, description="Share of the full rate that is left at the end of the run."
    )

    def build(self, total_samples: int, batch_size: int = 1) -> Schedule:
        """The schedule of a run of `total_samples`."""
        peak = self.rise_share * total_samples

        def schedule(samples_seen: int) -> float:
            if samples_seen < peak:
                return _wave(self.initial_factor, 1.0, samples_seen / peak)
            fallen = (samples_seen - peak) / (total_samples - peak)
            return _wave(1.0, self.final_factor, min(fallen, 1.0))

        return schedule


def _wave(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
