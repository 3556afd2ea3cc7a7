"""New entries on their way to disk: gathered in memory, and written in blocks."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sdtrain.cache.entries import Entry
from sdtrain.cache.store import EntryStore

BLOCK_BYTES = 64 * 2**20
BLOCK_SECONDS = 60.0


class BlockWriter:
    """Appends to one cache; each process that encodes has its own.

    Commits are at least a minute or a full block apart, so that versions stay few. Appending needs
    no lock: several processes, also of several machines, may fill one cache at the same time.

    Args:
        store: where blocks go.
    """

    def __init__(self, store: EntryStore) -> None:
        self.store = store
        self.num_written = 0
        self._pending: dict[bytes, Entry] = {}
        self._num_bytes = 0
        self._since = 0.0

    def get(self, keys: Sequence[bytes]) -> dict[int, Entry]:
        """Index to entry of those that are there by now, in memory or on disk."""
        found = {at: self._pending[key] for at, key in enumerate(keys) if key in self._pending}
        rest = [at for at in range(len(keys)) if at not in found]
        on_disk = self.store.get([keys[at] for at in rest]) if rest else {}
        return found | {rest[index]: entry for index, entry in on_disk.items()}

    def add(self, entry: Entry) -> None:
        """Keep one entry; the block is written when it is full, or a minute old."""
        if entry.key in self._pending:
            return
        if not self._pending:
            self._since = time.monotonic()
        self._pending[entry.key] = entry
        self._num_bytes += len(entry.data)
        is_old = time.monotonic() - self._since > BLOCK_SECONDS
        if is_old or self._num_bytes >= BLOCK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is pending."""
        if self._pending:
            self.store.append(list(self._pending.values()))
            self.num_written += len(self._pending)
            self._pending, self._num_bytes = {}, 0
