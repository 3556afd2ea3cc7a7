"""Folders as kohya's sd-scripts read them, for its DreamBooth and its fine-tuning data sets.

`train/<repeats>_<class>/` holds images with `.txt` (tags), `.caption` (one line) and `.json` (all
that is known); `train/meta_cap_dd.json` maps images to caption and tags.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, TextIO

from pydantic import Field

from sdprep.export_item import ExportConfig, Item
from sdprep.file_names import safe_stem

METADATA = "meta_cap_dd.json"


class Config(ExportConfig):
    """Image folders with .txt, .caption and meta_cap_dd.json, for kohya's sd-scripts."""

    type: Literal["kohya"] = "kohya"
    class_name: str = Field(
        "image",
        min_length=1,
        description="Class of images that have none; sd-scripts uses it where there is no text.",
    )

    def build(self) -> KohyaExport:
        """Make the export."""
        return KohyaExport(safe_stem(self.class_name) or "image")


class KohyaExport:
    """The layout of `<repeats>_<class>` folders."""

    extensions = frozenset({"jpg", "png", "webp", "bmp"})  # all that sd-scripts looks for
    reads_orientation = False  # it opens images without turning them

    def __init__(self, class_name: str) -> None:
        self.class_name = class_name

    def writer(self, folder: Path) -> KohyaWriter:
        """Start one split."""
        return KohyaWriter(folder, self.class_name)


class KohyaWriter:
    """Writes one split; an image without any text stays out of the metadata, as sd-scripts asks."""

    def __init__(self, folder: Path, class_name: str) -> None:
        self.folder, self.class_name = folder, class_name
        self._metadata: TextIO | None = None

    def add(self, item: Item) -> None:
        """Write an image, its text files, and its entry."""
        group = f"{item.repeats}_{safe_stem(item.class_name) or self.class_name}"
        place = self.folder / group
        place.mkdir(exist_ok=True)
        (place / f"{item.stem}.{item.extension}").write_bytes(item.image)
        texts = {"txt": item.tags, "caption": item.caption, "json": item.record_json()}
        for extension, text in texts.items():
            if text:
                file = place / f"{item.stem}.{extension}"
                file.write_text(text, encoding="utf-8", newline="\n")
        entry = {"caption": item.caption, "tags": item.tags}
        entry = {key: text for key, text in entry.items() if text}
        if entry:
            self._add_entry(f"{group}/{item.stem}", entry)

    def _add_entry(self, key: str, entry: dict[str, str]) -> None:
        """Entries are written as they come: millions of them would not fit into memory."""
        if self._metadata is None:
            path = self.folder / METADATA
            self._metadata = path.open("w", encoding="utf-8", newline="\n")
            self._metadata.write("{\n")
        else:
            self._metadata.write(",\n")
        name, value = (json.dumps(each, ensure_ascii=False) for each in (key, entry))
        self._metadata.write(f"{name}: {value}")

    def close(self) -> None:
        """End the metadata."""
        if self._metadata is not None:
            self._metadata.write("\n}\n")
            self._metadata.close()
