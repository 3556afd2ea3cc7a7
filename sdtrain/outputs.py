"""Where results go: looked at before anything is measured or drawn, and written whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sdprep.errors import UserError


def require_folder(to: Path, name: str = "--to") -> Path:
    """Refuse a place where no folder can be made; nothing is written yet.

    Args:
        to: a folder that is there, or will be made with those above it.
        name: what the user called it by.

    Raises:
        UserError: a file lies there or above it, or nothing may be written there.
    """
    nearest = next(place for place in (to.absolute(), *to.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(
            f"{name} {to}: {nearest} is a file, where a folder is needed", "Name another place."
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{name} {to}: nothing may be written in {nearest}", "Name another place.")
    return to


def require_file(to: Path, endings: Sequence[str]) -> Path:
    """Refuse a place where no such file can be written; nothing is written yet.

    Args:
        to: the file.
        endings: those it may have, such as `.png`.

    Raises:
        UserError: it has another ending, is a folder, or its folder cannot be made.
    """
    if to.suffix.lower() not in endings:
        raise UserError(f"--to {to} must end in {', '.join(endings)}")
    if to.is_dir():
        raise UserError(f"--to {to} is a folder", "Name a file in it.")
    require_folder(to.parent)
    return to


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A place to write a file or folder in, which gets its name when all of it is there.

    What was begun is removed after an error or Ctrl-C, and by the next call after a kill.

    Args:
        target: nothing is there, or a file, or a folder that is not taken; that one stays and is
            filled at the end, since it may be a disk of its own, or where somebody stands.
    """
    scratch = _scratch_of(target)
    _remove(scratch)
    try:
        yield scratch
        if target.is_dir():
            for part in list(scratch.iterdir()):
                part.replace(target / part.name)
            scratch.rmdir()
        else:
            scratch.replace(target)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            _remove(scratch)
        raise


def is_taken(target: Path) -> bool:
    """Whether something is there, besides an empty folder and what a kill left of `target`."""
    if target.is_dir():
        return any(part.name != _scratch_of(target).name for part in target.iterdir())
    return target.exists()


def _scratch_of(target: Path) -> Path:
    whole = target.absolute()  # "." has no name
    return (whole if target.is_dir() else whole.parent) / f".{whole.name}.new"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str) -> None:
    """Write a text file, all of it or nothing."""
    with written_whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="\n")
