"""A small copy of what a published set says in words, so that any row of millions is at hand.

Parquet cannot be read row by row, and training reads rows in random order. The texts, sizes and
ids are therefore written once, uncompressed, into the cache of the `datasets` library, and mapped
into memory; pictures stay where they are. The copy belongs to the very files it was made of, by
their size and time.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdprep.console import progress, say
from sdprep.errors import DataError, UserError
from sdprep.schema import BOX, MANIFEST
from sdprep.seeding import digest
from sdtrain.hub_shards import HubShard
from sdtrain.parquet_pictures import BYTES_LEAF, chunk_span
from sdtrain.repeats import whole_repeats
from sdtrain.text_columns import SCHEMA, canonical, digest_sum, total

VERSION = 2
BATCH_ROWS = 65_536
MOST_PARTS = 256
NEEDED = ("id", "image", "width", "height")
SOURCE, BOXES = pa.field("source", pa.string()), pa.field("boxes", pa.list_(BOX))
Shard = Path | HubShard
_SLOW_ROWS = 200_000
_MOST_THREADS = 16


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
    def texts(self) -> Path:
        """Arrow file: id, sizes, texts, repeats, perhaps boxes."""
        return self.stem.with_suffix(".arrow")

    @property
    def groups(self) -> Path:
        """(groups, 5) int64: shard, group in it, rows, offset and length of the pictures."""
        return self.stem.with_suffix(".npy")

    @property
    def facts(self) -> Path:
        """JSON: rows and digest; written last, so a part that has it is whole."""
        return self.stem.with_suffix(".json")


def index_parts(shards: Sequence[Shard], cache: Path, *, with_boxes: bool) -> list[Part]:
    """The parts of one split, made as far as they are not there.

    Args:
        shards: Parquet files of the split, in order.
        cache: folder of this data set's indexes; parts of files that have changed are deleted.
        with_boxes: whether the boxes of detectors are wanted, too.

    Raises:
        DataError: a file cannot be read, lacks a column, or has a row that cannot be trained on.
        UserError: the index cannot be written.
    """
    together = -(-len(shards) // MOST_PARTS)
    parts = []
    for start in range(0, len(shards), together):
        files = tuple(shards[start : start + together])
        key = digest("index", VERSION, with_boxes, *map(_state, files))
        kind = "boxes" if with_boxes else "plain"
        name = files[0].name.partition("-")[0]  # the split
        parts.append(Part(cache / f"{name}-{kind}-{start:05d}-{key}", files))
    missing = [part for part in parts if not part.facts.is_file()]
    if missing:
        _make(missing, cache, with_boxes)
        _clear(cache, parts)
    return parts


def _make(parts: Sequence[Part], cache: Path, with_boxes: bool) -> None:
    num_rows = sum(_num_rows(shard) for part in parts for shard in part.shards)
    is_far = isinstance(parts[0].shards[0], HubShard)  # then threads wait more than they work
    threads = min(len(parts), _MOST_THREADS if is_far else os.cpu_count() or 1, _MOST_THREADS)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if num_rows > _SLOW_ROWS:
            say(f"reading the texts of {num_rows:,} rows once, into {cache}")
        with progress("reading texts", num_rows) as bar, ThreadPoolExecutor(threads) as pool:
            for rows in pool.map(lambda part: _write(part, with_boxes), parts):
                bar.advance(rows)
    except OSError as error:
        raise UserError(
            f"the texts of the data set cannot be indexed in {cache}: {error}",
            "Make room there, or move the cache: set HF_DATASETS_CACHE.",
        ) from error


def _write(part: Part, with_boxes: bool) -> int:
    """Make one part; returns its rows."""
    scratch = f"{part.stem.with_name('.' + part.stem.name)}-{os.getpid()}"
    further = [SOURCE, BOXES] if with_boxes else [SOURCE]
    schema = pa.schema([*SCHEMA, *further])
    groups: list[tuple[int, ...]] = []
    sums, num_rows = [], 0
    with pa.OSFile(f"{scratch}.arrow", "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for table in _tables(part.shards, further, groups):
            batch = table.combine_chunks().to_batches()[0]
            sums.append(digest_sum(batch.select(SCHEMA.names)))
            writer.write_batch(batch)
            num_rows += batch.num_rows
    np.save(f"{scratch}.npy", np.array(groups, np.int64).reshape(-1, 5))
    facts = {"rows": num_rows, "digest": [int(lane) for lane in total(sums)]}
    Path(f"{scratch}.json").write_text(json.dumps(facts), encoding="utf-8")
    for file in (part.texts, part.groups, part.facts):
        os.replace(f"{scratch}{file.suffix}", file)
    return num_rows


def _tables(
    shards: Sequence[Shard], further: Sequence[pa.Field], groups: list[tuple[int, ...]]
) -> Iterator[pa.Table]:
    """The rows of some shards, some ten thousand at a time; notes down the row groups."""
    for index, shard in enumerate(shards):
        with _opened(shard) as file:
            leaf, columns = _columns(file, shard, further)
            first, span, rows = 0, [], 0
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                groups.append((index, group, about.num_rows, *chunk_span(about, leaf)))
                span.append(group)
                rows += about.num_rows
                is_last = group + 1 == file.num_row_groups
                if rows and (rows >= BATCH_ROWS or is_last):
                    table = file.read_row_groups(span, columns=columns, use_threads=False)
                    yield _conformed(table, shard, first, further)
                    first, span, rows = first + rows, [], 0


def _state(shard: Shard) -> str:
    """What changes with the rows of a file."""
    if isinstance(shard, HubShard):
        return f"{shard.name} {shard.oid}"
    return f"{shard.name} {shard.stat().st_size} {shard.stat().st_mtime_ns}"


def _num_rows(shard: Shard) -> int:
    return shard.num_rows if isinstance(shard, HubShard) else _opened(shard).metadata.num_rows


def _opened(shard: Shard) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(shard.words() if isinstance(shard, HubShard) else shard)
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{shard} is no Parquet file: {reason}", "Publish it again.") from None


def _columns(
    file: pq.ParquetFile, shard: Shard, further: Sequence[pa.Field]
) -> tuple[int, list[str]]:
    """Number of the column with the pictures' bytes, and the columns to read."""
    leaves = [file.schema.column(index).path for index in range(len(file.schema.names))]
    there = set(file.schema_arrow.names)
    missing = [name for name in NEEDED if name not in there]
    if missing or BYTES_LEAF not in leaves:
        raise DataError(
            f"{shard}, of a data set with {MANIFEST}, has no column {(missing or [BYTES_LEAF])[0]};"
            f" found: {', '.join(file.schema_arrow.names)}",
            "Publish the data set again with sdprep.",
        )
    wanted = {*SCHEMA.names, *(field.name for field in further)}
    unread = ("tags.list.element.score", "tags.list.element.source")
    columns = [leaf for leaf in leaves if leaf.split(".")[0] in wanted and leaf not in unread]
    return leaves.index(BYTES_LEAF), columns


