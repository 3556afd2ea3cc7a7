"""The outcome of the freezing rules: a table, parameter groups, and proof of what stayed still."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sdprep.errors import UserError
from sdtrain.tensor_hashes import tensor_hashes


@dataclass(frozen=True)
class PlanRow:
    """One line of the printed table: what one rule decides within one part.

    Args:
        part: the network, such as `unet`.
        rule: the glob that won, or why nothing is trained.
        num_tensors: tensors of the base model that the rule decides.
        num_trained: parameters among them that train; with an adapter, those that it adds.
        num_total: parameters of the tensors that the rule decides.
        percent: trained parameters in percent of all the part's own.
        lr: peak learning rate, 0 if frozen.
    """

    part: str
    rule: str
    num_tensors: int
    num_trained: int
    num_total: int
    percent: float
    lr: float

    def cells(self) -> list[str]:
        """The line as text, one cell a column."""
        counts = f"{self.num_trained:,} / {self.num_total:,}"
        lr = f"{self.lr:g}" if self.lr else "frozen"
        return [self.part, self.rule, f"{self.num_tensors:,}", counts, f"{self.percent:.4f}", lr]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate; named by the rule's glob."""

    name: str
    lr: float
    parameters: dict[str, nn.Parameter]


@dataclass(frozen=True)
class FreezePlan:
    """What trains and what does not, already applied to a model.

    Args:
        rows: the table, in the order of parts and rules.
        groups: what the optimizer owns.
        frozen: every other parameter of the base model by canonical path.
        notes: sentences that the user should see.
    """

    rows: list[PlanRow]
    groups: list[ParameterGroup]
    frozen: dict[str, nn.Parameter]
    notes: list[str] = field(default_factory=list)

    def trained(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by path."""
        return {path: p for group in self.groups for path, p in group.parameters.items()}

    def optimizer_groups(self, *, with_paths: bool = False) -> list[dict[str, Any]]:
        """Groups for `torch.optim`: `params`, `lr` and `name`, and `paths` if they are wanted."""
        return [
            {"params": list(g.parameters.values()), "lr": g.lr, "name": g.name}
            | ({"paths": list(g.parameters)} if with_paths else {})
            for g in self.groups
        ]

    def percent(self, part: str) -> float:
        """Trained parameters of a part in percent of all its own."""
        return sum(row.percent for row in self.rows if row.part == part)

    def table(self) -> str:
        """The plan as text: part, rule, tensors, trained / total, percent, learning rate."""
        lines = [["part", "rule", "tensors", "trained / total", "%", "lr"]]
        lines += [row.cells() for row in self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(6)]
        text = []
        for line in lines:
            left = [line[column].ljust(widths[column]) for column in (0, 1)]
            right = [line[column].rjust(widths[column]) for column in range(2, 6)]
            text.append("  ".join(left + right))
        return "\n".join([*text, *self.notes])

    def check_expected(self, expect_percent: Mapping[str, float], within: float = 0.01) -> None:
        """Compare with `train.expect_percent`.

        Raises:
            UserError: a part trains another share than the recipe expects.
        """
        parts = list(dict.fromkeys(row.part for row in self.rows))
        for part, expected in expect_percent.items():
            if part not in parts:
                raise UserError(
                    f"train.expect_percent names {part!r}, which this model does not have",
                    f"There are: {', '.join(parts)}.",
                )
            if abs(self.percent(part) - expected) > within:
                raise UserError(
                    f"train.expect_percent says {expected} % of {part} (± {within}), "
                    f"but {self.percent(part):.4f} % would train",
                    f"The plan is:\n{self.table()}",
                )

    def frozen_hashes(self) -> dict[str, str]:
        """Hash of every frozen tensor by canonical path."""
        return tensor_hashes(self.frozen.items())

    def assert_frozen(self, start: Mapping[str, str]) -> None:
        """Check that training left the frozen tensors alone; `start` is `frozen_hashes()` before.

        Raises:
            AssertionError: a frozen tensor has a gradient, or other bytes than at the start.
        """
        for path, parameter in self.frozen.items():
            assert parameter.grad is None, f"frozen {path} has a gradient"
            assert not parameter.requires_grad, f"frozen {path} requires a gradient"
        now = self.frozen_hashes()
        changed = [path for path, value in now.items() if start[path] != value]
        assert not changed, f"frozen tensors changed: {', '.join(changed[:5])}"
