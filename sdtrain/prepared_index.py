"""What a start needs to know of every row of a published set: ids, sizes, repeats, one digest.

Training reads rows in random order, which Parquet cannot. These few columns are therefore written
once, uncompressed, into the cache of the `datasets` library, and mapped into memory; texts follow
later (`prepared_texts`), pictures stay where they are. The copy belongs to the very files it was
made of, by their size and time.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sdprep.console import progress, say
from sdprep.errors import UserError
from sdprep.seeding import digest
from sdtrain.hub_shards import HubShard
from sdtrain.parquet_digest import TextBytes
from sdtrain.parquet_pictures import Place, chunk_span
from sdtrain.parquet_rows import (
    CHECKED,
    ROWS,
    TEXTS,
    Shard,
    group_spans,
    open_shard,
    read_groups,
    readers,
    require_columns,
    state,
    stored_bytes,
)
from sdtrain.text_columns import total

VERSION = 3
MOST_PARTS = 256
_SLOW_ROWS = 1_000_000


@dataclass(frozen=True)
class Part:
    """The index of a few shards.

    Args:
        stem: path of its files, without their endings.
        shards: Parquet files, in order.
    """

    stem: Path
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> Path:
        """Arrow file: id, sizes, repeats."""
        return self.stem.with_suffix(".rows")

    @property
    def groups(self) -> Path:
        """(groups, 5) int64: shard, group in it, rows, offset and length of the pictures."""
        return self.stem.with_suffix(".npy")

    @property
    def facts(self) -> Path:
        """JSON: rows and digest; written last, so a part that has it is whole."""
        return self.stem.with_suffix(".json")

    def copy(self, ending: str) -> Path:
        """Arrow file of further columns; a part that has it has it whole."""
        return self.stem.with_suffix(f".{ending}")

    def scratch(self) -> Path:
        """What this process's files are called until they are whole, without their endings."""
        return self.stem.with_name(f".{self.stem.name}-{os.getpid()}")


def index_parts(shards: Sequence[Shard], cache: Path) -> list[Part]:
    """The parts of one split, made as far as they are not there.

    Args:
        shards: Parquet files of the split, in order.
        cache: folder of this data set's indexes; parts of files that have changed are deleted.

    Raises:
        DataError: a file cannot be read, lacks a column, or has a row that cannot be trained on.
        UserError: the index cannot be written.
    """
    together = -(-len(shards) // MOST_PARTS)
    parts = []
    for start in range(0, len(shards), together):
        files = tuple(shards[start : start + together])
        key = digest("index", VERSION, *map(state, files))
        name = files[0].name.partition("-")[0]  # the split
        parts.append(Part(cache / f"{name}-{start:05d}-{key}", files))
    missing = [part for part in parts if not part.facts.is_file()]
    if missing:
        _make(missing, cache)
        _clear(cache, parts)
    return parts


def _make(parts: Sequence[Part], cache: Path) -> None:
    num_shards = sum(len(part.shards) for part in parts)
    pool = readers(are_far=isinstance(parts[0].shards[0], HubShard))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with progress("reading rows", num_shards, "shards") as bar:
            rows = 0
            for part, found in zip(parts, pool.map(_write, parts), strict=True):
                bar.advance(len(part.shards))
                rows += found
    except OSError as error:
        raise cannot_write(cache, error) from error
    if rows > _SLOW_ROWS:
        say(f"read ids and sizes of {rows:,} rows once, into {cache}")


def cannot_write(cache: Path, error: OSError) -> UserError:
    """What to say when there is no room."""
    return UserError(
        f"the rows of the data set cannot be indexed in {cache}: {error}",
        "Make room there, or move the cache: set HF_DATASETS_CACHE.",
    )


def _write(part: Part) -> int:
    """Make one part; returns its rows."""
    scratch = part.scratch()
    groups: list[tuple[int, ...]] = []
    sums: list[np.ndarray] = []
    num_rows = 0
    with (
        pa.OSFile(f"{scratch}.rows", "wb") as sink,
        pa.ipc.new_file(sink, ROWS) as writer,
    ):
        for batch in _batches(part.shards, groups, sums):
            writer.write_batch(batch)
            num_rows += batch.num_rows
    np.save(f"{scratch}.npy", np.array(groups, np.int64).reshape(-1, 5))
    facts = {"rows": num_rows, "digest": [int(lane) for lane in total(sums)]}
    Path(f"{scratch}.json").write_text(json.dumps(facts), encoding="utf-8")
    for file in (part.rows, part.groups, part.facts):
        os.replace(f"{scratch}{file.suffix}", file)
    return num_rows


def _batches(
    shards: Sequence[Shard], groups: list[tuple[int, ...]], sums: list[np.ndarray]
) -> Iterator[pa.RecordBatch]:
    """The rows of some shards, some ten thousand at a time; notes down row groups and digests."""
    for index, shard in enumerate(shards):
        with open_shard(shard) as file:
            leaf = require_columns(file, shard, [ROWS, TEXTS])
            with stored_bytes(shard) as stored:
                sums.append(TextBytes(file).digest_sum(stored))
            first = 0
            for span in group_spans(file):
                for group in span:
                    about = file.metadata.row_group(group)
                    groups.append((index, group, about.num_rows, *chunk_span(about, leaf)))
                batch = read_groups(file, shard, span, CHECKED, first)
                first += batch.num_rows
                yield batch.select(ROWS.names)


def _clear(cache: Path, parts: Sequence[Part]) -> None:
    """Delete what was made of files that are no longer as they were."""
    name = parts[0].stem.name.split("-")[0]
    kept = {part.stem.name for part in parts}
    for file in cache.glob(f"{name}-*"):
        if file.stem not in kept:
            with contextlib.suppress(OSError):  # Windows keeps what another run has open
                file.unlink()


class Groups:
    """Where the rows of a split are stored.

    Args:
        parts: its index.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        self._tables = [np.load(part.groups) for part in parts]
        self._starts = [np.cumsum([0, *table[:, 2].tolist()]) for table in self._tables]
        self.part_starts = np.cumsum([0, *(int(starts[-1]) for starts in self._starts)])

    def inside(self, part: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard, row group and place in it of some rows, counted from the start of their part."""
        which = np.searchsorted(self._starts[part], rows, "right") - 1
        shards, groups = self._tables[part][which, :2].T
        return shards, groups, rows - self._starts[part][which]

    def picture(self, row: int) -> Place:
        """Where the picture of one row is."""
        part = int(np.searchsorted(self.part_starts, row, "right")) - 1
        local = row - int(self.part_starts[part])
        at = int(np.searchsorted(self._starts[part], local, "right")) - 1
        shard, group, _, offset, num_bytes = self._tables[part][at].tolist()
        inside = local - int(self._starts[part][at])
        return Place(self._parts[part].shards[shard], group, inside, offset, num_bytes)
