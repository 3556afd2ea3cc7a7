"""Columns of published shards as training takes them: which, of what types, and checked."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdprep.errors import DataError
from sdprep.schema import BOX, MANIFEST
from sdtrain.hub_shards import HubShard
from sdtrain.ids import Ids
from sdtrain.parquet_digest import leaves_of
from sdtrain.parquet_pictures import BYTES_LEAF
from sdtrain.repeats import whole_repeats
from sdtrain.text_columns import SCHEMA, canonical

ROWS = pa.schema([SCHEMA.field(name) for name in ("id", "width", "height", "repeats")])
"""What a start needs of every row."""
CHECKED = pa.schema([*ROWS, SCHEMA.field("score")])
"""What is read of every row, so that values that make no sense are found before training."""
TEXTS = pa.schema(
    [
        *[SCHEMA.field(name) for name in ("caption", "captions", "tags", "score", "group_id")],
        pa.field("source", pa.string()),
    ]
)
"""What prompts are made of, and what rows are told apart by."""
BOXES = pa.schema([pa.field("boxes", pa.list_(BOX))])
"""What detectors found."""

BATCH_ROWS = 65_536

Shard = Path | HubShard
"""A Parquet file on this disk or on the Hub."""

_MOST_THREADS = 16
_MOST_FOOTER_BYTES = 32_000_000
_footers: list[int] = []

_NEEDED = ("id", "image", "width", "height")
_NEVER_EMPTY = ("id", "width", "height")


@cache
def readers(*, are_far: bool = False) -> ThreadPoolExecutor:
    """The threads that read shards; always the same, as each keeps the memory that it once had.

    Args:
        are_far: whether they wait for a network more than they work.
    """
    count = _MOST_THREADS if are_far else os.cpu_count() or 1
    return ThreadPoolExecutor(min(count, _MOST_THREADS))


def state(shard: Shard) -> str:
    """What changes with the rows of a file."""
    if isinstance(shard, HubShard):
        return f"{shard.name} {shard.oid}"
    about = shard.stat()
    return f"{shard.resolve()} {about.st_size} {about.st_mtime_ns}"


def stored_bytes(shard: Shard) -> BinaryIO:
    """A shard as a file of bytes."""
    return cast(BinaryIO, shard.words()) if isinstance(shard, HubShard) else shard.open("rb")


@contextmanager
def open_shard(shard: Shard) -> Iterator[pq.ParquetFile]:
    """A shard, its footer read.

    Raises:
        DataError: it is no Parquet file.
    """
    try:
        file = pq.ParquetFile(shard.words() if isinstance(shard, HubShard) else shard)
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{shard} is no Parquet file: {reason}", "Publish it again.") from None
    with file:
        yield file
    _collect(file.metadata.serialized_size)


def _collect(footer_bytes: int) -> None:
    """Free footers: pyarrow's point at themselves, and take ten times their bytes in memory."""
    _footers.append(footer_bytes)
    if sum(_footers) > _MOST_FOOTER_BYTES:
        _footers.clear()
        gc.collect()


def require_columns(file: pq.ParquetFile, shard: Shard, schemas: Sequence[pa.Schema]) -> int:
    """Number of the column with the pictures' bytes, once all columns are of types that fit.

    Raises:
        DataError: a column is missing, or holds something else.
    """
    paths = [file.schema.column(at).path for at in range(len(file.schema.names))]
    there = set(file.schema_arrow.names)
    missing = [name for name in _NEEDED if name not in there]
    if missing or BYTES_LEAF not in paths:
        raise DataError(
            f"{shard}, of a data set with {MANIFEST}, has no column {(missing or [BYTES_LEAF])[0]};"
            f" found: {', '.join(file.schema_arrow.names)}",
            "Publish the data set again with sdprep.",
        )
    for schema in schemas:
        _conformed(file.schema_arrow.empty_table(), shard, 0, schema)
    return paths.index(BYTES_LEAF)


def group_spans(file: pq.ParquetFile) -> Iterator[list[int]]:
    """The row groups of a shard, about `BATCH_ROWS` rows at a time."""
    span: list[int] = []
    rows = 0
    for group in range(file.num_row_groups):
        span.append(group)
        rows += file.metadata.row_group(group).num_rows
        if rows >= BATCH_ROWS:
            yield span
            span, rows = [], 0
    if rows:
        yield span


def read_groups(
    file: pq.ParquetFile, shard: Shard, groups: Sequence[int], schema: pa.Schema, first: int = 0
) -> pa.RecordBatch:
    """Some columns of some row groups, checked.

    Args:
        file: the shard, opened.
        shard: its path, for messages.
        groups: in order; at least one row in all.
        schema: the columns; those that the file lacks are empty.
        first: the first row, for messages.

    Raises:
        DataError: a value cannot be trained on.
    """
    wanted = leaves_of(file, frozenset({"id", *schema.names}))
    paths = [file.schema.column(at).path for at in wanted]
    if "id" not in schema.names and len(paths) > 1:
        paths.remove("id")  # it is there for the number of rows
    table = file.read_row_groups(list(groups), columns=paths, use_threads=False)
    return _conformed(table, shard, first, schema).combine_chunks().to_batches()[0]


def _conformed(table: pa.Table, shard: Shard, first: int, schema: pa.Schema) -> pa.Table:
    columns = []
    texts = canonical(table)
    for field in schema:
        found = texts if field.name in texts.column_names else table
        if field.name == "repeats":
            ids = Ids(table["id"].chunks)
            columns.append(pa.array(whole_repeats(table, ids, str(shard), first)))
        elif field.name in found.column_names:
            columns.append(_cast(found[field.name], field, shard))
        else:
            columns.append(pa.nulls(table.num_rows, field.type))
    made = pa.table(columns, schema)
    empty = [n for n in _NEVER_EMPTY if n in schema.names and made[n].null_count]
    if empty:
        row = first + pc.index(pc.is_null(made[empty[0]]), True).as_py()
        raise DataError(f"{shard}, row {row} has no {empty[0]}", "Publish it again.")
    for name in [n for n in ("width", "height") if n in schema.names]:
        row = pc.index(pc.less(made[name], 1), True).as_py()
        if row >= 0:
            found_px = made[name][row].as_py()
            raise DataError(
                f"{shard}, row {first + row} has {name} = {found_px}, expected 1 px or more",
                "Publish it again.",
            )
    return made


def _cast(column: Any, field: pa.Field, shard: Shard) -> Any:
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"{shard}: column {field.name} is {column.type}, not {field.type}: "
            f"{str(error).splitlines()[0]}",
            "Publish the data set again with sdprep.",
        ) from None
