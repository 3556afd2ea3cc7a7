"""Digests of large files, remembered between runs while nothing about the file has changed.

Weights of gigabytes would else be read at each start only to be recognised. An entry counts only
if path, device, inode, size, time of content and time of status are all as they were: an edit of
the same size moves the times, and a file put in its place has another inode. A file that was
touched in the last seconds is not remembered, since a second edit could fall into the same tick.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

LEAST_BYTES = 64 << 20
"""Smaller files are read each time: that takes milliseconds."""
SETTLED_S = 10.0
"""Age in seconds of the newest change from which on a file is remembered; FAT has ticks of 2 s."""
_MOST = 512


def file_digest(path: Path) -> str:
    """BLAKE2b-128 of a file's bytes, in hex."""
    before = _stamp(path)
    if before["size"] < LEAST_BYTES:
        return _computed(path)
    place = _cache_file()
    key = str(path.resolve())
    known = _read(place).get(key)
    if known is not None and known.get("stamp") == before and isinstance(known.get("hex"), str):
        return known["hex"]
    digest = _computed(path)
    newest_ns = max(before["mtime_ns"], before["ctime_ns"])
    if _stamp(path) == before and time.time_ns() - newest_ns > SETTLED_S * 1e9:
        _write(place, key, {"stamp": before, "hex": digest})
    return digest


def _computed(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _stamp(path: Path) -> dict[str, int]:
    found = path.stat()
    names = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
    return {name.removeprefix("st_"): getattr(found, name) for name in names}


def _cache_file() -> Path:
    """Where programs of this system keep what they can make again."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "sdprep" / "digests.json"


def _read(place: Path) -> dict[str, Any]:
    """What is remembered; a cache that is missing or damaged is an empty one."""
    with suppress(OSError, ValueError):
        found = json.loads(place.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {key: value for key, value in found.items() if isinstance(value, dict)}
    return {}


def _write(place: Path, key: str, value: dict[str, Any]) -> None:
    """Remember one file, the oldest entries making room; where that fails, it is read again."""
    entries = _read(place)
    entries.pop(key, None)
    kept = dict([*entries.items(), (key, value)][-_MOST:])
    draft = place.with_name(f"{place.name}.{os.getpid()}")
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(kept), encoding="utf-8")
        os.replace(draft, place)
