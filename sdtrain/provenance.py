"""How a model was made, and what two of them did differently: read, never computed anew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdprep.errors import DataError
from sdprep.private_paths import hide_paths
from sdtrain import checkpoint
from sdtrain.checkpoint import checkpoints, read_state
from sdtrain.conditions import changes
from sdtrain.course import meant
from sdtrain.formats.single_file_keys import OPTIONAL, Entry
from sdtrain.formats.spelling import canonical_entries, pieces

RECORD = ("recipe", "data", "versions", "samples_seen", "step", "freeze_table", "evaluations")
COMPARED = ("recipe", "data", "versions", "samples_seen")
RECORD_FILE = "training.json"
"""The record in a folder that is made to be passed on."""
_PREFIX, _SPEC = "sdtrain.", "modelspec."


@dataclass(frozen=True)
class Provenance:
    """What a file or folder says of its making.

    Args:
        path: as it was found, such as the newest checkpoint of a run.
        kind: `checkpoint`, `model folder` or `file`.
        record: entries of `RECORD`, as far as it has them.
        about: other metadata, such as ModelSpec's title.
        tensors: files that hold what was trained, by the name of their part ("": names say it).
    """

    path: Path
    kind: str
    record: dict[str, Any]
    about: dict[str, str] = field(default_factory=dict)
    tensors: tuple[tuple[str, Path], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {"path": str(self.path), "kind": self.kind, **self.record, "about": self.about}


def read_provenance(path: Path) -> Provenance:
    """Find out how something was made.

    Args:
        path: a checkpoint, a run folder (its newest checkpoint), the `model` folder of a run or
            another diffusers folder, or a `.safetensors` file that was exported.

    Raises:
        DataError: nothing is there, or it is none of these.
    """
    path = meant(path)
    if path.is_file():
        record, about = _metadata(path)
        return Provenance(path, "file", record, about, (("", path),))
    if (path / checkpoint.STATE).is_file():
        return _of_checkpoint(path)
    newest = (checkpoints(path / "checkpoints") or checkpoints(path))[-1:]
    if newest:
        return _of_checkpoint(newest[0])
    weights = tuple(sorted(path.rglob("*.safetensors"))) if path.is_dir() else ()
    if not weights:
        raise DataError(
            f"{path} holds no model",
            "Give a checkpoint, a run folder, a diffusers folder or a .safetensors file.",
        )
    return _of_folder(path, weights)


def _of_checkpoint(path: Path) -> Provenance:
    state = read_state(path)
    record = {key: state[key] for key in RECORD if key in state}
    return Provenance(path, "checkpoint", record, {}, (("", path / checkpoint.TRAINED),))


def _of_folder(path: Path, weights: tuple[Path, ...]) -> Provenance:
    """A folder of weights: its own metadata, or the run that it lies in."""
    parts = tuple((file.relative_to(path).parent.as_posix().strip("."), file) for file in weights)
    if (path / RECORD_FILE).is_file():
        return Provenance(path, "model folder", _in_folder(path / RECORD_FILE), {}, parts)
    for file in weights:
        record, about = _metadata(file)
        if record:
            return Provenance(path, "model folder", record, about, parts)
    of_run = checkpoints(path.parent / "checkpoints")[-1:]
    if path.name == "model" and of_run:
        record = _of_checkpoint(of_run[0]).record
        return Provenance(path, "model folder", record, {}, parts)
    return Provenance(path, "model folder", {}, {}, parts)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Lay a record beside a model; absolute paths are cut down to their last part.

    Args:
        folder: of the model.
        record: entries of `RECORD`, as far as there are any.
    """
    text = json.dumps(record, ensure_ascii=False, indent=1, sort_keys=True)
    (folder / RECORD_FILE).write_text(hide_paths(text) + "\n", encoding="utf-8", newline="\n")


