"""What an adapter is: which parameters train in place of, or beside, the base weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import nn

from sdtrain.family import Family


@dataclass(frozen=True)
class Trained:
    """One trained parameter.

    Args:
        owner: canonical path of the base parameter whose rule decided on it.
        parameter: what the optimizer gets.
    """

    owner: str
    parameter: nn.Parameter


class Adapter(Protocol):
    """One way of training a model."""

    name: str

    def attach(self, family: Family, rates: Mapping[str, float]) -> dict[str, Trained]:
        """Put the adapter into the networks, giving the same output as before.

        Args:
            family: the model, changed in place.
            rates: canonical path to learning rate > 0 of every base parameter that a rule trains.

        Returns:
            what trains, by canonical path.
        """

    def notes(self) -> list[str]:
        """Sentences that the user should see beside the plan."""

    def save(self, family: Family, path: Path) -> list[Path]:
        """Write what was trained in the format that others read; returns the files or folders."""

    def merge(self, family: Family) -> None:
        """Fold the adapter into the base weights and take it out of the networks."""
