"""Checkpoints: what a run needs to go on as if it had never stopped.

A checkpoint is the folder `checkpoints/<samples_seen>/`. It is written under another name, synced
to disk and renamed, so a kill leaves either all of it or none. Tensors are safetensors, everything
else is JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdprep.console import say
from sdprep.errors import DataError, UserError
from sdtrain.checksums import checksums, why_changed
from sdtrain.disk import as_os_error
from sdtrain.engine import Engine, laid_out_like
from sdtrain.formats.tensor_files import save_tensors
from sdtrain.world import ALONE

WHOLE_HERE = Engine(ALONE)
FORMAT_VERSION = 1
TRAINED, OPTIMIZER, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Snapshot:
    """Everything that is saved.

    Args:
        state: JSON: clock, recipe, fingerprints, histories, optimizer groups.
        trained: trained parameters by canonical path.
        optimizer: optimizer tensors, `<path>/<name>`.
        more: what only some runs have, such as `ema`; each a file of its own, by canonical path.
    """

    state: dict[str, Any]
    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    more: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def samples_seen(self) -> int:
        """The clock."""
        return int(self.state["samples_seen"])


# --- the optimizer's state, by parameter path ----------------------------------------------------


def optimizer_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    take: Callable[[Tensor], Tensor] = WHOLE_HERE.take,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take an optimizer apart into tensors and plain values.

    Args:
        optimizer: any of torch's kind.
        names: `id(parameter)` to canonical path.
        take: brings a tensor to the CPU, whole.

    Returns:
        tensors by `<path>/<name>`, on the CPU the optimizer's own, so write them before the next
        step; and plain values: groups and per-parameter ones.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    places: set[int] = set()
    for parameter, entries in optimizer.state.items():
        path = names[id(parameter)]
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensor = take(value)
                if tensor.data_ptr() in places:  # safetensors refuses tensors that share memory
                    tensor = tensor.clone()
                places.add(tensor.data_ptr())
                tensors[f"{path}/{name}"] = tensor
            else:
                plain.setdefault(path, {})[name] = value
    groups = [
        {k: v for k, v in group.items() if k != "params" and not isinstance(v, Tensor)}
        for group in optimizer.param_groups
    ]
    return tensors, {"groups": groups, "values": plain}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Any],
) -> None:
    """Put saved state into an optimizer made from the same rules.

    Parameters that the checkpoint does not know start fresh; that happens only after an accepted
    change of the rules. An optimizer that counts in its groups lists those keys in an attribute
    `counted_keys`.
    """
    by_path: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        path, _, name = key.rpartition("/")
        by_path.setdefault(path, {})[name] = tensor
    for path, values in plain["values"].items():
        by_path.setdefault(path, {}).update(values)
    current, counted = optimizer.state_dict(), getattr(optimizer, "counted_keys", ())
    order = [p for group in optimizer.param_groups for p in group["params"]]
    paths = [names[id(parameter)] for parameter in order]
    current["state"] = {
        at: {name: _laid_out(value, order[at]) for name, value in by_path[path].items()}
        for at, path in enumerate(paths)
        if path in by_path
    }
    saved_groups = {group.get("name"): group for group in plain["groups"]}
    for group in current["param_groups"]:
        saved = saved_groups.get(group.get("name"), {})
        # Rates and settings come from the recipe; only what the optimizer itself counts is old.
        group.update({k: v for k, v in saved.items() if k not in group or k in counted})
    optimizer.load_state_dict(current)


def _laid_out(value: Any, parameter: Tensor) -> Any:
    return laid_out_like(value, parameter) if isinstance(value, Tensor) else value


# --- writing -------------------------------------------------------------------------------------


def write(folder: Path, snapshot: Snapshot, keep: int, best: int | None = None) -> Path:
    """Save a snapshot as `<folder>/<samples_seen>` and drop the oldest beyond `keep`.

    Args:
        folder: `checkpoints/` of the run.
        snapshot: what to save.
        keep: how many of the newest stay.
        best: clock of one that stays besides, however old.

    Raises:
        UserError: the disk is full or not writable; what was there before is untouched.
    """
    final = folder / str(snapshot.samples_seen)
    temporary = folder / f".writing-{snapshot.samples_seen}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(temporary)
        temporary.mkdir()
        _write_files(temporary, snapshot)
        _put_in_place(temporary, final)
    except Exception as error:  # safetensors has errors of its own for what the disk says
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError) and as_os_error(error) is None:
            raise
        raise UserError(
            f"cannot write checkpoint {final}: {error}",
            "Earlier checkpoints are untouched. Free some space, then run the same command again.",
        ) from error
    for old in checkpoints(folder)[:-keep]:
        if old not in (final, folder / str(best)):
            _drop(old)
    return final


def _drop(old: Path) -> None:
    """Remove a checkpoint so that nobody, also not after a kill, ever meets half of it."""
    dropped = old.with_name(f".dropped-{old.name}")
    with suppress(OSError):  # such as a file in it that is open, on Windows
        _clear(dropped)
        old.replace(dropped)
    shutil.rmtree(dropped, ignore_errors=True)


def _write_files(folder: Path, snapshot: Snapshot) -> None:
    about = json.dumps(
        {k: snapshot.state.get(k) for k in ("samples_seen", "recipe", "data", "versions")}
    )
    save_tensors(folder / TRAINED, snapshot.trained, {"sdtrain": about})
    save_tensors(folder / OPTIMIZER, snapshot.optimizer, {})
    for name, tensors in snapshot.more.items():
        save_tensors(folder / f"{name}.safetensors", tensors, {})
    more = {"more": sorted(snapshot.more)} if snapshot.more else {}
    files = {"files": checksums(sorted(folder.iterdir()))}
    state = json.dumps({**snapshot.state, **more, **files}, ensure_ascii=False, indent=1)
    (folder / STATE).write_text(state, encoding="utf-8", newline="\n")
    for file in sorted(folder.iterdir()):
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    _sync_folder(folder)


def _put_in_place(temporary: Path, final: Path) -> None:
    replaced = final.with_name(f".replaced-{final.name}")
    _clear(replaced)
    if final.exists():  # an earlier future of this run, left after going back to an older one
        final.replace(replaced)
    temporary.replace(final)
    _sync_folder(final.parent)
    _clear(replaced)


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system lets folders be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing; a kill between two renames is mended first."""
    if not folder.is_dir():
        return
    for left in sorted(folder.glob(".replaced-*")):
        final = folder / left.name.removeprefix(".replaced-")
        if not final.exists():
            left.replace(final)
    for kind in ("writing", "replaced", "dropped"):
        for left in folder.glob(f".{kind}-*"):
            shutil.rmtree(left, ignore_errors=True)


