"""The same learning rate throughout, after a warm-up."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdprep.recipe import Section
from sdtrain.schedule import Schedule, with_warmup


class Config(Section):
    """Constant learning rate."""

    type: Literal["constant"] = "constant"
    warmup_samples: int = Field(0, ge=0, description="Samples over which the rate rises.")

    def build(self, total_samples: int, batch_size: int = 1) -> Schedule:
        """The schedule of a run of `total_samples`."""
        return with_warmup(lambda progress: 1.0, self.warmup_samples, total_samples)
