"""A straight line down from the full learning rate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdprep.recipe import Section
from sdtrain.schedule import Schedule, with_warmup


class Config(Section):
    """Linear decay."""

    type: Literal["linear"] = "linear"
    warmup_samples: int = Field(0, ge=0, description="Samples over which the rate rises.")
    final_factor: float = Field(
        0.0, ge=0, le=1, description="Share of the full rate that is left at the end of the run."
    )

    def build(self, total_samples: int, batch_size: int = 1) -> Schedule:
        """The schedule of a run of `total_samples`."""

        def after(progress: float) -> float:
            return self.final_factor + (1 - self.final_factor) * (1 - progress)

        return with_warmup(after, self.warmup_samples, total_samples)
