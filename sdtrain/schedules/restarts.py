"""Cosine decay that starts again several times, each time lower and never with a jump."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from sdprep.errors import UserError
from sdprep.recipe import Section
from sdtrain.schedule import Schedule, refuse_jumps, with_warmup

REWARM_STEPS = 100
REWARM_SHARE = 0.02


class Config(Section):
    """Cosine with safe restarts: each begins with a rise in a line, and the moments are kept."""

    type: Literal["restarts"] = "restarts"
    warmup_samples: int = Field(0, ge=0, description="Samples over which the rate rises at first.")
    cycles: int = Field(3, ge=1, le=1000, description="Falls in the run, all of one length.")
    peak_decay: float = Field(
        0.7, gt=0, le=0.7, description="Highest rate of a cycle over that of the one before."
    )
    floor: float = Field(
        0.1, ge=0.1, lt=0.7, description="Lowest rate of a cycle over its own highest."
    )

    @model_validator(mode="after")
    def _rises(self) -> Config:
        if self.floor >= self.peak_decay:
            raise ValueError(f"floor {self.floor} must be below peak_decay {self.peak_decay}")
        return self

    def build(self, total_samples: int, batch_size: int = 1) -> Schedule:
        """The schedule of a run of `total_samples` in steps of `batch_size`.

        A cycle after the first begins where the last one ended, and rises in a straight line
        over 100 steps or 2 % of the cycle, whichever is longer.

        Raises:
            UserError: a cycle is too short for its rise, or a step would change the rate too much.
        """
        length = (total_samples - self.warmup_samples) / self.cycles
        rise = max(REWARM_STEPS * batch_size, REWARM_SHARE * length)

        def after(progress: float) -> float:
            cycle = min(int(progress * self.cycles), self.cycles - 1)
            return self._in_cycle(cycle, (progress * self.cycles - cycle) * length, length, rise)

        schedule = with_warmup(after, self.warmup_samples, total_samples)
        if self.cycles > 1 and rise >= length:
            raise UserError(
                f"schedule.cycles = {self.cycles:,} leaves {length:,.0f} samples a cycle, and each "
                f"needs {rise:,.0f} to rise again",
                f"Make fewer cycles, or train for longer ({REWARM_STEPS} steps are the least).",
            )
        refuse_jumps(schedule, self.warmup_samples, total_samples, batch_size)
        return schedule

    def _in_cycle(self, cycle: int, position: float, length: float, rise: float) -> float:
        peak = self.peak_decay**cycle
        if cycle == 0:
            rise = 0.0
        elif position < rise:
            start = self.floor * self.peak_decay ** (cycle - 1)
            return start + (peak - start) * position / rise
        wave = (1 + math.cos(math.pi * min(1.0, (position - rise) / (length - rise)))) / 2
        return peak * (self.floor + (1 - self.floor) * wave)
