"""Draw the checkpoints of a run as they appear, in a process of its own, on another device.

The run's folder is only read. What was drawn lies in a folder of its own and is never drawn twice.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from sdprep.console import say, warn
from sdprep.errors import DataError, UserError
from sdtrain import checkpoint
from sdtrain.grid import Axes, Row, draw_row, spread_in, write_grid
from sdtrain.in_turn import Candidate, InTurn, of_checkpoint
from sdtrain.outputs import require_folder
from sdtrain.recipe import load_train_recipe
from sdtrain.run_folder import RunFolder
from sdtrain.stopping import StopRequest
from sdtrain.trackers.jsonl import last_error, read_metrics
from sdtrain.validate import BASE

GRID, ROWS, ROW = "grid.png", "rows", "row.json"
REFRESH_SECONDS = 60
_NAP_SECONDS = 0.5


class Follower:
    """Draws what a run's folder has and its own has not.

    Args:
        run: a run folder.
        axes: what to draw.
        to: a folder of its own.
        embedding: as for a grid.
        device: where to draw; default: as the recipe says.

    Raises:
        UserError: it is no run folder, or `to` lies inside it.
    """

    def __init__(
        self,
        run: Path,
        axes: Axes,
        to: Path,
        *,
        embedding: str | None = None,
        device: str | None = None,
    ) -> None:
        self.run, self.to = RunFolder(run), to
        if not self.run.recipe.is_file():
            raise DataError(f"{run} is no run folder: it has no {self.run.recipe.name}")
        if to.resolve().is_relative_to(run.resolve()):
            raise UserError(
                f"--to {to} lies inside the run that is followed", "Nothing is written there."
            )
        require_folder(to)
        recipe = load_train_recipe(self.run.recipe)
        self.base = Candidate(BASE, recipe)
        self.axes = axes.filled(recipe)
        self.spread, self.space = spread_in(embedding, device)
        self.models = InTurn(device)
        self.left_out: set[str] = set()
        self.is_up_to_date = False

    def look(self, stop: Callable[[], bool]) -> list[str]:
        """Draw what is new, and renew the grid after each; returns the labels."""
        drawn = []
        for name, path in self._there():
            if stop():
                break
            if self._draw(name, path):
                self.write()
                drawn.append(name)
        if not self.is_up_to_date:  # such as after a kill between a row and the grid
            self.write()
        return drawn

    def write(self, *, is_last: bool = False) -> dict[str, Any]:
        """Renew grid and page from the rows that are there."""
        rows = self.rows()
        if not rows:
            return {"path": None, "page": None, "rows": [], "columns": self.axes.columns}
        self.is_up_to_date = True
        refresh = None if is_last else REFRESH_SECONDS
        return write_grid(rows, self.axes, self.to / GRID, self.space, refresh_seconds=refresh)

    def rows(self) -> list[Row]:
        """Everything drawn under these very axes: the base model first, then by clock."""
        names = [path.parent.name for path in (self.to / ROWS).glob(f"*/{ROW}")]
        whole = [name for name in names if name == BASE or name.isdecimal()]  # others: of a kill
        order = sorted(whole, key=lambda name: (name != BASE, int(name) if name != BASE else 0))
        found = []
        for name in order:
            place = self.to / ROWS / name
            about = json.loads((place / ROW).read_text(encoding="utf-8"))
            if about["axes"] == self._axes_as_json():
                cells = [place / file for file in about["files"]]
                found.append(Row(about["label"], cells, about["spreads"]))
        return found

    @property
    def is_finished(self) -> bool:
        """Whether the run has saved its last checkpoint."""
        newest = checkpoint.checkpoints(self.run.checkpoints)[-1:]
        if not newest:
            return False
        clock = int(newest[0].name)
        ends = [x["samples_seen"] for x in read_metrics(self.run.metrics) if x["kind"] == "verdict"]
        if self.run.environment.is_file():
            facts = json.loads(self.run.environment.read_text(encoding="utf-8"))
            ends.append(facts["total_samples"])
        return any(clock >= end for end in ends[-2:])

    @property
    def error(self) -> str | None:
        """What the run died of; None while it trains, and once it has gone on."""
        return None if self.run.is_claimed else last_error(read_metrics(self.run.metrics))

    def _there(self) -> Sequence[tuple[str, Path | None]]:
        found = checkpoint.checkpoints(self.run.checkpoints)
        return [(BASE, None), *((path.name, path) for path in found)]

    def _draw(self, name: str, path: Path | None) -> bool:
        """Draw one row if it is new; a checkpoint that is cleaned up meanwhile is left out."""
        place = self.to / ROWS / name
        try:
            source = _source(path)
            if (name, source) in self._known(place) or f"{name} {source}" in self.left_out:
                return False
            candidate = self.base if path is None else of_checkpoint(path)
            family = self.models.family(candidate)
        except (DataError, OSError) as error:
            if path is None:
                raise
            self._leave_out(name, path, error)
            return False
        say(f"drawing {candidate.label}")
        pictures, spreads = draw_row(family, candidate, self.axes, self.spread)
        scratch = place.with_name(f".{name}.new")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        files = [f"{at:03d}.png" for at in range(len(pictures))]
        for file, picture in zip(files, pictures, strict=True):
            picture.save(scratch / file)
        about = {
            "label": candidate.label,
            "source": source,
            "axes": self._axes_as_json(),
            "files": files,
            "spreads": spreads,
        }
        (scratch / ROW).write_text(json.dumps(about, indent=1), encoding="utf-8", newline="\n")
        shutil.rmtree(place, ignore_errors=True)
        os.replace(scratch, place)
        return True

    def _leave_out(self, name: str, path: Path, error: Exception) -> None:
        """Say why a checkpoint is not drawn; once, if it stays."""
        try:
            self.left_out.add(f"{name} {_source(path)}")
            gone = ""
        except OSError:
            gone = " (it was removed meanwhile)"
        warn(f"checkpoint {name} is left out{gone}: {error}")

    def _known(self, place: Path) -> list[tuple[str, str]]:
        if not (place / ROW).is_file():
            return []
        about = json.loads((place / ROW).read_text(encoding="utf-8"))
        return [(place.name, about["source"])] if about["axes"] == self._axes_as_json() else []

    def _axes_as_json(self) -> dict[str, Any]:
        # The run, too: rows of another one that was followed into this folder are no rows of it.
        own = {**asdict(self.axes), "space": self.space, "run": str(self.run.path.resolve())}
        found: dict[str, Any] = json.loads(json.dumps(own))
        return found


def _source(path: Path | None) -> str:
    """What tells a checkpoint from another of the same clock, such as after a fresh start."""
    if path is None:
        return BASE
    return blake2b((path / checkpoint.STATE).read_bytes(), digest_size=16).hexdigest()


def follow(follower: Follower, every_seconds: float) -> dict[str, Any]:
    """Look again and again until the run has finished or died of an error, or Ctrl-C.

    Returns:
        as a grid, whether the run has finished, and the error that it ended by, if any.
    """
    with StopRequest("finishing the row that is being drawn") as stop:
        while True:
            # Asked before looking: what is saved while drawing is drawn in the next round.
            is_finished, error = follower.is_finished, follower.error
            follower.look(lambda: stop.is_set)
            if is_finished or error or stop.is_set:
                break
            until = time.monotonic() + every_seconds
            while time.monotonic() < until and not stop.is_set:
                time.sleep(min(_NAP_SECONDS, max(0.0, until - time.monotonic())))
    if error:
        warn(f"{follower.run.path} ended by an error: {error}")
        say("when it goes on, the same command draws what comes then")
    found = follower.write(is_last=True)
    return {**found, "run_is_finished": is_finished, "run_error": error}
