"""Tar shards as WebDataset reads them: `<name>.<ext>`, `<name>.json` and `<name>.txt` in a row.

The text is the caption, else the tags; it is there for every image, if empty. Nothing is pickled.
Pictures with an orientation flag keep it: the reader turns them, as `datasets` does.
The same images give the same bytes: no times, no owners, images in order of arrival.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Literal

from pydantic import Field

from sdprep.export_item import ExportConfig, Item

MEGABYTE = 1_000_000


class Config(ExportConfig):
    """Tar shards with image, .json and .txt members, for WebDataset and streaming trainers."""

    type: Literal["webdataset"] = "webdataset"
    shard_megabytes: int = Field(
        500, ge=1, le=100_000, description="A shard is closed at this size, in millions of bytes."
    )

    def build(self) -> WebDatasetExport:
        """Make the export."""
        return WebDatasetExport(self.shard_megabytes * MEGABYTE)


class WebDatasetExport:
    """Shards `00000.tar`, `00001.tar`, … a split."""

    extensions = None
    reads_orientation = True

    def __init__(self, shard_bytes: int) -> None:
        self.shard_bytes = shard_bytes

    def writer(self, folder: Path) -> WebDatasetWriter:
        """Start one split."""
        return WebDatasetWriter(folder, self.shard_bytes)


class WebDatasetWriter:
    """Writes one split; a sample never spans two shards."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._shard: tarfile.TarFile | None = None
        self._num_shards = 0

    def add(self, item: Item) -> None:
        """Write the members of one image."""
        parts = {
            item.extension: item.image,
            "json": item.record_json().encode("utf-8"),
            "txt": item.text.encode("utf-8"),
        }
        size = sum(1024 + len(part) for part in parts.values())
        if self._shard is not None and self._shard.offset + size > self.shard_bytes:
            self.close()
        if self._shard is None:
            path = self.folder / f"{self._num_shards:05d}.tar"
            self._shard = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
            self._num_shards += 1
        for extension, part in parts.items():
            member = tarfile.TarInfo(f"{item.stem}.{extension}")  # mtime, uid and gid are 0
            member.size = len(part)
            self._shard.addfile(member, io.BytesIO(part))

    def close(self) -> None:
        """End the shard."""
        if self._shard is not None:
            self._shard.close()
        self._shard = None
