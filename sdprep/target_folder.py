"""The folder that a data set is written to: checked before, filled beside, swapped in when whole.

Everything is written into a scratch folder beside the target, which then takes its place; so a
reader sees the old data set or the new one, never half of one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.compute as pc

from sdprep.errors import DataError
from sdprep.table import PhotoTable

SPARE_BYTES = 64_000_000


def files_there(table: PhotoTable, to: Path, manifest: str) -> list[str]:
    """Names of all files of an earlier data set of ours in `to`; empty where there is none.

    Args:
        table: what will be written; the target must lie outside it.
        to: the target, resolved.
        manifest: file by which a data set of ours is known.

    Raises:
        DataError: the target holds something else, or is a file, or table and target overlap.
    """
    home = table.path.resolve()
    if to == home or home in to.parents or to in home.parents:
        raise DataError(
            f"cannot write {table.path} to {to}: one lies inside the other",
            "Choose another folder.",
        )
    if not to.exists():
        return []
    if not to.is_dir():
        raise DataError(f"cannot write to {to}: it is a file", "Choose another name.")
    files = [path for path in sorted(to.rglob("*")) if not path.is_dir() or path.is_symlink()]
    if files and not (to / manifest).is_file():
        raise DataError(
            f"{to} is not empty, and no data set of ours: it has no {manifest}",
            "Choose another folder, or empty this one yourself.",
        )
    return [path.relative_to(to).as_posix() for path in files]


def check_disk(table: PhotoTable, to: Path) -> None:
    """Make the parent folder, and refuse a disk that cannot hold a second copy of the images."""
    sizes = table.kept(["num_bytes"])["num_bytes"]
    needed = int((pc.sum(sizes).as_py() or 0) * 1.1) + SPARE_BYTES
    folder = to.parent
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder} has {free / 1e9:.1f} GB free; writing needs about {needed / 1e9:.1f} GB",
            "The old data set stays until the new one is whole. Choose another disk.",
        )


def _beside(to: Path) -> tuple[Path, Path]:
    return to.parent / f".{to.name}.sdprep-new", to.parent / f".{to.name}.sdprep-old"


def mend(to: Path) -> None:
    """Undo what a kill left behind: between the two renames of `swap`, or after them."""
    new, old = _beside(to)
    if old.exists() and not to.exists():
        os.replace(old, to)
    for leftover in (new, old):
        if leftover.exists():
            shutil.rmtree(leftover)


@contextmanager
def scratch_beside(to: Path) -> Iterator[Path]:
    """An empty folder beside the target, gone afterwards."""
    new, _ = _beside(to)
    new.mkdir()
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def swap(scratch: Path, to: Path, foreign: list[Path]) -> None:
    """Put the new folder in the place of the old one; files that are not ours move along."""
    _, old = _beside(to)
    for path in (path for path in scratch.rglob("*") if path.is_file()):
        with path.open("rb+") as file:  # writable: Windows syncs no other
            os.fsync(file.fileno())
    if to.exists():
        os.replace(to, old)
    try:
        os.replace(scratch, to)
    except OSError:
        if old.exists():
            os.replace(old, to)
        raise
    for name in foreign:
        if not (to / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(old / name, to / name)
    if old.exists():
        shutil.rmtree(old)
