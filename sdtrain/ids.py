"""Sample ids of a split: twelve million of them are kept as Arrow holds them, not as objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import Any, overload

import numpy as np
import pyarrow as pa

from sdprep.seeding import key_text

PREFIX_BYTES = 8


class Ids(Sequence[str]):
    """A sequence of strings.

    Args:
        chunks: string arrays, none of them with nulls.
    """

    def __init__(self, chunks: Sequence[pa.Array]) -> None:
        self._chunks = [chunk for chunk in chunks if len(chunk)]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])

    @classmethod
    def of(cls, ids: Iterable[str]) -> Ids:
        """The same, of plain strings."""
        return ids if isinstance(ids, Ids) else cls([pa.array(list(ids), pa.large_string())])

    @classmethod
    def joined(cls, *parts: Ids) -> Ids:
        """Several, one after the other."""
        return cls([chunk for part in parts for chunk in part._chunks])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return self.at(np.arange(*at.indices(len(self))))
        row = int(at) + (len(self) if at < 0 else 0)
        if not 0 <= row < len(self):
            raise IndexError(f"row {at} of {len(self)}")
        chunk = int(np.searchsorted(self._starts, row, "right")) - 1
        return str(self._chunks[chunk][row - int(self._starts[chunk])].as_py())

    def __iter__(self) -> Iterator[str]:
        for chunk in self._chunks:
            yield from chunk.to_pylist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Ids({len(self):,})"

    def at(self, rows: np.ndarray) -> list[str]:
        """The ids of some rows, in that order."""
        rows = np.asarray(rows, np.int64)
        by_row = np.argsort(rows, kind="stable")
        found = np.empty(len(rows), object)
        for chunk, places, local in split_rows(self._starts, rows[by_row]):
            found[by_row[places]] = self._chunks[chunk].take(pa.array(local)).to_pylist()
        return found.tolist()

    @cached_property
    def prefixes(self) -> np.ndarray:
        """(n,) uint64, the first bytes of each; they order as the ids do, but for ties."""
        parts = [_prefixes(chunk) for chunk in self._chunks]
        return np.concatenate(parts) if parts else np.empty(0, np.uint64)

    @cached_property
    def order(self) -> np.ndarray:
        """(n,) rows from the lowest id to the highest."""
        order = np.argsort(self.prefixes, kind="stable")
        for start, names in self._ties(order):
            rows = order[start : start + len(names)]
            order[start : start + len(names)] = rows[
                sorted(range(len(names)), key=names.__getitem__)
            ]
        return order

    def first_twice(self) -> str | None:
        """The lowest id that names two rows; None if each names one."""
        for _, names in self._ties(self.order):
            twice = [a for a, b in zip(names, names[1:], strict=False) if a == b]
            if twice:
                return twice[0]
        return None

    def rows_of(self, ids: Iterable[str]) -> dict[str, int]:
        """Where some ids are; those that are not there are left out."""
        wanted = Ids.of(ids)
        likely = np.flatnonzero(np.isin(self.prefixes, wanted.prefixes))
        names, there = self.at(likely), set(wanted)
        found = zip(names, likely.tolist(), strict=True)
        return {name: row for name, row in found if name in there}

    def ranks(self, *key: object) -> np.ndarray:
        """(n,) uint64: for each id `seeding.integer(*key, id)`."""
        begun = blake2b(key_text(*key, ""), digest_size=8)  # a copy takes two thirds of a new one
        ranks = np.empty(len(self), np.uint64)
        for chunk, start in zip(self._chunks, self._starts, strict=False):
            names = chunk.cast(pa.large_binary()).to_pylist()
            hashed = b"".join([_continued(begun, name) for name in names])
            ranks[start : start + len(chunk)] = np.frombuffer(hashed, ">u8")
        return ranks

    def rows_in(self, other: Ids) -> list[int]:
        """Rows whose id occurs in the other sequence, too."""
        known = np.sort(other.prefixes)
        if not len(known):
            return []
        at = np.searchsorted(known, self.prefixes).clip(max=len(known) - 1)
        likely = np.flatnonzero(known[at] == self.prefixes)
        wanted = np.unique(self.prefixes[likely])
        there = set(other.at(np.flatnonzero(np.isin(other.prefixes, wanted))))
        names = self.at(likely)
        return [row for row, name in zip(likely.tolist(), names, strict=True) if name in there]

    def _ties(self, order: np.ndarray) -> Iterator[tuple[int, list[str]]]:
        """Spans of `order` whose first bytes are the same: where each starts, and its ids."""
        if not len(order):
            return
        keys = self.prefixes[order]
        is_same = np.concatenate([[False], keys[1:] == keys[:-1], [False]])
        starts, lasts = np.flatnonzero(is_same[1:] != is_same[:-1]).reshape(-1, 2).T
        names = self.at(order[is_same[1:] | is_same[:-1]])  # all at once: millions have thousands
        ends = np.cumsum(lasts + 1 - starts)
        for start, first, end in zip(
            starts.tolist(), [0, *ends.tolist()], ends.tolist(), strict=False
        ):
            yield start, names[first:end]


def split_rows(starts: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, slice, np.ndarray]]:
    """Tell ascending rows apart by the piece that they lie in.

    Args:
        starts: (pieces + 1,) first row of each piece, and the end.
        rows: (n,) ascending.

    Yields:
        piece, where its rows stand in `rows`, and those rows counted from its start.
    """
    edges = np.searchsorted(rows, starts)
    for piece in np.flatnonzero(edges[1:] > edges[:-1]).tolist():
        place = slice(int(edges[piece]), int(edges[piece + 1]))
        yield piece, place, rows[place] - starts[piece]


def _continued(begun: blake2b, name: bytes) -> bytes:
    hasher = begun.copy()
    hasher.update(name)
    return hasher.digest()


def _prefixes(chunk: Any) -> np.ndarray:
    """The first eight bytes as one number, big end first; shorter ids end in zeros."""
    chunk = chunk.cast(pa.large_string())
    if chunk.null_count:
        raise ValueError("an id is missing")
    _, offsets, data = chunk.buffers()
    ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
    padded = np.concatenate([_bytes(data)[ends[0] : ends[-1]], np.zeros(PREFIX_BYTES, np.uint8)])
    starts, lengths = ends[:-1] - ends[0], np.diff(ends)
    if len(chunk) and lengths[0] >= PREFIX_BYTES and (lengths == lengths[0]).all():
        table = padded[: len(chunk) * lengths[0]].reshape(-1, lengths[0])[:, :PREFIX_BYTES]
        return np.ascontiguousarray(table).view(">u8").ravel().astype(np.uint64)
    keys = np.zeros(len(chunk), np.uint64)
    for byte in range(PREFIX_BYTES):
        value = np.where(byte < lengths, padded[starts + byte], 0).astype(np.uint64)
        keys |= value << np.uint64(8 * (PREFIX_BYTES - 1 - byte))
    return keys


def _bytes(buffer: Any) -> np.ndarray:
    return np.empty(0, np.uint8) if buffer is None else np.frombuffer(buffer, np.uint8)
