"""What an export writes of one image, and what every layout has in common."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from sdprep.recipe import Section
from sdprep.tag_rules import written_tag

UNWRITTEN_CATEGORIES = ("rating",)
"""Tags that stand in `tags_json` only: prompts do not show them either."""

_BREAKS = re.compile(r"[\s_]*[,\n][\s_,]*")
TagStyle = Literal["stored", "spaces", "underscores"]


class ExportConfig(Section):
    """What every export takes besides its own options."""

    names: Literal["id", "key"] = Field(
        "id", description="Name files after the ids of the images, or after their source keys."
    )
    tag_style: TagStyle = Field(
        "stored", description="Write tags as they are stored, with spaces, or with underscores."
    )
    score: str | None = Field(
        None,
        min_length=1,
        description="Scorer whose score is written; else preference, aesthetic, technical, the "
        "first there is.",
    )
    license: str | None = Field(
        None, min_length=1, description="Licence of images that bring none, such as cc-by-4.0."
    )


@dataclass(frozen=True)
class Item:
    """One image on its way out.

    Args:
        stem: file name without extension, unique in the export.
        extension: without dot.
        image: the file, without metadata.
        tags: what a tag file holds, with commas; empty for none.
        caption: on one line; empty for none.
        class_name: as its source gave it; empty for none.
        repeats: at least 1.
        record: everything, JSON-able: see `record_of`.
    """

    stem: str
    extension: str
    image: bytes
    tags: str
    caption: str
    class_name: str
    repeats: int
    record: Mapping[str, Any]

    @property
    def text(self) -> str:
        """What to train on where there is room for one text: the caption, else the tags."""
        return self.caption or self.tags

    def record_json(self, **first: str) -> str:
        """The record on one line, after some further keys."""
        return json.dumps({**first, **self.record}, ensure_ascii=False)


class SplitWriter(Protocol):
    """Takes the images of one split, in order of arrival."""

    def add(self, item: Item) -> None:
        """Write one image."""
        ...

    def close(self) -> None:
        """Finish what is still open."""
        ...


class Exporter(Protocol):
    """A layout; made by a plugin's `Config.build()`."""

    extensions: frozenset[str] | None  # that its readers know; None: whatever Pillow opens
    reads_orientation: bool  # whether they turn pictures as their EXIF says

    def writer(self, folder: Path) -> SplitWriter:
        """Start one split in an empty folder."""
        ...


def item_of(
    found: Mapping[str, Any],
    row: Mapping[str, Any],
    *,
    split: str,
    stem: str,
    image: bytes,
    extension: str,
    style: TagStyle,
) -> Item:
    """Put together what is written of one image.

    Args:
        found: its row in the table.
        row: the same as `schema.PREPARED`.
        split: train or validation.
        stem: file name without extension.
        image: the file to write.
        extension: of that file, without dot.
        style: of the tags.
    """
    beside = found["text"] or {}
    written = (tag for tag in row["tags"] if tag["category"] not in UNWRITTEN_CATEGORIES)
    names = [_tag_text(tag["name"], style) for tag in written]
    tags = ", ".join(name for name in names if name)
    caption = " ".join((row["caption"] or "").split())
    record = record_of(row, beside, split=split, tags=tags, text=caption or tags)
    return Item(
        stem,
        extension,
        image,
        tags,
        caption,
        beside.get("class_name") or "",
        row["repeats"],
        record,
    )


def record_of(
    row: Mapping[str, Any], beside: Mapping[str, Any], *, split: str, tags: str, text: str
) -> dict[str, Any]:
    """All that is known of an image, flat and without NULL, so that any reader finds one type.

    `id` is that of the file as it came in, whatever was stripped from it since. `tags` is made for
    trainers, `tags_json` is exact (commas, categories, ratings), and so is `caption`, which may
    have several lines. A `score` of 0 stands for none.
    """
    return {
        "id": row["id"],
        "text": text,
        "caption": row["caption"] or "",
        "tags": tags,
        "tags_json": json.dumps([_known(tag) for tag in row["tags"]], ensure_ascii=False),
        "captions_json": json.dumps(row["captions"], ensure_ascii=False),
        "rating": row["rating"] or "",
        "score": row["score"] or 0,
        "width": row["width"],
        "height": row["height"],
        "repeats": row["repeats"],
        "class_name": beside.get("class_name") or "",
        "parent_id": beside.get("parent_id") or "",
        "group_id": row["group_id"] or "",
        "source": row["source"] or "",
        "license": row["license"] or "",
        "split": split,
        "stable_train": row["stable_train"],
    }


def _known(tag: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tag.items() if value is not None}


def _tag_text(name: str, style: TagStyle) -> str:
    """A tag without what would cut it in two."""
    if style != "stored":
        return written_tag(name, style == "spaces")
    return _BREAKS.sub(" ", name).strip()
