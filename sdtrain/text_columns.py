"""The columns that training texts are made of, as Arrow: which they are, and their digest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

RECORD_COLUMNS = ("id", "caption", "captions", "tags", "score", "group_id", "repeats")
"""What prompts are made of, what near duplicates are told by, and how often a row is trained."""
FIELDS = {"captions": ("text", "source"), "tags": ("name", "category")}
"""Of the structs in lists, what texts depend on."""

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("width", pa.int64()),
        pa.field("height", pa.int64()),
        pa.field("caption", pa.string()),
        pa.field("captions", pa.list_(pa.struct({"text": pa.string(), "source": pa.string()}))),
        pa.field("tags", pa.list_(pa.struct({"name": pa.string(), "category": pa.string()}))),
        pa.field("score", pa.int64()),
        pa.field("group_id", pa.string()),
        pa.field("repeats", pa.int64()),
    ]
)
"""Of a published row, all that training reads but the picture and the boxes."""

LANES = 2
_MISSING = "\x00"


def digest_sum(table: pa.Table | pa.RecordBatch) -> np.ndarray:
    """A digest of rows that does not depend on their order, and adds up over parts of a set.

    Each row is hashed; what comes out is the sum of the hashes, so twelve million rows need
    neither memory nor sorting.

    Args:
        table: any columns of text, numbers, lists and structs; all of them count, in this order.

    Returns:
        (2,) uint64, sums modulo 2^64.
    """
    if not table.num_rows:
        return np.zeros(LANES, np.uint64)
    columns = [_whole(table.column(index)) for index in range(table.num_columns)]
    rows = _joined([_text(column) for column in columns], "\x1d")
    blobs = rows.cast(pa.large_binary()).to_pylist()
    hashed = b"".join([blake2b(blob, digest_size=8 * LANES).digest() for blob in blobs])
    return np.frombuffer(hashed, "<u8").reshape(-1, LANES).sum(0, dtype=np.uint64)


def total(sums: Iterable[np.ndarray]) -> np.ndarray:
    """The digest of all parts, of the digests of each."""
    added = np.zeros(LANES, np.uint64)
    for each in sums:
        added += each
    return added


def canonical(table: pa.Table) -> pa.Table:
    """The same rows with just the columns and fields that texts depend on."""
    names = [name for name in ("width", "height", *RECORD_COLUMNS) if name in table.column_names]
    columns = [_projected(_whole(table[name]), FIELDS.get(name, ())) for name in names]
    return pa.table(dict(zip(names, columns, strict=True)))


def records(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows of `canonical` as `render_prompt` takes them; far faster than `to_pylist`."""
    columns = {
        name: _lists(column) if name in FIELDS else column.to_pylist()
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }
    names = list(columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _lists(column: Any) -> list[list[dict[str, Any]]]:
    """A list of structs as lists of dicts; null is an empty list."""
    values = column.flatten()  # leaves null lists out, whatever they hide
    fields = {name: values.field(name).to_pylist() for name in _field_names(values.type)}
    keys = tuple(fields)
    dicts = [dict(zip(keys, row, strict=True)) for row in zip(*fields.values(), strict=True)]
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    ends = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    return [dicts[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def _projected(array: Any, fields: Sequence[str]) -> Any:
    if not fields or not _is_list(array.type) or not pa.types.is_struct(array.type.value_type):
        return array
    values = array.flatten()
    there = [name for name in fields if values.type.get_field_index(name) >= 0]
    kept = pa.StructArray.from_arrays([values.field(name) for name in there], names=there)
    return pa.ListArray.from_arrays(_offsets(array), kept)


def _offsets(array: Any) -> Any:
    """Where the lists of an array begin in `array.flatten()`; null lists are empty there."""
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())


def _text(array: Any) -> Any:
    """Anything as strings, so that what differs reads differently."""
    type_ = array.type
    if pa.types.is_dictionary(type_):
        return _text(array.dictionary_decode())
    if _is_list(type_):
        offsets = _offsets(array)
        lists = pa.ListArray.from_arrays(offsets, _text(array.flatten()))
        lengths = pc.list_value_length(lists).cast(pa.large_string())
        return _joined([lengths, pc.binary_join(lists, _scalar("\x1f"))], ":")
    if pa.types.is_struct(type_):
        fields = [_text(pc.struct_field(array, [index])) for index in range(type_.num_fields)]
        return _joined(fields, "\x1e")
    return pc.fill_null(array.cast(pa.large_string()), _MISSING)


def _joined(columns: Sequence[Any], separator: str) -> Any:
    return pc.binary_join_element_wise(*columns, _scalar(separator))


def _scalar(text: str) -> Any:
    return pa.scalar(text, pa.large_string())


def _is_list(type_: Any) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_))


def _field_names(type_: Any) -> list[str]:
    return [type_.field(index).name for index in range(type_.num_fields)]


def _whole(column: Any) -> Any:
    """One array of a column that may come in chunks."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
