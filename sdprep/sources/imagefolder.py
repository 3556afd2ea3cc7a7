"""A folder as load_dataset's imagefolder reads it: images and a list of what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from sdprep.source_item import SourceConfig
from sdprep.sources._folder import FolderSource


class Config(SourceConfig):
    """Images with `metadata.jsonl`, `.csv` or `.parquet`; folder names mean nothing."""

    type: Literal["imagefolder"] = "imagefolder"
    path: Path = Field(description="The folder.")

    def build(self) -> FolderSource:
        """Make the source; raises DataError if there is no such folder."""
        return FolderSource(self.path, name=self.name, kohya_folders=False, limits=self.limits())
