"""Whether a file still has the bytes that were written; safetensors looks at its head only."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PIECE_BYTES = 1 << 24


def checksums(files: Iterable[Path]) -> dict[str, dict[str, int]]:
    """`bytes` and `crc32` of files, by name."""
    return {file.name: {"bytes": file.stat().st_size, "crc32": _crc32(file)} for file in files}


def why_changed(file: Path, written: dict[str, Any] | None) -> str | None:
    """What differs from when a file was written; None if nothing does or nothing is known.

    Args:
        file: to be read whole.
        written: its entry of `checksums`; None of a file from before there were any.

    Raises:
        OSError: it cannot be read.
    """
    if written is None:
        return None
    size = file.stat().st_size
    if size != written["bytes"]:
        return f"it has {size:,} bytes, {written['bytes']:,} were written"
    if _crc32(file) != written["crc32"]:
        return "its checksum is not that of what was written"
    return None


def _crc32(file: Path) -> int:
    value = 0
    with file.open("rb") as opened:
        while piece := opened.read(PIECE_BYTES):
            value = zlib.crc32(piece, value)
    return value
