"""Find the loss matrices that a path stands for: a file, a folder of them, a checkpoint, a run."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdprep.errors import DataError
from sdtrain.checkpoint import STATE
from sdtrain.course import meant
from sdtrain.probe import PROBE_FILE, LossMatrix, Probe
from sdtrain.trackers.jsonl import read_metrics

START = 0
"""The clock of the base model."""


@dataclass(frozen=True)
class Measured:
    """One matrix on disk.

    Args:
        path: the `.npz`.
        probe: what it was measured on.
    """

    path: Path
    probe: Probe

    def load(self) -> LossMatrix:
        """Read the matrix.

        Raises:
            DataError: it is damaged, of another probe than the one beside it, or holds a loss
                that is no number.
        """
        matrix, probe = LossMatrix.load(self.path), self.probe
        if matrix.loss.shape != probe.shape:
            raise DataError(
                f"{self.path} holds {matrix.loss.shape} losses, its probe has {probe.shape}"
            )
        if matrix.u.shape != probe.shape or not np.allclose(matrix.u, probe.u(), atol=1e-9):
            raise DataError(
                f"{self.path} was measured at other noise levels than {PROBE_FILE} beside it says",
                "Leave matrices in the folder that they were written to.",
            )
        bad = np.argwhere(~np.isfinite(matrix.loss))
        if len(bad):
            image, level = bad[0]
            raise DataError(
                f"{self.path}: {len(bad)} of {matrix.loss.size} losses are no numbers, the first "
                f"of {probe.images[image].id} at u = {matrix.u[image, level]:.4f}",
                "The model was damaged, or the precision too low for it; evaluate it again.",
            )
        if not matrix.mean > 0:
            raise DataError(
                f"{self.path}: the mean loss is {matrix.mean:g}, and nothing can be said in "
                "percent of that",
                "A loss is above 0; evaluate the model again.",
            )
        return matrix

    @property
    def label(self) -> str:
        """What to call it: the run and the clock, or the file."""
        folder = self.path.parent.parent
        is_run = folder.name == "validation" and folder.parent.name
        return f"{folder.parent if is_run else folder}@{self.path.stem}"


def find(path: Path) -> dict[str, Measured]:
    """The newest matrix of every set below a path, by the set's name.

    Args:
        path: an `.npz`; a folder with one or several; `RUN/checkpoints/N`; or a run folder.

    Raises:
        DataError: there is none, or it is not clear which is meant.
    """
    path = meant(path)
    if path.is_file():
        return _by_set([path])
    if not path.is_dir():
        raise DataError(f"{path} does not exist", "Give a run folder, a checkpoint or an .npz.")
    if (path / STATE).is_file():
        return _of_checkpoint(path)
    place = path / "validation" if (path / "validation").is_dir() else path
    folders = [place] if (place / PROBE_FILE).is_file() else sorted(place.glob("*/"))
    last = _last_moments(path)
    newest = []
    for folder in folders:
        clocks = [each for each in _clocks(folder) if each <= last.get(folder.name, each)]
        if clocks and (not last or folder.name in last):
            newest.append(folder / f"{max(clocks)}.npz")
        elif _named(folder):
            raise DataError(
                f"{folder} holds several evaluations and no clock says which is the newest: "
                f"{', '.join(each.name for each in _named(folder))}",
                "Name the files.",
            )
    return _by_set(newest) or _nothing(path)


def start_of(measured: Measured) -> Measured:
    """The evaluation at sample 0 of the same probe and run.

    Raises:
        DataError: there is none, or this is it.
    """
    start = measured.path.with_name(f"{START}.npz")
    if start == measured.path:
        raise DataError(
            f"{measured.path} is the only evaluation of {measured.probe.name}, at sample 0",
            "Train on, or give a second run or .npz to compare it with.",
        )
    if not start.is_file():
        raise DataError(
            f"{measured.path} has no evaluation at sample 0 beside it to be compared with",
            "Give two: sdtrain compare A B.",
        )
    return Measured(start, measured.probe)


def _of_checkpoint(path: Path) -> dict[str, Measured]:
    run, clock = path.parent.parent, path.name
    found = sorted((run / "validation").glob(f"*/{clock}.npz"))
    last = _last_moments(run)
    if not found:
        raise DataError(
            f"the run was not evaluated at {clock} samples, where {path} was saved",
            "Evaluate it: sdtrain validate RECIPE --checkpoint PATH.",
        )
    return _by_set([each for each in found if not last or each.parent.name in last])


def _by_set(paths: list[Path]) -> dict[str, Measured]:
    found: dict[str, Measured] = {}
    for path in paths:
        probe_file = path.parent / PROBE_FILE
        if not probe_file.is_file():
            raise DataError(
                f"{path} has no {PROBE_FILE} beside it, so nobody knows what it measured",
                "Leave matrices in the folder that they were written to.",
            )
        probe = Probe.load(probe_file)
        if probe.name in found:
            raise DataError(
                f"two probes of the set {probe.name}: {found[probe.name].path} and {path}",
                "Name one of the files.",
            )
        found[probe.name] = Measured(path, probe)
    return found


def _nothing(path: Path) -> dict[str, Measured]:
    raise DataError(
        f"{path} holds no evaluation", "sdtrain run and sdtrain validate write them as .npz."
    )


def _clocks(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.npz") if path.stem.isdecimal()]


def _named(folder: Path) -> list[Path]:
    """Matrices whose names are no clocks, as `sdtrain validate` writes them."""
    return sorted(p for p in folder.glob("*.npz") if not re.fullmatch(r"\d+|.*\.new", p.stem))


def _last_moments(run: Path) -> dict[str, int]:
    """Probe id to the last clock that the metrics know; later files are of a course given up."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "validation"]
    return {line["probe_id"]: line["samples_seen"] for line in lines}


def differences(a: Probe, b: Probe) -> list[str]:
    """Why two probes are not the same one, in words."""
    words = []
    before, now = asdict(a), asdict(b)
    for key in before:
        if key != "labels" and before[key] != now[key]:
            words.append(_difference(key, before[key], now[key], a, b))
    return words


def _difference(key: str, before: Any, now: Any, a: Probe, b: Probe) -> str:
    if key == "warp":
        return "warp: their noise levels were placed by different pilots"
    if key != "images":
        return f"{key}: {before} and {now}"
    ids_a, ids_b = {image.id for image in a.images}, {image.id for image in b.images}
    if ids_a != ids_b:
        return f"images: {len(ids_a & ids_b)} in common, of {len(ids_a)} and {len(ids_b)}"
    texts_b = {image.id: image for image in b.images}
    changed = [image for image in a.images if texts_b[image.id] != image]
    if not changed:
        return "images: the same in another order"
    other = texts_b[changed[0].id]
    what = "prompt" if other.prompt != changed[0].prompt else "bucket_hw"
    return (
        f"images: {len(changed)} are shown otherwise, such as {other.id}, whose {what} is "
        f"{getattr(changed[0], what)!r} and {getattr(other, what)!r}"
    )
