"""A folder of images with text beside them, in kohya's layout or without one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from sdprep.source_item import SourceConfig
from sdprep.sources._folder import FolderSource, Role


class Config(SourceConfig):
    """A folder on this machine."""

    type: Literal["folder"] = "folder"
    path: Path = Field(description="The folder.")
    recursive: bool = Field(True, description="Look into subfolders.")
    txt: Role = Field("tags", description="What .txt files hold.")
    caption: Role = Field("caption", description="What .caption files hold.")
    kohya_folders: bool = Field(
        True, description="Read folders called <repeats>_<class> the way kohya's scripts do."
    )

    def build(self) -> FolderSource:
        """Make the source; raises DataError if there is no such folder."""
        roles = {"txt": self.txt, "caption": self.caption}
        return FolderSource(
            self.path,
            name=self.name,
            recursive=self.recursive,
            roles=roles,
            kohya_folders=self.kohya_folders,
            limits=self.limits(),
        )
