"""Up and down in straight lines between two learning rates, again and again."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdprep.recipe import Section
from sdtrain.schedule import Schedule, refuse_jumps, with_warmup


class Config(Section):
    """Cyclical learning rate, triangular (arXiv:1506.01186): low, full, low."""

    type: Literal["cyclical"] = "cyclical"
    warmup_samples: int = Field(
        0, ge=0, description="Samples over which the rate rises to the lowest one of the cycles."
    )
    half_cycle_samples: int = Field(
        gt=0, description="Samples from the lowest to the full rate; 2 to 10 epochs are usual."
    )
    min_factor: float = Field(
        0.25, gt=0, lt=1, description="Lowest rate of a cycle, as a share of the full rate."
    )

    def build(self, total_samples: int, batch_size: int = 1) -> Schedule:
        """The schedule of a run of `total_samples`.

        Raises:
            UserError: a step would change the rate too much.
        """
        rest = total_samples - self.warmup_samples

        def after(progress: float) -> float:
            half_cycles = progress * rest / self.half_cycle_samples
            height = 1 - abs(half_cycles % 2 - 1)
            return self.min_factor + (1 - self.min_factor) * height

        schedule = with_warmup(after, self.warmup_samples, total_samples)
        refuse_jumps(schedule, self.warmup_samples, total_samples, batch_size)
        return schedule