def set_aside_newer(folder: Path, samples_seen: int) -> None:
    """Rename checkpoints beyond the clock, after the user went back to an older one.

    They would otherwise be taken for the newest of the new course.
    """
    for newer in checkpoints(folder):
        if int(newer.name) > samples_seen:
            aside = newer.with_name(f"{newer.name}-before-going-back-to-{samples_seen}")
            _clear(aside)
            newer.replace(aside)
            say(f"set aside: {aside}")


# --- reading -------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint.

    Raises:
        DataError: it is no checkpoint, is damaged, or another release wrote it.
    """
    file = path / STATE
    _must_be_there(path)
    if not file.is_file():
        raise DataError(f"{path} is no checkpoint of sdtrain: it has no {STATE}", older_than(path))
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is damaged: {error}", older_than(path) or NO_OLDER_ONE) from None
    found = state.get("format_version") if isinstance(state, dict) else None
    if found != FORMAT_VERSION:
        raise DataError(f"{path} has format version {found}, expected {FORMAT_VERSION}")
    return dict(state)


def _must_be_there(path: Path) -> None:
    if not path.is_dir():
        raise DataError(
            f"{path} is no checkpoint: it is not there, or not any more",
            "A run keeps the newest few; checkpoint.keep in its recipe says how many.",
        )


def read_trained(path: Path) -> dict[str, Tensor]:
    """Trained parameters of a checkpoint by canonical path.

    Raises:
        DataError: the file is missing or damaged.
    """
    return _tensors(path / TRAINED, read_state(path))


def read_weights(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The weights of a checkpoint by canonical path: those that trained, or their average.

    Raises:
        DataError: a file is missing or damaged, or the run averaged nothing.
    """
    if not ema:
        return read_trained(path)
    must_hold_average(path)
    return _tensors(path / "ema.safetensors", read_state(path))


def must_hold_average(path: Path) -> None:
    """Refuse a checkpoint without averaged weights.

    Raises:
        DataError: its run averaged nothing.
    """
    if "ema" not in read_state(path).get("more", []):
        raise DataError(
            f"{path} holds no average of the weights: its run had no [ema]",
            "Leave out --ema, or train with half_life_samples in [ema].",
        )


def read(path: Path) -> Snapshot:
    """A whole checkpoint.

    Raises:
        DataError: a file is missing or damaged.
    """
    state = read_state(path)
    more = {name: _tensors(path / f"{name}.safetensors", state) for name in state.get("more", [])}
    trained, optimizer = (_tensors(path / name, state) for name in (TRAINED, OPTIMIZER))
    state.pop("files", None)
    return Snapshot(state, trained, optimizer, more)


def _tensors(file: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        problem = why_changed(file, state.get("files", {}).get(file.name))
        if problem is None:
            return load_file(file)
    except (OSError, SafetensorError) as error:
        problem = str(error)
    _must_be_there(file.parent)  # asked late, as it may have been removed just now
    raise DataError(
        f"{file} is missing or damaged: {problem}", older_than(file.parent) or NO_OLDER_ONE
    )


NO_OLDER_ONE = "There is no older checkpoint beside it; start anew in another output."


def older_than(path: Path) -> str:
    """Which checkpoint before a damaged one is whole, as a sentence; empty if none is."""
    if not path.name.isdecimal():
        return ""
    older = [each for each in checkpoints(path.parent) if int(each.name) < int(path.name)]
    if not older:
        return ""
    try:
        read(older[-1])
    except DataError as error:
        return error.hint  # which looked further back
    return f"The next older one that is whole is {older[-1]}: --resume {older[-1]}"
