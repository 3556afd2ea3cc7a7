"""Phases that take turns: some parts train while the others rest.

Which phase it is is a function of samples seen, asked at the start of each step: a change takes
effect with the first step that starts at it or after it. A part that rests gets no gradient, is
neither stepped nor decayed, and its optimizer state waits on the CPU, unless it is spread over
several processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from sdprep.console import warn
from sdprep.errors import UserError, nearest
from sdprep.recipe import Section
from sdtrain.engine import is_spread
from sdtrain.freeze_plan import FreezePlan, ParameterGroup
from sdtrain.freezing import set_modes


class PhaseSection(Section):
    """A stretch of the run in which only some parts train, by the rules for them."""

    samples: int = Field(gt=0, description="Length of the phase; at least one step.")
    parts: tuple[str, ...] = Field(
        min_length=1, description='Networks that train meanwhile, such as ["unet"].'
    )

    @field_validator("parts", mode="after")
    @classmethod
    def _named_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("each part is named once")
        return value


@dataclass(frozen=True)
class PhasePlan:
    """The phases of a run, checked against what trains.

    Args:
        phases: in order.
        repeats: whether they begin again after the last one.
    """

    phases: tuple[PhaseSection, ...]
    repeats: bool

    def starts(self, total_samples: int) -> Iterator[tuple[int, int]]:
        """Clock and index of every phase that begins before the end of the run."""
        clock, number = 0, 0
        while clock < total_samples and (self.repeats or number < len(self.phases)):
            index = number % len(self.phases)
            yield clock, index
            clock, number = clock + self.phases[index].samples, number + 1

    def at(self, samples_seen: int) -> int:
        """Index of the phase of a step that starts here."""
        cycle = sum(phase.samples for phase in self.phases)
        position = samples_seen % cycle if self.repeats else samples_seen
        for index, phase in enumerate(self.phases):
            if position < phase.samples:
                return index
            position -= phase.samples
        raise AssertionError("the phases end before the run does")

    def describe(self, index: int) -> str:
        """One phase in words."""
        phase = self.phases[index]
        again = ", again and again" if self.repeats else ""
        return (
            f"phase {index + 1} of {len(self.phases)}{again}: "
            f"{phase.samples:,} samples of {', '.join(phase.parts)}"
        )

    def table(self, plan: FreezePlan, index: int) -> str:
        """The freeze table while one phase lasts."""
        live = self.phases[index].parts
        rows = [
            row
            if row.part in live or not row.num_trained
            else replace(row, rule=f"{row.rule} (rests)", num_trained=0, percent=0.0, lr=0.0)
            for row in plan.rows
        ]
        return replace(plan, rows=rows, notes=[]).table()


def plan_phases(
    phases: Sequence[PhaseSection],
    plan: FreezePlan,
    *,
    repeats: bool,
    total_samples: int,
    planned_samples: int,
    batch_size: int,
) -> PhasePlan | None:
    """The phases of a recipe; None if it has none.

    Args:
        phases: as the recipe has them.
        plan: what trains.
        repeats: whether they begin again after the last one.
        total_samples: length of the run.
        planned_samples: what it would be if it were not cut short; only warned of is a part whose
            turn comes after the cut.
        batch_size: samples per optimizer step.

    Raises:
        UserError: a phase names a part that does not train or is shorter than a step, a part that
            trains is in no phase that gets a step, or the run goes on after the last phase.
    """
    if not phases:
        return None
    trained = list(dict.fromkeys(path.split(".")[0] for path in plan.trained()))
    for number, phase in enumerate(phases, 1):
        _check_phase(number, phase, trained, batch_size)
    found = PhasePlan(tuple(phases), repeats)
    length = sum(phase.samples for phase in phases)
    if not repeats and length < total_samples:
        raise UserError(
            f"[[train.phases]] end at {length:,} of the run's {total_samples:,} samples",
            "Set train.repeat_phases = true, make them longer, or train for less.",
        )
    begun = _begun(found, total_samples, batch_size)
    if missed := [str(i + 1) for i in range(len(phases)) if i not in begun]:
        warn(f"the run ends before a step of phase {', '.join(missed)} of [[train.phases]] begins")
    planned = _begun(found, planned_samples, batch_size)
    live = {part for index in planned for part in phases[index].parts}
    if never := [part for part in trained if part not in live]:
        last = (planned_samples - 1) // batch_size * batch_size
        raise UserError(
            f"rules train {', '.join(never)}, but no phase of the run does: the last of its "
            f"{planned_samples:,} samples begin a step at {last:,}",
            "Name it in [[train.phases]] before that, train for longer, or freeze it.",
        )
    return found


def _begun(plan: PhasePlan, samples: int, batch_size: int) -> set[int]:
    """Phases that get a step: one begins with the first step that starts in it."""
    return {
        index
        for start, index in plan.starts(samples)
        if -(-start // batch_size) * batch_size < samples
    }


def _check_phase(number: int, phase: PhaseSection, trained: Sequence[str], batch: int) -> None:
    where = f"phase {number} of [[train.phases]]"
    for part in phase.parts:
        if part not in trained:
            near = nearest(part, list(trained))
            raise UserError(
                f"{where} names {part!r}, of which nothing trains",
                f"{f'Did you mean {near}? ' if near else ''}By the rules: {', '.join(trained)}.",
            )
    if phase.samples < batch:
        raise UserError(
            f"{where} has {phase.samples:,} samples, fewer than a step's {batch:,}",
            "Make it longer; a phase begins with the first step that starts in it.",
        )


def split_by_part(plan: FreezePlan) -> FreezePlan:
    """The same plan with no group across parts, so that each group trains or rests as a whole."""
    groups = []
    for group in plan.groups:
        by_part: dict[str, dict[str, nn.Parameter]] = {}
        for path, parameter in group.parameters.items():
            by_part.setdefault(path.split(".")[0], {})[path] = parameter
        for part, parameters in by_part.items():
            name = group.name if len(by_part) == 1 else f"{group.name} ({part})"
            groups.append(ParameterGroup(name, group.lr, parameters))
    return replace(plan, groups=groups)


class PhaseSwitch:
    """Puts a phase into effect.

    Args:
        plan: the phases.
        trained: every parameter that a rule trains, by path.
        networks: all parts of the model; their modes follow the phase.
    """

    def __init__(
        self,
        plan: PhasePlan,
        trained: Mapping[str, nn.Parameter],
        networks: Mapping[str, nn.Module],
    ) -> None:
        self.plan, self.trained, self.networks = plan, trained, networks
        self.index: int | None = None
        self._homes: dict[tuple[str, str], torch.device] = {}

    def enter(self, samples_seen: int, optimizer: torch.optim.Optimizer) -> bool:
        """Let the parts of the phase train and the others rest; whether that is a change."""
        index = self.plan.at(samples_seen)
        if index == self.index:
            return False
        self.index = index
        live = self.plan.phases[index].parts
        for path, parameter in self.trained.items():
            is_live = path.split(".")[0] in live
            parameter.requires_grad_(is_live)
            if not is_live:
                parameter.grad = None
            if parameter in optimizer.state:
                self._move(path, optimizer.state[parameter], is_live=is_live)
        set_modes(self.networks)
        return True

    def _move(self, path: str, state: dict[str, object], *, is_live: bool) -> None:
        """Bring a parameter's state back, or put it aside on the CPU."""
        for name, value in state.items():
            if not isinstance(value, Tensor) or is_spread(value):
                continue
            if is_live:
                home = self._homes.pop((path, name), value.device)
                state[name] = value.to(home)
            elif value.device.type != "cpu":
                self._homes[path, name] = value.device
                state[name] = value.to("cpu")


@contextmanager
def resting_left_out(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Only groups that train now, for the length of a step: the others are not even counted on."""
    every = optimizer.param_groups
    optimizer.param_groups = [g for g in every if any(p.requires_grad for p in g["params"])]
    try:
        yield
    finally:
        optimizer.param_groups = every
