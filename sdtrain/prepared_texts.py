"""Texts of a published set in any order: from a copy, and from the shards until it is made.

Which of the two changes the time it takes, never what is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sdtrain.ids import split_rows
from sdtrain.parquet_rows import Shard, group_spans, open_shard, read_groups, readers
from sdtrain.prepared_index import Groups, Part

_GROUPS_AT_ONCE = 64
_MOST_RECENT = 16_384

Found = tuple[np.ndarray, pa.RecordBatch]
"""Places in what was asked for (or numbers of rows), and the rows that belong there."""


class TextColumns:
    """Some columns of all rows of a split; may be sent to another process.

    Args:
        parts: the index of the split.
        schema: the columns.
        ending: what tells their copies from others.
    """

    def __init__(self, parts: Sequence[Part], schema: pa.Schema, ending: str) -> None:
        self.parts, self.schema, self.ending = tuple(parts), schema, ending
        self._copies: dict[int, _Copy] = {}
        self._recent: dict[int, tuple[pa.RecordBatch, int]] = {}  # read out of shards

    def __reduce__(self) -> tuple[Any, ...]:
        return TextColumns, (self.parts, self.schema, self.ending)

    def missing(self) -> list[Part]:
        """Parts whose columns are not copied yet."""
        return [part for part in self.parts if not part.copy(self.ending).is_file()]

    def take(self, rows: Sequence[int], names: Sequence[str]) -> Iterator[Found]:
        """Some rows bit by bit.

        Raises:
            DataError: a shard cannot be read.
        """
        wanted = np.asarray(rows, np.int64)
        by_row = np.argsort(wanted, kind="stable")
        direct: list[int] = []
        for part, places, local in split_rows(self._groups.part_starts, wanted[by_row]):
            copy = self._copy(part)
            if copy is None:
                direct += by_row[places].tolist()
            else:
                yield from copy.take(by_row[places], local, names)
        if direct:
            yield from self._direct(np.array(direct), wanted[direct], names)

    def write(self, part: Part, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Copy the columns of one part; False if it was over before that.

        Raises:
            DataError: a shard cannot be read.
            OSError: there is no room.
        """
        scratch = Path(f"{part.scratch()}.{self.ending}")
        sink = pa.OSFile(str(scratch), "wb")
        try:
            with sink, pa.ipc.new_file(sink, self.schema) as writer:
                for batch in self._batches(part):
                    if is_over():
                        return False
                    writer.write_batch(batch)
            os.replace(scratch, part.copy(self.ending))
            return True
        finally:
            scratch.unlink(missing_ok=True)

    def _batches(self, part: Part) -> Iterator[pa.RecordBatch]:
        for shard in part.shards:
            with open_shard(shard) as file:
                for span in group_spans(file):
                    yield read_groups(file, shard, span, self.schema)

    @cached_property
    def _groups(self) -> Groups:
        return Groups(self.parts)

    def _copy(self, part: int) -> _Copy | None:
        file = self.parts[part].copy(self.ending)
        if part not in self._copies and file.is_file():
            self._copies[part] = _Copy(file)
        return self._copies.get(part)

    def _direct(
        self, places: np.ndarray, rows: np.ndarray, names: Sequence[str]
    ) -> Iterator[Found]:
        """Rows out of the shards; each is kept a while, as probes ask for their rows repeatedly."""
        if len(self._recent) + len(rows) > _MOST_RECENT:
            self._recent.clear()
        unknown = np.array([row for row in np.unique(rows).tolist() if row not in self._recent])
        for numbers, batch in self._read(unknown.astype(np.int64)):
            for at, row in enumerate(numbers.tolist()):
                self._recent[row] = batch, at
        by_batch: dict[int, tuple[pa.RecordBatch, list[int], list[int]]] = {}
        for place, row in zip(places.tolist(), rows.tolist(), strict=True):
            batch, at = self._recent[row]
            _, own_places, own = by_batch.setdefault(id(batch), (batch, [], []))
            own_places.append(place)
            own.append(at)
        for batch, own_places, own in by_batch.values():
            yield np.array(own_places), batch.select(list(names)).take(pa.array(own))

    def _read(self, rows: np.ndarray) -> Iterator[Found]:
        """Ascending rows, with their numbers."""
        readings: list[_Reading] = []
        for part, span, local in split_rows(self._groups.part_starts, rows):
            readings += self._readings(part, rows[span], local)
        for found in readers().map(_Reading.read, readings):
            yield from found

    def _readings(self, part: int, numbers: np.ndarray, rows: np.ndarray) -> Iterator[_Reading]:
        """What is read of one shard each; rows ascend, counted from the start of the part."""
        shards, groups, inside = self._groups.inside(part, rows)
        ends = [*(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(rows)]
        start = 0
        for end in ends:
            span = slice(start, end)
            shard = self.parts[part].shards[int(shards[start])]
            yield _Reading(shard, self.schema, numbers[span], groups[span], inside[span])
            start = end


class _Copy:
    """The copied columns of one part, mapped into memory."""

    def __init__(self, file: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        self._batches = [batch for batch in batches if batch.num_rows]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def take(self, places: np.ndarray, rows: np.ndarray, names: Sequence[str]) -> Iterator[Found]:
        for index, which, local in split_rows(self._starts, rows):
            batch = self._batches[index].select(list(names))
            yield places[which], batch.take(pa.array(local))


@dataclass(frozen=True)
class _Reading:
    """Rows that are read out of one shard.

    Args:
        shard: the file.
        schema: the columns.
        numbers: (n,) of the rows, in the whole split.
        groups: (n,) row group of each, ascending.
        rows: (n,) each one's place in its group.
    """

    shard: Shard
    schema: pa.Schema
    numbers: np.ndarray
    groups: np.ndarray
    rows: np.ndarray

    def read(self) -> list[Found]:
        """The rows; some groups at a time, as only few rows of each are wanted."""
        found = []
        wanted = np.unique(self.groups)
        with open_shard(self.shard) as file:
            for start in range(0, len(wanted), _GROUPS_AT_ONCE):
                span = wanted[start : start + _GROUPS_AT_ONCE]
                sizes = [file.metadata.row_group(group).num_rows for group in span.tolist()]
                batch = read_groups(file, self.shard, span.tolist(), self.schema)
                first, last = np.searchsorted(self.groups, [span[0], span[-1] + 1])
                which = np.searchsorted(span, self.groups[first:last])
                local = (np.cumsum(sizes) - sizes)[which] + self.rows[first:last]
                found.append((self.numbers[first:last], batch.take(pa.array(local))))
        return found
