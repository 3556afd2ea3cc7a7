"""What an adapter is: which parameters train in place of, or beside, the base weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

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


class UnsuitableError(Exception):
    """A rule chooses a module that an adapter would be wrong for; `build_plan` names the rule.

    Args:
        path: canonical path of the module.
        reason: what is the matter with it.
        hint: what to do.
    """

    def __init__(self, path: str, reason: str, hint: str = "") -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason
        self.hint = hint or "Freeze it by a later rule, or choose another adapter."


class Adapter(Protocol):
    """One way of training a model."""

    name: str
    reaches: str
    """In words, which parameters it can train."""

    def attach(self, family: Family, rates: Mapping[str, float]) -> dict[str, Trained]:
        """Put the adapter into the networks, giving the same output as before.

        Args:
            family: the model, changed in place.
            rates: canonical path to learning rate > 0 of every base parameter that a rule trains.

        Returns:
            what trains, by canonical path.

        Raises:
            UnsuitableError: the rules choose a module that it cannot be right for.
        """

    def begin_step(self, seed: int, samples_seen: int) -> None:
        """Learn where the clock stands before an optimizer step; most adapters do not care.

        Args:
            seed: the run's.
            samples_seen: the clock.
        """

    def notes(self) -> list[str]:
        """Sentences that the user should see beside the plan."""

    def kohya_tensors(self) -> dict[str, dict[str, Tensor]]:
        """For the file of ComfyUI and A1111: by canonical module path, then by end of the key.

        Raises:
            UserError: there is no such file of this adapter.
        """

    def diffusers_tensors(self) -> dict[str, dict[str, Tensor]]:
        """For the file of diffusers, with `alpha` beside the tensors.

        Raises:
            UserError: diffusers reads no such adapter.
        """

    def save(self, family: Family, path: Path) -> list[Path]:
        """Write what was trained in the format that others read; returns the files or folders."""

    def taken_out(self) -> AbstractContextManager[None]:
        """The networks without it for a while, with the weights that they have then."""

    def merge(self, family: Family) -> None:
        """Fold the adapter into the base weights and take it out of the networks."""
