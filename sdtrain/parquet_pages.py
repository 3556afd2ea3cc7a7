"""Where each page of pictures lies in a Parquet file, as the file's own page index says.

With it, one picture is one read of one page, wherever the file lies.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sdtrain.parquet_pictures import BYTES_LEAF
from sdtrain.thrift import read_struct

MAGIC = b"PAR1"
END_BYTES = 8
"""Length of the footer, and the magic word."""

# Numbers of fields, from parquet.thrift.
_NUM_ROWS, _GROUPS = 3, 4  # FileMetaData
_COLUMNS, _GROUP_ROWS = 1, 3  # RowGroup
_ABOUT, _INDEX_OFFSET, _INDEX_LENGTH = 3, 4, 5  # ColumnChunk
_PATH, _CODEC, _DICTIONARY = 3, 4, 11  # ColumnMetaData
_LOCATIONS = 1  # OffsetIndex
_UNCOMPRESSED = 0


class Unwalkable(ValueError):
    """The pictures of a file cannot be read one by one; the message says why."""


def footer_bytes(end: bytes) -> int:
    """Length of the footer, with what stands behind it.

    Args:
        end: the last `END_BYTES` of a file, or more.

    Raises:
        Unwalkable: it is no Parquet file.
    """
    if len(end) < END_BYTES or end[-len(MAGIC) :] != MAGIC:
        raise Unwalkable("it is no Parquet file")
    return int.from_bytes(end[-END_BYTES : -len(MAGIC)], "little") + END_BYTES


def read_footer(footer: bytes) -> tuple[int, list[tuple[int, int]]]:
    """Rows of a file, and offset and length of the page index of each row group's pictures.

    Args:
        footer: the last `footer_bytes` of the file.

    Raises:
        Unwalkable: a group is compressed, or has no page index.
    """
    try:
        about, _ = read_struct(footer)
        spans = [_index_span(group) for group in about[_GROUPS]]
        return about[_NUM_ROWS], spans
    except (IndexError, KeyError) as error:
        raise Unwalkable("its footer is damaged") from error


def _index_span(group: dict[int, Any]) -> tuple[int, int]:
    name = BYTES_LEAF.encode().split(b".")
    for column in group[_COLUMNS]:
        about = column[_ABOUT]
        if about[_PATH] != name:
            continue
        if about[_CODEC] != _UNCOMPRESSED or _DICTIONARY in about:
            raise Unwalkable("its pictures are compressed once more")
        if _INDEX_OFFSET not in column:
            raise Unwalkable("it has no page index")
        return column[_INDEX_OFFSET], column[_INDEX_LENGTH]
    raise Unwalkable(f"it has no column {BYTES_LEAF}")


def read_pages(indexes: list[bytes]) -> np.ndarray:
    """Where all pages lie.

    Args:
        indexes: the page index of each row group's pictures.

    Returns:
        (pages, 4) int64: row group, first row in it, offset, length with header; in order.
    """
    pages = []
    for group, data in enumerate(indexes):
        try:
            locations = read_struct(data)[0][_LOCATIONS]
            pages += [(group, each[3], each[1], each[2]) for each in locations]
        except (IndexError, KeyError, ValueError) as error:
            raise Unwalkable("its page index is damaged") from error
    return np.array(pages, np.int64).reshape(-1, 4)
