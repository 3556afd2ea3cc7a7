"""`pace.jsonl`: when which sample was seen, apart from the metrics, which know no time."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACE = "pace.jsonl"
EVERY_SECONDS = 10.0


class PaceTracker:
    """Appends the clock, at most every ten seconds and at the end of each session.

    Args:
        path: the file; earlier sessions stay in it.
        samples_seen: where this session begins.
    """

    def __init__(self, path: Path, samples_seen: int) -> None:
        self._path, self._start = path, time.monotonic()
        self._session = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._clock, self._written = samples_seen, -EVERY_SECONDS
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic() - self._start
        line = {
            "session": self._session,
            "seconds": round(self._written, 3),
            "samples_seen": self._clock,
        }
        with self._path.open("ab") as file:
            # A line that a full disk or a kill cut off is no part of the next one.
            file.truncate(self._path.read_bytes().rfind(b"\n") + 1)
            file.write(f"{json.dumps(line)}\n".encode())

    def log(self, line: Mapping[str, Any]) -> None:
        """Note the clock."""
        self._clock = int(line["samples_seen"])
        if time.monotonic() - self._start - self._written >= EVERY_SECONDS:
            self._write()

    def pictures(self, named: Mapping[str, Sequence[Path]], samples_seen: int) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Write the last line of the session."""
        self._write()


def pace(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds spent over all sessions, and samples a second in the newest one."""
    sessions: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        sessions.setdefault(line["session"], []).append(line)
    if not sessions:
        return {}
    found = {"seconds": sum(own[-1]["seconds"] for own in sessions.values())}
    newest = list(sessions.values())[-1]
    seconds = newest[-1]["seconds"] - newest[0]["seconds"]
    samples = newest[-1]["samples_seen"] - newest[0]["samples_seen"]
    return {**found, "samples_per_second": samples / seconds} if seconds > 0 < samples else found
