"""Where a run stands after an evaluation: its verdict, its best checkpoint, whether to stop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from sdprep.errors import DataError
from sdprep.recipe import Section
from sdtrain.verdict import HELD_OUT, Verdict, judge, words
from sdtrain.wording import amount

if TYPE_CHECKING:
    from sdtrain.stable_eval import ProbeSet

BEST = "best"
"""File in `checkpoints/` that names the best one; it may be given as a path of a checkpoint."""
STOPPERS = ("overfitting", "damaged")


class StopSection(Section):
    """Early stopping: end a run when its evaluations show, with evidence, that it gets worse."""

    patience: int = Field(
        3, ge=1, description="Evaluations in a row that must call overfitting or damage."
    )


@dataclass(frozen=True)
class Course:
    """A run after an evaluation.

    Args:
        verdict: of everything up to now.
        is_best: whether the newest evaluation of held-out images is the best one.
        stop: why the run should end now; None: go on.
    """

    verdict: Verdict
    is_best: bool
    stop: str | None

    @property
    def best(self) -> int | None:
        """Clock of the best evaluation on held-out images, if there was training before it."""
        return self.verdict.best.samples_seen if self.verdict.best else None

    def to_json(self, samples_seen: int) -> dict[str, Any]:
        """The last line of the metrics."""
        line = {"kind": "verdict", "samples_seen": samples_seen, **self.verdict.to_json()}
        return {**line, "stopped_early": self.stop}


def look_back(probes: Sequence[ProbeSet], stop: StopSection | None) -> Course:
    """Judge a run by the evaluations that its sets hold; the same after a resume.

    Args:
        probes: the sets with their history.
        stop: the recipe's rule; None: never stop early.
    """
    history = {each.probe.name: each.history for each in probes}
    verdict = judge(history, {each.probe.name: each.probe.u() for each in probes})
    newest = max(history.get(HELD_OUT, {}), default=None)
    is_best = verdict.best is not None and verdict.best.samples_seen == newest
    return Course(verdict, is_best, _why_stop(history, verdict, stop))


def _why_stop(
    history: dict[str, dict[int, np.ndarray]], verdict: Verdict, stop: StopSection | None
) -> str | None:
    if stop is None or verdict.word not in STOPPERS:
        return None
    last = words(history, stop.patience)
    if len(last) < stop.patience or any(word not in STOPPERS for word in last):
        return None
    return f"{verdict.word} at {amount(stop.patience, 'evaluation')} in a row"


# --- the best checkpoint -------------------------------------------------------------------------


def point_to_best(checkpoints: Path, verdict: Verdict) -> None:
    """Write `checkpoints/best`, a small file that names the best checkpoint that is there."""
    best = verdict.best
    if best is None or not (checkpoints / str(best.samples_seen)).is_dir():
        (checkpoints / BEST).unlink(missing_ok=True)
        return
    entry = {
        "checkpoint": str(best.samples_seen),
        "mean": best.mean,
        "change_percent": best.change_percent,
        "cannot_be_told_from": [clock for clock in best.ties if clock != best.samples_seen],
    }
    scratch = checkpoints / f".{BEST}.new"
    scratch.write_text(json.dumps(entry) + "\n", encoding="utf-8", newline="\n")
    scratch.replace(checkpoints / BEST)


def followed(path: Path) -> Path:
    """The checkpoint that `RUN/checkpoints/best` names; any other path as it is."""
    if path.name != BEST or not path.is_file():
        return path
    try:
        return path.with_name(str(json.loads(path.read_text(encoding="utf-8"))["checkpoint"]))
    except (ValueError, KeyError, TypeError):
        return path


def meant(path: Path) -> Path:
    """What a user means by a path: `RUN/checkpoints/best` stands for what it names.

    Raises:
        DataError: that file is damaged, or what it names is not there.
    """
    found = followed(path)
    if path.name == BEST and path.is_file() and not found.is_dir():
        what = "is damaged" if found == path else f"names {found.name}, which is not there"
        raise DataError(f"{path} {what}", f"Give one of the checkpoints in {path.parent}.")
    return found
