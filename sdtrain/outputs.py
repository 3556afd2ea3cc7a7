"""Where results go: looked at before anything is measured or drawn, which may take hours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sdprep.errors import UserError


def require_folder(to: Path) -> Path:
    """Refuse a place where no folder can be made; nothing is written yet.

    Args:
        to: a folder that is there, or will be made with those above it.

    Raises:
        UserError: a file lies there or above it, or nothing may be written there.
    """
    nearest = next(place for place in (to.absolute(), *to.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(
            f"--to {to}: {nearest} is a file, where a folder is needed", "Name another place."
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--to {to}: nothing may be written in {nearest}", "Name another place.")
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