def _in_folder(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is damaged: {error}", "Delete it, or export again.") from None
    return {key: record[key] for key in RECORD if key in record} if isinstance(record, dict) else {}


def _metadata(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The record of training in a file's header, and ModelSpec's entries."""
    with _opened(file) as opened:
        entries: Mapping[str, str] = opened.metadata() or {}
    record = {}
    for name, text in entries.items():
        if name.startswith(_PREFIX):
            record[name.removeprefix(_PREFIX)] = _entry(file, name, text)
    about = {n.removeprefix(_SPEC): text for n, text in entries.items() if n.startswith(_SPEC)}
    return record, about


def _opened(file: Path) -> Any:
    """The file, open; also one that a checkpoint or a folder names."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(file), "pt")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} is no whole .safetensors file: {error}") from None


def _entry(file: Path, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{file}: its metadata {name} is damaged: {error}") from None


# --- what differs ---------------------------------------------------------------------------------


@dataclass
class PartChange:
    """How the tensors of one part differ.

    Args:
        part: such as `unet`.
        same: tensors of the same values, in whatever number format.
        changed: tensors of one shape with other values.
        only_a: tensors that B lacks, or has in another shape.
        only_b: tensors that A lacks, or has in another shape.
        percent: length of the difference in percent of A's length, over all that both have.
    """

    part: str
    same: int = 0
    changed: int = 0
    only_a: int = 0
    only_b: int = 0
    percent: float = 0.0


def difference(a: Provenance, b: Provenance) -> dict[str, Any]:
    """What two models did differently.

    Returns:
        `keys`: what differs of recipe, data and versions, key path to [A, B]; `without_record`:
        which of "A" and "B" say nothing of these; `parts`: a `PartChange` each, as a dict.
    """
    records = [{key: each.record.get(key) for key in COMPARED} for each in (a, b)]
    if a.kind != b.kind:  # what is passed on says less of paths, which is no difference
        records = [json.loads(hide_paths(json.dumps(each))) for each in records]
    keys = changes(*records)
    return {
        "a": str(a.path),
        "b": str(b.path),
        "keys": {key: list(pair) for key, pair in keys.items()},
        "without_record": [name for name, of in (("A", a), ("B", b)) if not of.record],
        "parts": [part.__dict__ for part in _parts(a, b)],
    }


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: in which file, under which name, and which piece of what lies there."""

    file: Path
    inside: str
    entry: Entry
    piece: int


def _parts(a: Provenance, b: Provenance) -> list[PartChange]:
    with torch.no_grad():
        first, second = _places(a), _places(b)
        found: dict[str, PartChange] = {}
        squares: dict[str, list[float]] = {}
        for name in sorted({*first, *second}):
            part = found.setdefault(name.split(".")[0], PartChange(name.split(".")[0]))
            lengths = squares.setdefault(part.part, [0.0, 0.0])
            one, two = (_read(p[name]) if name in p else None for p in (first, second))
            if one is None or two is None or one.shape != two.shape:
                part.only_a += one is not None
                part.only_b += two is not None
                continue
            one, two = one.double(), two.double()
            is_same = one.equal(two)
            part.same += is_same
            part.changed += not is_same
            lengths[0] += float((two - one).square().sum())
            lengths[1] += float(one.square().sum())
        for part in found.values():
            moved, whole = squares[part.part]
            part.percent = 100 * (moved / whole) ** 0.5 if whole else 0.0
    return list(found.values())


def _places(of: Provenance) -> dict[str, _Place]:
    """Where each tensor is, by its canonical path, whatever the file calls it."""
    found: dict[str, _Place] = {}
    files: dict[str, Path] = {}
    for part, file in of.tensors:
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118  # no mapping: it cannot be iterated
                files[f"{part}.{name}" if part else name] = file
    parts = {file: part for part, file in of.tensors}
    for entry in canonical_entries(name for name in files if not name.endswith(OPTIONAL)):
        file = files[entry.key]
        inside = entry.key.removeprefix(f"{parts[file]}.") if parts[file] else entry.key
        for at, path in enumerate(entry.sources):
            found[path] = _Place(file, inside, entry, at)
    return found


def _read(place: _Place) -> Tensor:
    """A tensor; sides of length 1 count for nothing: a matrix may lie there as a convolution."""
    with _opened(place.file) as opened:
        tensor: Tensor = opened.get_tensor(place.inside)
    return pieces(tensor, place.entry)[place.piece].squeeze()
