"""Files of the prepared data set: Parquet shards that only grow, or Lance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from sdprep.schema import PREPARED

MEGABYTE = 1_000_000
FOOTER_BYTES = 700
"""Room that a column of a row group takes in footer and page index, at most."""

_IMAGE = "image.bytes"
_REPETITIVE = {"tags", "captions", "boxes", "rating", "source", "license"}
_SEARCHED = {"id", "width", "height", "score", "score_raw", "group_id", "rating", "stable_train"}


class RowWriter(Protocol):
    """Takes the rows of one split, one by one."""

    def add(self, row: dict[str, Any]) -> None:
        """Take one row of `PREPARED`."""

    def close(self) -> None:
        """Write what is still held."""


def features(schema: pa.Schema = PREPARED) -> dict[str, Any]:
    """The columns in the words of the `datasets` library."""
    named = {field.name: _feature(field.type) for field in schema}
    return {**named, "image": {"_type": "Image"}}


def prepared_schema() -> pa.Schema:
    """`PREPARED` with the metadata by which `load_dataset` knows pictures from bytes."""
    return PREPARED.with_metadata({"huggingface": json.dumps({"info": {"features": features()}})})


def _feature(type_: pa.DataType) -> Any:
    if pa.types.is_list(type_):
        return {"feature": _feature(type_.value_type), "_type": "List"}
    if pa.types.is_struct(type_):
        return {child.name: _feature(child.type) for child in type_.fields}
    names = {pa.float32(): "float32"}  # Arrow calls it float
    return {"dtype": names.get(type_, str(type_)), "_type": "Value"}


class _Buffered:
    """Rows held until they make a group, at `group_rows` or `group_bytes`, whichever is first."""

    group_rows = 100  # the Hub's viewer reads one Parquet group at a time
    group_bytes = 64 * MEGABYTE

    def __init__(self) -> None:
        self.schema = prepared_schema()
        self.rows: list[dict[str, Any]] = []
        self.num_bytes = 0

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.num_bytes += len(row["image"]["bytes"])
        if len(self.rows) >= self.group_rows or self.num_bytes >= self.group_bytes:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            group = pa.Table.from_pylist(self.rows, schema=self.schema)
            self.rows, self.num_bytes = [], 0
            self.write(group)

    def write(self, group: pa.Table) -> None:
        raise NotImplementedError


class ShardWriter(_Buffered):
    """Parquet shards of one split, `<split>-00000.parquet` and so on.

    Groups and shards end where the rows before them say, never by how many follow: more images
    leave every full shard as it is. Hence no total in the names.

    Args:
        folder: where the shards go; made with the first one.
        split: train or validation.
        shard_megabytes: a shard holds no more, unless one image alone does.
    """

    def __init__(self, folder: Path, split: str, shard_megabytes: int) -> None:
        super().__init__()
        self.folder, self.split = folder, split
        self.limit = shard_megabytes * MEGABYTE
        self.group_bytes = min(self.group_bytes, self.limit // 8)
        self.leaves = [column.path for column in _parquet_columns(self.schema)]
        self.num_shards, self.num_groups = 0, 0
        self.sink: pa.NativeFile | None = None
        self.writer: pq.ParquetWriter | None = None

    def write(self, group: pa.Table) -> None:
        """Append one row group, in a new shard if this one would grow too large."""
        footer = (self.num_groups + 2) * len(self.leaves) * FOOTER_BYTES
        if self.sink is None or self.sink.tell() + group.nbytes + footer > self.limit:
            self._next_shard()
        assert self.writer is not None
        self.writer.write_table(group, row_group_size=group.num_rows)
        self.num_groups += 1

    def close(self) -> None:
        """Write the last group and the footer."""
        self.flush()
        self._end_shard()

    def _end_shard(self) -> None:
        writer, sink, self.writer, self.sink = self.writer, self.sink, None, None
        if writer is not None and sink is not None:
            with sink:  # closed even if the disk is full: Windows deletes no open file
                writer.close()

    def _next_shard(self) -> None:
        self._end_shard()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.split}-{self.num_shards:05d}.parquet"
        self.sink = pa.OSFile(str(self.folder / name), "wb")
        self.writer = pq.ParquetWriter(
            self.sink,
            self.schema,
            version="2.6",
            data_page_version="1.0",
            compression={leaf: "NONE" if leaf == _IMAGE else "SNAPPY" for leaf in self.leaves},
            use_dictionary=[leaf for leaf in self.leaves if leaf.split(".")[0] in _REPETITIVE],
            write_statistics=[leaf for leaf in self.leaves if leaf in _SEARCHED],
            write_page_index=True,
            use_content_defined_chunking=True,
        )
        self.num_shards, self.num_groups = self.num_shards + 1, 0


def _parquet_columns(schema: pa.Schema) -> list[Any]:
    """Leaf columns as Parquet names them, such as `tags.list.element.name`."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    parquet = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [parquet.column(index) for index in range(len(parquet.names))]


class LanceWriter(_Buffered):
    """One Lance table of one split, `<split>.lance`; appended group by group.

    Args:
        folder: where it goes.
        split: train or validation.
    """

    group_rows = 8192  # a group becomes a fragment, and fragments should be few
    group_bytes = 256 * MEGABYTE

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__()
        self.uri = str(folder / f"{split}.lance")

    def write(self, group: pa.Table) -> None:
        """Append some rows."""
        import lance

        mode = "append" if Path(self.uri).exists() else "create"
        lance.write_dataset(group, self.uri, mode=mode)

    def close(self) -> None:
        """Write what is still held."""
        self.flush()
