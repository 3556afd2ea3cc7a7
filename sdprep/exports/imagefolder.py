"""Images with `metadata.jsonl`, as `datasets.load_dataset("imagefolder", data_dir=…)` has them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TextIO

from sdprep.export_item import ExportConfig, Item

METADATA = "metadata.jsonl"


class Config(ExportConfig):
    """Images with metadata.jsonl, for load_dataset("imagefolder") and diffusers' scripts."""

    type: Literal["imagefolder"] = "imagefolder"

    def build(self) -> ImageFolderExport:
        """Make the export."""
        return ImageFolderExport()


class ImageFolderExport:
    """One folder a split, one line of metadata an image."""

    extensions = None
    reads_orientation = True

    def writer(self, folder: Path) -> ImageFolderWriter:
        """Start one split."""
        return ImageFolderWriter(folder)


class ImageFolderWriter:
    """Writes one split."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata: TextIO = (folder / METADATA).open("w", encoding="utf-8", newline="\n")

    def add(self, item: Item) -> None:
        """Write an image and its line."""
        name = f"{item.stem}.{item.extension}"
        (self.folder / name).write_bytes(item.image)
        self._metadata.write(item.record_json(file_name=name) + "\n")

    def close(self) -> None:
        """End the metadata."""
        self._metadata.close()
