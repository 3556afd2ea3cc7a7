"""The rate grows by the same factor every step: the learning-rate range test."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sdprep.recipe import Section
from sdtrain.schedule import Schedule


class Config(Section):
    """Exponential ramp, as `sdtrain lr-find` uses it; not for training a model to keep."""

    type: Literal["ramp"] = "ramp"
    start_factor: float = Field(
        0.01, gt=0, le=1e6, description="Factor on every rate at the first step."
    )
    end_factor: float = Field(
        1.0, gt=0, le=1e6, description="Factor on every rate at the end of the run."
    )

    @model_validator(mode="after")
    def _rises(self) -> Config:
        if self.end_factor <= self.start_factor:
            raise ValueError("end_factor must be above start_factor")
        return self

    def build(self, total_samples: int, batch_size: int = 1) -> Schedule:
        """The schedule of a run of `total_samples`."""
        growth = self.end_factor / self.start_factor

        def schedule(samples_seen: int) -> float:
            return self.start_factor * growth ** min(samples_seen / total_samples, 1.0)

        return schedule
