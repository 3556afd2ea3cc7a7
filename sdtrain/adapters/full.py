"""Full fine-tuning: the base weights themselves train."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

from torch import Tensor

from sdprep.errors import UserError
from sdprep.recipe import Section
from sdtrain.adapter import Trained
from sdtrain.family import Family


class Config(Section):
    """Full fine-tuning."""

    type: Literal["full"] = "full"

    def build(self) -> Full:
        """The adapter."""
        return Full()


class Full:
    """Trains every base parameter that a rule gives a rate."""

    name = "full"
    reaches = "every parameter"

    def attach(self, family: Family, rates: Mapping[str, float]) -> dict[str, Trained]:
        """The base parameters with a rate, unchanged."""
        return {
            path: Trained(path, parameter)
            for path, parameter in family.named_parameters()
            if path in rates
        }

    def notes(self) -> list[str]:
        """Nothing to say."""
        return []

    def begin_step(self, seed: int, samples_seen: int) -> None:
        """Nothing depends on the clock."""

    def kohya_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Refused: the whole model was trained."""
        raise UserError(
            "adapter full trains the model itself, so there is no adapter to write",
            "Export it as single-file or diffusers.",
        )

    def diffusers_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Refused: the whole model was trained."""
        return self.kohya_tensors()

    def save(self, family: Family, path: Path) -> list[Path]:
        """A complete diffusers folder."""
        family.save(path)
        return [path]

    def taken_out(self) -> AbstractContextManager[None]:
        """There is nothing beside the base weights."""
        return nullcontext()

    def merge(self, family: Family) -> None:
        """The base weights are the trained ones already."""