def _conformed(table: pa.Table, shard: Shard, first: int, further: Sequence[pa.Field]) -> pa.Table:
    """The rows under the index's schema, checked."""
    names = table["id"].to_pylist() if "id" in table.column_names else []
    repeats = whole_repeats(table, names, f"{shard}, row {first}")
    found = canonical(table)
    for field in further:
        if field.name in table.column_names:
            found = found.append_column(field.name, table[field.name])
    columns = []
    for field in (*SCHEMA, *further):
        if field.name == "repeats":
            columns.append(pa.array(repeats))
        elif field.name in found.column_names:
            columns.append(_cast(found[field.name], field, shard))
        else:
            columns.append(pa.nulls(table.num_rows, field.type))
    empty = [name for name in ("id", "width", "height") if found[name].null_count]
    if empty:
        raise DataError(f"{shard}: a row from {first} on has no {empty[0]}", "Publish it again.")
    return pa.table(columns, pa.schema([*SCHEMA, *further]))


def _cast(column: Any, field: pa.Field, shard: Shard) -> Any:
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"{shard}: column {field.name} is {column.type}, not {field.type}: "
            f"{str(error).splitlines()[0]}",
            "Publish the data set again with sdprep.",
        ) from None


def _clear(cache: Path, parts: Sequence[Part]) -> None:
    """Delete what was made of files that are no longer as they were."""
    name, kind = parts[0].stem.name.split("-")[:2]
    kept = {part.stem.name for part in parts}
    for file in cache.glob(f"{name}-{kind}-*"):
        if file.stem not in kept:
            with contextlib.suppress(OSError):  # Windows keeps what another run has open
                file.unlink()
