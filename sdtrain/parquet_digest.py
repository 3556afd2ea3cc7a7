"""A digest of the texts of a Parquet file, of their bytes as they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, BinaryIO

import numpy as np
import pyarrow.parquet as pq

from sdtrain.text_columns import LANES, SCHEMA

UNREAD = ("tags.list.element.score", "tags.list.element.source")
"""Of the columns that training reads, what it leaves aside."""


def leaves_of(file: pq.ParquetFile, columns: frozenset[str]) -> list[int]:
    """Numbers of the leaf columns that make up some columns, less `UNREAD`."""
    paths = (file.schema.column(at).path for at in range(len(file.schema.names)))
    return [
        at for at, path in enumerate(paths) if path.split(".")[0] in columns and path not in UNREAD
    ]


class TextBytes:
    """What is stored of ids, sizes, texts and repeats in one file.

    Each row group is hashed as it is stored, undecoded: that takes a tenth of the time of hashing
    its rows. The digest is the sum over groups, so it does not depend on which file holds which.
    The same rows in other groups, or encoded in another way, have another digest.
    """

    def __init__(self, file: pq.ParquetFile) -> None:
        self._metadata = file.metadata
        self._leaves = leaves_of(file, frozenset(SCHEMA.names))
        types = [(field.name, str(field.type)) for field in file.schema_arrow]
        self._types = repr([(name, type_) for name, type_ in types if name in SCHEMA.names])

    def digest_sum(self, stored: BinaryIO) -> np.ndarray:
        """(2,) uint64, sums modulo 2^64.

        Args:
            stored: the bytes of the file.
        """
        added = np.zeros(LANES, np.uint64)
        for group in range(self._metadata.num_row_groups):
            found = self._hashed(stored, self._metadata.row_group(group))
            added += np.frombuffer(found, "<u8")
        return added

    def _hashed(self, file: BinaryIO, group: Any) -> bytes:
        chunks = [group.column(leaf) for leaf in self._leaves]
        spans = [_span(chunk) for chunk in chunks]
        codecs = [
            (chunk.compression, length) for chunk, (_, length) in zip(chunks, spans, strict=True)
        ]
        found = blake2b(f"{self._types} {codecs} {group.num_rows}".encode(), digest_size=8 * LANES)
        for start, end in _merged(spans):
            file.seek(start)
            found.update(file.read(end - start))
        return found.digest()


def _span(chunk: Any) -> tuple[int, int]:
    """Where a column of a group begins, and its length."""
    first = chunk.data_page_offset
    if chunk.has_dictionary_page:
        first = min(first, chunk.dictionary_page_offset)
    return first, chunk.total_compressed_size


def _merged(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Starts and ends; those that touch are read at once."""
    start, end = spans[0][0], spans[0][0]
    for first, length in spans:
        if first != end:
            yield start, end
            start = first
        end = first + length
    yield start, end
