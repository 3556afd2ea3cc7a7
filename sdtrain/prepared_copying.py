"""Copies the texts of a published set while training has begun already."""

from __future__ import annotations

import atexit
import os
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING

from sdprep.console import progress, say, warn
from sdprep.errors import UserError
from sdtrain.parquet_rows import readers
from sdtrain.prepared_index import Part, cannot_write

if TYPE_CHECKING:
    from sdtrain.prepared_texts import TextColumns

AT_ONCE_ROWS = 200_000
"""Up to so many rows are copied in a second or two, before the first is handed out."""
_MOST_THREADS = 8
_AGAIN_S = 2.0


def copy_now(columns: TextColumns, cache: Path) -> None:
    """Copy what is not copied, and wait for it.

    Raises:
        DataError: a shard cannot be read.
        UserError: there is no room.
    """
    parts = columns.missing()
    if not parts:
        return
    try:
        with progress(f"reading {columns.ending}", len(parts), "parts") as bar:
            for _ in readers().map(columns.write, parts):
                bar.advance()
    except OSError as error:
        raise cannot_write(cache, error) from error


class Copying:
    """Sees to it that texts are copied: few at once, many in threads beside the training.

    One process of a machine copies, the others wait for its files. The end of the program stops it
    within a second; what is whole by then stays.

    Args:
        columns: what is copied.
        cache: where to.
        num_rows: rows of the split.
    """

    def __init__(self, columns: TextColumns, cache: Path, num_rows: int) -> None:
        self._columns, self._cache, self._num_rows = columns, cache, num_rows
        self._is_over = Event()
        self._threads: list[Thread] = []
        self._error: UserError | None = None

    def before_reading(self) -> None:
        """Copy what is small; say what went wrong with what is not.

        Raises:
            DataError: a shard cannot be read.
            UserError: there is no room for so little.
        """
        if self._error is not None:
            raise self._error
        if self._num_rows <= AT_ONCE_ROWS:
            copy_now(self._columns, self._cache)

    def after_reading(self) -> None:
        """Begin with what is large, unless that was done: the first rows are out, time is left."""
        if self._threads or self._num_rows <= AT_ONCE_ROWS or not self._columns.missing():
            return
        say(
            f"copying the texts of {self._num_rows:,} rows once, into {self._cache}; "
            f"the run goes on meanwhile"
        )
        self._threads = [Thread(target=self._run, name="texts", daemon=True)]
        self._threads[0].start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """End it, and wait for the end."""
        self._is_over.set()
        self.wait()

    def wait(self) -> None:
        """Wait until everything is copied."""
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        """Wait for the turn of this process, then copy."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._cache / "copying.lock", timeout=0, thread_local=False)
        while not self._is_over.is_set():
            try:
                with lock:
                    self._copy()
                return
            except Timeout:
                self._is_over.wait(_AGAIN_S)
            except OSError as error:
                self._slow(error)
                return

    def _copy(self) -> None:
        missing: SimpleQueue[Part] = SimpleQueue()
        for part in self._columns.missing():
            missing.put(part)
            for left in self._cache.glob(f".{part.stem.name}-*.{self._columns.ending}"):
                left.unlink(missing_ok=True)  # of a process that was killed
        count = max(1, min(_MOST_THREADS, missing.qsize(), (os.cpu_count() or 1) // 2))
        helpers = [Thread(target=self._empty, args=(missing,), daemon=True) for _ in range(count)]
        for thread in helpers:
            thread.start()
        for thread in helpers:
            thread.join()

    def _empty(self, missing: SimpleQueue[Part]) -> None:
        """Copy part after part until none is left."""
        while not self._is_over.is_set() and self._error is None:
            try:
                self._columns.write(missing.get_nowait(), self._is_over.is_set)
            except Empty:
                return
            except UserError as error:
                self._error = error
            except OSError as error:
                self._slow(error)
                return

    def _slow(self, error: OSError) -> None:
        if not self._is_over.is_set():
            warn(
                f"the texts cannot be copied into {self._cache} ({error}); they are read out of "
                f"the shards, which takes longer"
            )
