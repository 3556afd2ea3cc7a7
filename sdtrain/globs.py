"""Globs over dotted paths: `*` stays within one name, `**` crosses dots."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import lru_cache


@lru_cache(maxsize=4096)
def _pattern(glob: str) -> re.Pattern[str]:
    pieces = re.split(r"(\*\*|\*|\?)", glob)
    wild = {"**": ".+", "*": "[^.]*", "?": "[^.]"}
    return re.compile("".join(wild.get(piece, re.escape(piece)) for piece in pieces))


def matches(glob: str, path: str) -> bool:
    """Whether the glob describes the whole path, such as `unet.*_blocks.**.to_q.weight`."""
    return _pattern(glob).fullmatch(path) is not None


def nearest_paths(glob: str, paths: Iterable[str], count: int = 3) -> list[str]:
    """What someone may have meant by a glob that matches nothing.

    Keeps the longest beginning of the glob that does match something, and offers what follows
    there, the names most like the glob's own first.
    """
    paths = list(paths)
    names = glob.split(".")
    for length in range(len(names) - 1, -1, -1):
        head = ".".join([*names[:length], ""]) if length else ""
        inside = [path for path in paths if not head or matches(f"{head}**", path)]
        if inside:
            break
    prefixes = {".".join(path.split(".")[: length + 1]): None for path in inside}
    wanted = ".".join(names[: length + 1])
    close = difflib.get_close_matches(wanted, list(prefixes), n=count, cutoff=0.0)
    return [f"{prefix}.**" if prefix not in paths else prefix for prefix in close]
