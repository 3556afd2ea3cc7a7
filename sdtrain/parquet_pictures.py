"""One picture out of a Parquet file, without reading the hundred around it.

Published shards store pictures uncompressed, so the pages of their column can be walked: each has
a small header that says how long it is and how many rows it holds. Files that were written in
another way are read by the row group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from sdtrain.thrift import read_struct, read_varint

BYTES_LEAF, STRUCT = "image.bytes", "image"
_HEADER_BYTES = 256  # of a page; statistics are not written for pictures
_DATA_PAGE, _PLAIN, _RLE = 0, 0, 3
_PRESENT = 2  # definition level of a value in a nullable struct


@dataclass(frozen=True)
class Place:
    """Where one picture is stored.

    Args:
        file: the shard.
        group: row group in it.
        row: of the group.
        offset: where the group's column of pictures begins, bytes; -1: it cannot be walked.
        num_bytes: length of that column.
    """

    file: Path
    group: int
    row: int
    offset: int
    num_bytes: int


def chunk_span(group: Any, leaf: int) -> tuple[int, int]:
    """Offset and length of the column of pictures in a row group; (-1, 0) if it is not plain."""
    column = group.column(leaf)
    is_plain = column.compression == "UNCOMPRESSED" and set(column.encodings) <= {"PLAIN", "RLE"}
    if not is_plain or column.has_dictionary_page:
        return -1, 0
    return column.data_page_offset, column.total_compressed_size


def read_picture(place: Place) -> bytes | None:
    """The stored bytes of one picture; None where the row has none.

    Raises:
        OSError: the file is gone.
    """
    if place.offset >= 0:
        with place.file.open("rb") as file:
            found = _walk(file, place)
        if found is not None:
            return found
    table = _opened(place.file).read_row_group(place.group, columns=[STRUCT])
    cell = table[STRUCT][place.row].as_py()
    return None if cell is None else cell["bytes"]


def picture_of_page(page: bytes, index: int) -> bytes | None:
    """The stored bytes of one picture of a whole page, header and all.

    Args:
        page: as it lies in the file.
        index: row of the page.

    Returns:
        None if it is no page as published shards have them.
    """
    header = _page_header(page)
    if header is None or len(page) != header.length + header.num_bytes:
        return None
    return _value(page[header.length :], header.num_values, index)


@lru_cache(maxsize=8)
def _opened(file: Path) -> pq.ParquetFile:
    return pq.ParquetFile(file)


def _walk(file: BinaryIO, place: Place) -> bytes | None:
    """Go from page to page; None if one is not as published shards have them."""
    at, first = place.offset, 0
    while at < place.offset + place.num_bytes:
        file.seek(at)
        header = _page_header(file.read(_HEADER_BYTES))
        if header is None:
            return None
        if place.row < first + header.num_values:
            file.seek(at + header.length)
            return _value(file.read(header.num_bytes), header.num_values, place.row - first)
        at += header.length + header.num_bytes
        first += header.num_values
    return None


def _value(page: bytes, num_values: int, index: int) -> bytes | None:
    levels = int.from_bytes(page[:4], "little")
    run, at = read_varint(page, 4)
    # One run of equal levels, all present: what is written where no row lacks its picture.
    if run != num_values << 1 or page[at] != _PRESENT or at + 1 != 4 + levels:
        return None
    at += 1
    for _ in range(index):
        at += 4 + int.from_bytes(page[at : at + 4], "little")
    length = int.from_bytes(page[at : at + 4], "little")
    return page[at + 4 : at + 4 + length]


# --- the header of a page -------------------------------------------------------------------------


@dataclass(frozen=True)
class _PageHeader:
    length: int
    num_bytes: int
    num_values: int


def _page_header(data: bytes) -> _PageHeader | None:
    """What a data page says of itself; None if it is of another kind.

    Source: parquet-format, parquet.thrift, PageHeader and DataPageHeader.
    """
    try:
        page, at = read_struct(data)
    except (IndexError, ValueError):
        return None
    inside = page.get(5)
    if page.get(1) != _DATA_PAGE or page.get(2) != page.get(3) or not isinstance(inside, dict):
        return None
    if inside.get(2) != _PLAIN or inside.get(3) != _RLE:
        return None
    return _PageHeader(at, page[3], inside[1])
