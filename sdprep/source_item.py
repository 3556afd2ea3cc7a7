"""What a source gives: images with whatever text lies beside them, and what it met on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from sdprep.recipe import Section
from sdprep.seeding import digest


@dataclass(frozen=True)
class ItemText:
    """What stands beside one image; the fields of schema.TEXT, None where there is nothing."""

    caption: str | None = None
    tags: tuple[tuple[str, str | None], ...] = ()  # (name, category)
    rating: str | None = None
    repeats: int | None = None
    class_name: str | None = None
    parent_id: str | None = None
    license: str | None = None
    split: str | None = None

    def row(self, source: str) -> dict[str, Any] | None:
        """The value of the `text` column, or None when there is nothing at all."""
        fields: dict[str, Any] = dict(vars(self))
        fields["tags"] = [{"name": n, "category": c} for n, c in self.tags] or None
        if all(value is None for value in fields.values()):
            return None
        return {**fields, "stamp": f"{digest(*vars(self).items())}@{source}"}


@dataclass(frozen=True)
class SourceItem:
    """One image that a source names.

    Give `path` for a file on disk, else `load`. Size and mtime, where known, let a later run skip
    the file unread.
    """

    key: str  # unique in its source, POSIX separators
    path: Path | None = None
    load: Callable[[], bytes] | None = None
    num_bytes: int | None = None
    mtime_ns: int | None = None
    text: ItemText = ItemText()


@dataclass(frozen=True)
class Finding:
    """Something a source met that is no image row.

    Level `ignored`: not an image, counted. `skipped`: never opened, such as a FIFO, listed.
    `missing`: named as an image but not usable, listed among the rejects. `warning`: all else.
    """

    level: Literal["ignored", "skipped", "missing", "warning"]
    kind: str  # orphan_sidecar, fifo, missing_file, bad_metadata_line, text_cp1252, ...
    key: str


@dataclass(frozen=True)
class Limits:
    """What of a source is good enough."""

    min_side: int = 64  # pixels
    first_frame: bool = False
    max_rejected_share: float = 0.2


class SourceConfig(Section):
    """What every source takes besides its own options."""

    name: str | None = Field(
        None,
        min_length=1,
        description="Name of the source in the table; keeps its meaning when the images move.",
    )
    min_side: int = Field(64, ge=1, description="Shortest accepted side, in pixels.")
    first_frame: bool = Field(
        False, description="Take the first frame of animations instead of rejecting them."
    )
    max_rejected: float = Field(
        0.2, ge=0, le=1, description="Stop when more than this share of the files is unusable."
    )

    def limits(self) -> Limits:
        """The limits, for the source that `build()` makes."""
        return Limits(self.min_side, self.first_frame, self.max_rejected)


class Source(Protocol):
    """Where images come from; made by a plugin's `Config.build()`."""

    name: str
    place: str  # tells apart two of the same name: an absolute path, or such as hf://user/name
    name_is_chosen: bool
    limits: Limits
    findings: list[Finding]  # complete once iter_samples() is exhausted

    def totals(self) -> tuple[int, int] | None:
        """Number of images and their bytes in all, or None where only reading would tell."""
        ...

    def iter_samples(self) -> Iterator[SourceItem]:
        """All images, always in the same order."""
        ...
