"""One writing process per table: a lock that dies with its holder, and a note of who that is."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sdprep.errors import DataError


class WriterLock:
    """Exclusive right to write one table; re-entrant within the process that holds it.

    The operating system frees the lock when its holder dies, however that happens, so a kill never
    leaves a table locked.

    Args:
        path: the lock file, beside the table. Who holds it stands in `<path>.json`.
    """

    def __init__(self, path: Path) -> None:
        from filelock import FileLock

        self.path = path
        self.note = path.with_name(path.name + ".json")
        self._lock = FileLock(str(path), timeout=0, thread_local=False)

    @property
    def is_held(self) -> bool:
        """Whether this process may write."""
        return self._lock.is_locked

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Take the lock at once or fail.

        Raises:
            DataError: another process holds it; says which, where and since when.
        """
        from filelock import Timeout

        try:
            self._lock.acquire()
        except Timeout:
            raise DataError(
                f"{self.path.stem} is being written by {self._holder()}",
                "Wait for it to end, or stop it; a second writer would lose work.",
            ) from None
        try:
            if self._lock.lock_counter == 1:
                self._leave_note()
            yield
        finally:
            if self._lock.lock_counter == 1:
                self.note.unlink(missing_ok=True)
            self._lock.release()

    def _leave_note(self) -> None:
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.note.write_text(json.dumps(holder), encoding="utf-8")

    def _holder(self) -> str:
        try:
            holder = json.loads(self.note.read_text(encoding="utf-8"))
            return "process {pid} on {host} since {since}: {command}".format(**holder)
        except (OSError, ValueError, KeyError):
            return "another process"
