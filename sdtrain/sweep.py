"""A small grid of runs, one after another or one per GPU, compared on one probe at the end.

Every cell is a run folder of its own with all that a run has, so a sweep that was stopped goes on
where each of its runs stopped, and any cell can be looked at, resumed or exported by itself.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from sdprep.console import progress, say, warn
from sdprep.errors import DataError, RecipeError, UserError
from sdprep.seeding import digest
from sdtrain.compare import Pair, compare_measured
from sdtrain.launch import PARENT_PIPE, require_one_process
from sdtrain.matrices import Measured, find
from sdtrain.outputs import require_folder
from sdtrain.recipe import TrainRecipe, load_train_recipe
from sdtrain.stopping import StopRequest
from sdtrain.toml_text import toml_line
from sdtrain.wording import percent, span

OUTCOME = "sweep-cell.json"
LOG = "sweep-cell.log"
POLL_SECONDS = 0.2
MOST_CHARACTERS = 60
"""Of a value in a folder name, which file systems bound."""
JUDGES = ("validation", "train_probe")
"""The sets that may decide; held-out images, if there are any."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Args:
        name: its settings, as a folder name.
        settings: `--set` texts, those of the whole sweep first.
        recipe: what they make of the recipe.
        key: digest of it, so that a changed cell is run again.
    """

    name: str
    settings: tuple[str, ...]
    recipe: TrainRecipe
    key: str

    @property
    def output(self) -> Path:
        """Its run folder."""
        return self.recipe.output

    @property
    def outcome(self) -> dict[str, Any] | None:
        """What its finished run printed; None if it has not finished under this very recipe."""
        try:
            found = json.loads((self.output / OUTCOME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return dict(found["outcome"]) if found.get("key") == self.key else None


def plan_cells(
    path: Path, settings: Sequence[str], over: Sequence[str], to: Path | None
) -> list[Cell]:
    """Every combination of the values, checked as recipes before anything runs.

    Args:
        path: the recipe.
        settings: `--set` texts for all cells.
        over: `key=value,value,…` texts.
        to: folder of the run folders; default: the recipe's output with `-sweep` behind it.

    Raises:
        RecipeError: no axis, an empty one, one twice, or a value that the recipe refuses.
    """
    axes = dict(_axis(text) for text in over)
    if "output" in axes:
        raise RecipeError("--over output: every run gets a folder of its own below --to")
    if not axes or len(axes) < len(over):
        raise RecipeError(
            "--over: expected at least one key=value,value,… and every key once",
            "Such as --over train.lr=1e-6,3e-6 --over data.batch_size=4,16.",
        )
    folder = require_folder(to or _sweep_folder(path, settings))
    cells = []
    for values in product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        name = "_".join(f"{key.rpartition('.')[2]}={_word(value)}" for key, value in chosen.items())
        own = [f"{key}={value}" for key, value in chosen.items()]
        whole = (*settings, *own, f"output={_toml(str(folder / name))}")
        recipe = load_train_recipe(path, whole)
        resolved = json.dumps(recipe.resolved(), sort_keys=True, default=str)
        cells.append(Cell(name, whole, recipe, digest("sweep cell", resolved)))
    if len({cell.name for cell in cells}) < len(cells):
        raise RecipeError(
            f"--over: two combinations have one name among {', '.join(c.name for c in cells)}",
            "Every value may be named once, and the last parts of the keys must differ.",
        )
    return cells


def _axis(text: str) -> tuple[str, list[str]]:
    """A key and its values, each as a `--set` text would write it."""
    key, equals, listed = text.partition("=")
    try:
        values = [_toml(value) for value in tomllib.loads(f"v = [{listed}]")["v"]]
    except (tomllib.TOMLDecodeError, TypeError):  # words such as lora,dora; dates
        values = [value.strip() for value in listed.split(",")]
    if not equals or not key.strip() or not values or "" in values:
        raise RecipeError(f"--over {text}: expected key=value,value,…")
    return key.strip(), values


def _toml(value: Any) -> str:
    return toml_line({"v": value}).removeprefix("v = ")


def _word(value: str) -> str:
    last = re.split(r"[/\\]", value.strip("\"'/"))[-1]  # of a path, its name
    word = re.sub(r"[^A-Za-z0-9.+-]+", "-", last).strip("-.") or "empty"
    if len(word) <= MOST_CHARACTERS:
        return word
    return f"{word[: MOST_CHARACTERS - 9].rstrip('-.')}-{digest('sweep value', value)[:8]}"


def _sweep_folder(path: Path, settings: Sequence[str]) -> Path:
    output = load_train_recipe(path, settings).output
    return output.with_name(f"{output.name}-sweep")


# --- running -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """A cell that is being run.

    Args:
        cell: which.
        process: its own.
        printed: what it prints on stdout; a file of nobody else, such as a second sweep.
    """

    cell: Cell
    process: subprocess.Popen[bytes]
    printed: IO[bytes]

    def printed_text(self) -> str:
        """All of it, once; the file is gone afterwards."""
        with self.printed as file:
            file.seek(0)
            return file.read().decode("utf-8")


def run_cells(path: Path, cells: Sequence[Cell], gpus: int) -> dict[str, str]:
    """Run what has not finished.

    Args:
        path: the recipe.
        cells: all of them.
        gpus: runs at a time, each with a GPU of its own; 1: one after another on what there is.

    Returns:
        why cells failed, by name.

    Raises:
        UserError: a launcher started several sweeps, or it was interrupted; the runs have then
            saved and can go on.
    """
    require_one_process("sweep", "Start it without one; --gpus N makes N runs at a time.")
    waiting = [cell for cell in cells if cell.outcome is None]
    say(f"{len(cells)} runs, {len(cells) - len(waiting)} of them done before")
    running: dict[int, Running] = {}
    failed: dict[str, str] = {}
    asked: set[int] = set()  # of the processes that were told to stop
    with progress("runs", len(waiting), "runs") as bar, StopRequest("the runs save first") as stop:
        try:
            while (waiting and not stop.is_set) or running:
                for slot in range(gpus):
                    if slot not in running and waiting and not stop.is_set:
                        cell = waiting.pop(0)
                        running[slot] = _start(path, cell, slot if gpus > 1 else None)
                for slot, each in list(running.items()):
                    if each.process.poll() is not None:
                        del running[slot]
                        bar.advance(1)
                        reason = _finish(each)
                        if reason is not None:
                            failed[each.cell.name] = reason
                    elif stop.is_set and each.process.pid not in asked:
                        asked.add(each.process.pid)
                        _ask_to_stop(each.process)
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:  # asked twice
            for each in running.values():
                each.process.kill()
                each.process.wait()
    if stop.is_set:
        raise UserError("the sweep was stopped", "Run the same command to go on.")
    return failed


def _ask_to_stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C would; on Windows by the one signal that another group can be sent."""
    process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT))


