"""Whether a folder is a Lance table already, or one whose first version is yet to be committed."""

from __future__ import annotations

from pathlib import Path

_BEFORE_ANY_VERSION = ("_transactions", "_versions")


def has_version(path: Path) -> bool:
    """Whether a version was committed; from then on, appending finds it and creates nothing.

    The folder `_versions` says nothing: it is there before its first manifest, and stays empty if
    the process that makes the table is killed.
    """
    return any((path / "_versions").glob("*.manifest"))


def is_unborn(path: Path) -> bool:
    """Whether a folder holds only what a process that was killed while making a table leaves."""
    names = {entry.name for entry in path.iterdir()}
    return names.issubset(_BEFORE_ANY_VERSION) and not has_version(path)
