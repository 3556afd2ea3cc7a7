"""Entries on disk: a Lance table that only grows, so that any number of runs may fill it at once.

A commit appends a block and is atomic: who is killed loses the block in memory and nothing else.
Two processes that encode the same thing store it twice; the first is read.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sdprep.errors import DataError, UserError
from sdprep.lance_folder import has_version
from sdtrain.cache.entries import Entry
from sdtrain.cache.keys import KEY_BYTES
from sdtrain.disk import is_full

if TYPE_CHECKING:
    import lance
    from filelock import FileLock

SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("layout", pa.string(), nullable=False),
        pa.field("checksum", pa.binary(), nullable=False),
        pa.field("data", pa.large_binary(), nullable=False),
    ]
)

_LANCE_ERRORS = (OSError, ValueError, RuntimeError)  # it has no class of its own
_LOOK_AGAIN_SECONDS = 5.0
_MANY_FRAGMENTS = 64
_FRAGMENT_BYTES = 512 * 2**20
_DELETE_AT_ONCE = 1_000
_ATTEMPTS = 5  # while other processes take away the versions that this one knew
_FIRST_PAUSE_SECONDS = 0.05


def require_lance() -> None:
    """Fail now rather than at the first entry.

    Raises:
        UserError: Lance is not installed.
    """
    try:
        import lance  # noqa: F401
    except ImportError:
        raise UserError(
            "[cache] keeps its entries with Lance, which is not installed: pip install pylance",
            "Or set cache.latents and cache.text to false.",
        ) from None


class EntryStore:
    """One cache: `latents.lance` or `text.lance`. May be sent to another process.

    Args:
        path: the table; it is made by the first entry.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._dataset: lance.LanceDataset | None = None
        self._fragments: list[tuple[int, int]] = []  # number and rows
        # Half a key is kept, so that the index of 12 million entries fits into 200 MB.
        self._halves = np.zeros(0, np.uint64)  # sorted
        self._order = np.zeros(0, np.int64)  # where each of them is stored
        self._looked = -_LOOK_AGAIN_SECONDS

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # an open table does not travel

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def __len__(self) -> int:
        self.refresh()
        return len(self._halves)

    @property
    def num_bytes(self) -> int:
        """What the table takes on disk."""
        return sum(_size(file) for file in self.path.rglob("*"))

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of some keys have an entry; looks at no data."""
        self._refresh_now_and_then()
        places, rows = self._look_up(keys, ["key"])
        there = zip(places, rows["key"].to_pylist(), strict=True)
        found = {at for at, key in there if key == keys[at]}
        return [at in found for at in range(len(keys))]

    def get(self, keys: Sequence[bytes]) -> dict[int, Entry]:
        """Index to entry of those that are there.

        Raises:
            DataError: an entry's checksum does not fit.
        """
        if len(self._places(keys)) < len(keys):
            self._refresh_now_and_then()
        places, rows = self._look_up(keys, SCHEMA.names)
        found = dict(zip(places, _entries(rows), strict=True))
        found = {at: entry for at, entry in found.items() if entry.key == keys[at]}
        for entry in found.values():
            if not entry.is_sound:
                raise DataError(
                    f"{self.path}: the entry of {entry.label} is damaged, its checksum differs",
                    "See sdtrain cache verify RECIPE; with --repair it drops such entries.",
                )
        return found

    def append(self, entries: Sequence[Entry]) -> None:
        """Add a block in one commit; others may append at the same time.

        Raises:
            UserError: there is no room for it.
        """
        columns = {name: [getattr(entry, name) for entry in entries] for name in SCHEMA.names}
        block = pa.table(columns, schema=SCHEMA)
        try:
            if not self._exists():
                self._create()
            self._append(block)
        except _LANCE_ERRORS as error:
            if not is_full(error):
                raise
            raise UserError(
                f"the disk of the cache {self.path} is full: {error}",
                "Free some space there, or name another folder in cache.path; then run the same "
                "command again.",
            ) from error

    def _append(self, block: pa.Table) -> None:
        import lance

        for pause in _pauses():
            try:
                lance.write_dataset(block, str(self.path), mode="append")
                return
            except OSError as error:  # the version it began with was tidied away meanwhile
                if pause is None or is_full(error):
                    raise
                time.sleep(pause)

    def _create(self) -> None:
        """Make an empty table; of two that do so at once, the later would replace the other's."""
        import lance

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock():
            if not self._exists():
                lance.write_dataset(SCHEMA.empty_table(), str(self.path), mode="create")

    def _lock(self, timeout: float = -1) -> FileLock:
        """For all that is not appending: making, deleting and joining blocks."""
        from filelock import FileLock

        return FileLock(str(self.path.with_suffix(".lock")), timeout=timeout)

    def scan(self, rows_at_once: int = 64) -> Iterator[Entry]:
        """Every entry, in the order of storage.

        Raises:
            DataError: the files are damaged, or another process joined the blocks meanwhile.
        """
        self.refresh()
        if self._dataset is None:
            return
        begun_with = self._dataset.version
        batches = self._dataset.to_batches(columns=SCHEMA.names, batch_size=rows_at_once)
        while True:
            try:
                batch = next(batches, None)
            except _LANCE_ERRORS as error:
                if not _still_has(self.path, begun_with):
                    raise DataError(
                        f"another process joined the blocks of {self.path} while they were read",
                        "Nothing is lost: run the command again.",
                    ) from None
                raise _unreadable(self.path, error) from None
            if batch is None:
                return
            yield from _entries(pa.Table.from_batches([batch]))

    def drop(self, keys: Iterable[bytes]) -> None:
        """Delete entries, so that they are encoded again."""
        wanted = sorted(set(keys))
        with self._lock():
            self.refresh()
            for start in range(0, len(wanted), _DELETE_AT_ONCE):
                part = wanted[start : start + _DELETE_AT_ONCE]
                assert self._dataset is not None, "there is nothing to drop from"
                names = ", ".join(f"X'{key.hex()}'" for key in part)
                self._dataset.delete(f"key IN ({names})")
        self._forget()

    def tidy(self) -> None:
        """Join many small blocks to few large ones; entries stay as they are.

        Does nothing while another process is at it.
        """
        from filelock import Timeout

        if not self._has_many_blocks():
            return
        try:
            with self._lock(timeout=0):
                if self._has_many_blocks():  # another process may just have joined them
                    self._join_blocks()
        except Timeout:
            return

    def _has_many_blocks(self) -> bool:
        self.refresh()
        return len(self._fragments) > _MANY_FRAGMENTS

    def _join_blocks(self) -> None:
        assert self._dataset is not None, "there are blocks"
        row_bytes = max(1, self.num_bytes // max(1, len(self._halves)))
        self._dataset.optimize.compact_files(
            target_rows_per_fragment=max(1, _FRAGMENT_BYTES // row_bytes)
        )
        self._dataset.cleanup_old_versions(older_than=timedelta(0))
        self._forget()

    # --- the index ----------------------------------------------------------------------------

    def refresh(self) -> None:
        """Know the newest version.

        Raises:
            DataError: the files are damaged, or no cache of this release.
        """
        for pause in _pauses():
            try:
                self._read_index()
                return
            except _LANCE_ERRORS as error:  # another process may have tidied this version away
                if pause is None:
                    raise _unreadable(self.path, error) from None
                self._forget()
                time.sleep(pause)

    def _read_index(self) -> None:
        import lance

        if not self._exists():
            self._forget()
            return
        self._looked = time.monotonic()
        dataset = lance.dataset(str(self.path))
        if self._dataset is not None and dataset.version == self._dataset.version:
            return
        _require_ours(dataset, self.path)
        fragments = dataset.get_fragments()
        names = [(fragment.fragment_id, fragment.count_rows()) for fragment in fragments]
        known = len(self._fragments)
        if names[:known] != self._fragments:  # rows were moved or deleted
            known, self._halves, self._order = 0, self._halves[:0], self._order[:0]
        new = fragments[known:]
        keys = dataset.scanner(columns=["key"], fragments=new).to_table()["key"] if new else []
        halves = np.fromiter((_half(key.as_py()) for key in keys), np.uint64, len(keys))
        order = np.concatenate([self._order, np.arange(len(halves)) + len(self._order)])
        halves = np.concatenate([self._halves, halves])
        by_key = np.argsort(halves, kind="stable")
        self._halves, self._order = halves[by_key], order[by_key]
        self._dataset, self._fragments = dataset, names

    def _forget(self) -> None:
        self._dataset, self._fragments = None, []
        self._halves, self._order = self._halves[:0], self._order[:0]
        self._looked = -_LOOK_AGAIN_SECONDS

    def _exists(self) -> bool:
        return has_version(self.path)

    def _refresh_now_and_then(self) -> None:
        if time.monotonic() - self._looked >= _LOOK_AGAIN_SECONDS:
            self._looked = time.monotonic()
            self.refresh()

    def _look_up(self, keys: Sequence[bytes], columns: Sequence[str]) -> tuple[list[int], pa.Table]:
        """Indices of the keys that seem to be there, and some columns of their rows."""
        for pause in _pauses():
            places = self._places(keys)
            if not places:
                break
            assert self._dataset is not None, "there is an index"
            try:
                rows = self._dataset.take(list(places.values()), columns=list(columns))
                return list(places), rows
            except _LANCE_ERRORS as error:  # another process may have tidied this version away
                if pause is None:
                    raise _unreadable(self.path, error) from None
                self._forget()
                time.sleep(pause)
                self.refresh()
        return [], SCHEMA.empty_table()

    def _places(self, keys: Sequence[bytes]) -> dict[int, int]:
        """Index in `keys` to where such an entry is stored, of those that seem to be there."""
        if not len(self._halves):
            return {}
        wanted = np.fromiter((_half(key) for key in keys), np.uint64, len(keys))
        at = np.searchsorted(self._halves, wanted)
        at[at == len(self._halves)] = 0
        is_there = self._halves[at] == wanted
        return {int(i): int(self._order[at[i]]) for i in np.flatnonzero(is_there)}


def _pauses() -> Iterator[float | None]:
    """How long to wait after each failed attempt; None after the last."""
    for attempt in range(_ATTEMPTS - 1):
        yield _FIRST_PAUSE_SECONDS * 2**attempt
    yield None


def _size(file: Path) -> int:
    """Bytes of a file; none if it is a folder or another process just took it away."""
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:
        return 0


def _still_has(path: Path, version: int) -> bool:
    """Whether a version of the table was not tidied away."""
    import lance

    try:
        return any(known["version"] == version for known in lance.dataset(str(path)).versions())
    except _LANCE_ERRORS:
        return True  # whatever ails it, it is not that


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} is damaged and cannot be read: {str(error).splitlines()[0]}",
        f"Delete the folder {path.name}; sdtrain cache RECIPE encodes its entries anew.",
    )


def _require_ours(dataset: lance.LanceDataset, path: Path) -> None:
    if dataset.schema.names != SCHEMA.names:
        raise DataError(
            f"{path} is no cache of this release: it has columns {', '.join(dataset.schema.names)}",
            "Name another folder in cache.path, or delete that table.",
        )


def _entries(rows: pa.Table) -> Iterator[Entry]:
    for row in rows.select(SCHEMA.names).to_pylist():
        yield Entry(**row)


def _half(key: bytes) -> int:
    return int.from_bytes(key[:8], "big")