def _start(path: Path, cell: Cell, gpu: int | None) -> Running:
    """One run in a process of its own: what it leaves in memory or breaks is no other's."""
    say(f"run {cell.name}")
    cell.output.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, PARENT_PIPE: "1"}  # it ends when this process is gone
    if gpu is not None:
        visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[gpu] if visible[0] else str(gpu)
    printed = TemporaryFile()  # noqa: SIM115 - read when the run has ended
    with (cell.output / f".{LOG}").open("ab") as log:
        # A group of its own: Ctrl-C reaches this process only, which passes it on once.
        process = subprocess.Popen(
            _command(path, cell),
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=log,
            env=environment,
            start_new_session=os.name != "nt",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
    return Running(cell, process, printed)


def _command(path: Path, cell: Cell) -> list[str]:
    settings = [part for text in cell.settings for part in ("--set", text)]
    run = [sys.executable, "-m", "sdtrain.cli", "run", str(path), "--json", "--no-model"]
    return [*run, *settings]


def _finish(running: Running) -> str | None:
    """Keep what a run printed; why it has not finished, or None."""
    cell, status = running.cell, running.process.returncode
    log = cell.output / f".{LOG}"
    try:
        outcome = json.loads(running.printed_text())
    except ValueError:
        outcome = None
    if status or outcome is None:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = next((line for line in reversed(lines) if line.startswith("error")), None)
        reason = said or (lines[-1] if lines else "it said nothing")
        warn(f"{cell.name} failed with exit status {status}: {reason} (all of it: {log})")
        return reason
    if not outcome["is_finished"]:
        warn(f"{cell.name} stopped at {outcome['samples_seen']:,} samples")
        return f"stopped at {outcome['samples_seen']:,} samples"
    kept = {"key": cell.key, "settings": list(cell.settings), "outcome": outcome}
    temporary = cell.output / f".{OUTCOME}.tmp"
    temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    temporary.replace(cell.output / OUTCOME)
    return None


# --- comparing -----------------------------------------------------------------------------------


def compare_cells(cells: Sequence[Cell], failed: dict[str, str]) -> dict[str, Any]:
    """Rank the finished runs by the loss at their end, each compared with the lowest.

    Returns:
        what `--json` prints.
    """
    found = {cell.name: _measured(cell) for cell in cells if cell.outcome is not None}
    judge = next((name for name in JUDGES if any(name in sets for sets in found.values())), None)
    ends = {name: sets[judge] for name, sets in found.items() if judge and judge in sets}
    means = {name: measured.load().mean for name, measured in ends.items()}
    ranked = sorted(means, key=lambda name: (means[name], name))
    pairs = dict(_against_the_lowest(ranked, ends))
    for name in [name for name, pair in pairs.items() if pair.found.is_same]:
        warn(
            f"{name} ended with the very losses of {ranked[0]}: what they differ in did nothing, "
            "as train.lr does where later rules win; the log of either may say more"
        )
    outcomes = {cell.name: cell.outcome or {} for cell in cells}
    runs = [
        {
            "name": cell.name,
            "path": str(cell.output),
            "mean": means.get(cell.name),
            "verdict": outcomes[cell.name].get("verdict"),
            "against_the_lowest": pairs[cell.name].to_json() if cell.name in pairs else None,
            "failed": failed.get(cell.name),
        }
        for cell in sorted(
            cells, key=lambda c: (c.name not in means, means.get(c.name, 0.0), c.name)
        )
    ]
    return {"set": judge, "lowest": ranked[0] if ranked else None, "runs": runs}


def _measured(cell: Cell) -> dict[str, Measured]:
    """The evaluations of a finished run; none, with a warning, where there are none to read."""
    try:
        return find(cell.output)
    except DataError as error:
        warn(f"{cell.name} is done but cannot be compared: {error.message}")
        return {}


def _against_the_lowest(
    ranked: Sequence[str], ends: dict[str, Measured]
) -> Iterator[tuple[str, Pair]]:
    """Comparisons that share the lowest one's probe; others are named and left out."""
    if not ranked:
        return
    lowest = ends[ranked[0]]
    same = [n for n in ranked[1:] if ends[n].probe.probe_id == lowest.probe.probe_id]
    for name in ranked[1:]:
        if name not in same:
            warn(f"{name} was measured on another probe than {ranked[0]}: not compared")
    yield from zip(same, compare_measured([(lowest, ends[name]) for name in same]), strict=True)


def report(found: dict[str, Any]) -> str:
    """What `sdtrain sweep` prints: the lowest first, the others against it."""
    width = max(len(run["name"]) for run in found["runs"])
    lines = [f"loss of {found['set'] or 'nothing'} at the end of each run, the lowest first"]
    for run in found["runs"]:
        head = f"  {run['name']:<{width}}"
        if run["mean"] is None:
            lines.append(f"{head}  {run['failed'] or 'was not evaluated'}")
            continue
        pair = run["against_the_lowest"]
        tail = "the lowest" if run["name"] == found["lowest"] else "on another probe"
        if pair is not None:
            tail = (
                f"{percent(pair['change_percent'])}  95 % {span(pair['ci95_percent'])}, "
                f"new images {span(pair['ci95_new_images_percent'])}: {pair['verdict']}"
            )
        lines.append(f"{head}  {run['mean']:.6f}  {tail}")
    return "\n".join([*lines, "intervals are against the lowest; verdicts allow for many looks"])
