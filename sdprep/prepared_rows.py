"""From the table under curation to rows of the prepared data set.

A few rows are in memory at a time; so twelve million images need no more memory than a thousand.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import pyarrow as pa

from sdprep.console import warn
from sdprep.errors import DataError, UserError
from sdprep.schema import SPLITS
from sdprep.stored_images import original_bytes
from sdprep.strip import image_extension, strip_metadata
from sdprep.table import PhotoTable

BATCH_ROWS = 32
SCORERS = ("preference", "aesthetic", "technical")
"""Which score is published when the recipe names none: the first that is there."""

Row = dict[str, Any]
PromptOf = Callable[[Mapping[str, Any]], str]

_PLAIN = ("id", "width", "height", "format", "exif_orientation", "sources", "text")
_STORED = ("image", "image_uri")
_FOLDED = ("caption", "captions", "tags", "signature", "group_id", "split", "stable_train")


@dataclass
class Losses:
    """What happened to rows on the way: nothing vanishes unsaid."""

    left_out: Counter[str] = field(default_factory=Counter)  # reason -> rows
    examples: dict[str, str] = field(default_factory=dict)  # reason -> message of the first
    num_repacked: int = 0  # files whose format has no lossless way, stored as PNG

    def leave_out(self, reason: str, message: str) -> None:
        """Count one row that is not published."""
        self.left_out[reason] += 1
        self.examples.setdefault(reason, message)

    def said(self) -> str:
        """All of it in a sentence, with an example of each reason."""
        counted = sorted(self.left_out.items())
        return "; ".join(f"{num} {reason} ({self.examples[reason]})" for reason, num in counted)


def score_column(table: PhotoTable, name: str | None) -> str | None:
    """Column of the published score: the one named, else the first of `SCORERS`, else None.

    Raises:
        UserError: the one named is not in the table, or has no field `score`.
    """
    for candidate in [name] if name else SCORERS:
        column = f"score_{candidate.removeprefix('score_')}"
        if table.has(column) and _has_field(table, column, "score"):
            return column
    if name:
        there = [column for column in table.columns() if column.startswith("score_")]
        raise UserError(
            f"publish.score = {name!r}: {table.path} has no column score_{name} with a score",
            f"There are: {', '.join(there) or 'none; run sdprep score first'}.",
        )
    return None


def prepared_rows(
    table: PhotoTable, score: str | None, license: str | None, prompt_of: PromptOf, losses: Losses
) -> Iterator[tuple[str, Row]]:
    """Every kept image in order of arrival, as (split, row of `schema.PREPARED`).

    Args:
        score: struct column of the published score, or None.
        license: of images that bring none of their own.
        prompt_of: renders the validation prompt of a row, whichever its split.
        losses: receives what was left out, and why.
    """
    for found, row in stripped_rows(table, score, license, losses):
        row["validation_prompt"] = prompt_of(row)
        yield split_of(found), row


def stripped_rows(
    table: PhotoTable, score: str | None, license: str | None, losses: Losses
) -> Iterator[tuple[Row, Row]]:
    """Every kept image in order of arrival: its row in the table, and as it leaves the house.

    The second lacks its validation prompt only; its image holds no private metadata.
    """
    for found in _scan(table, _columns(table, score)):
        row = _row(found, score, license, losses)
        if row is not None:
            yield found, row


def split_of(found: Row) -> str:
    """The side of a row of the table; train, where the table has no split."""
    return found.get("split") or SPLITS[0]


def check_rows(table: PhotoTable) -> None:
    """Refuse a table whose kept images are none, or have no split yet; warn without any split.

    Raises:
        DataError: see above.
    """
    kept = table.kept_predicate()
    if not table.count(kept):
        raise DataError(
            f"{table.path} has no image to publish: all {table.count()} are rejected",
            f"Ask why: sdprep status {table.path}",
        )
    if not table.has("split"):
        warn(
            f"{table.path} has no split: all images go to train, and nothing can be validated. "
            f"Run first: sdprep split {table.path}"
        )
        return
    stray = table.count(f"{kept} AND (split IS NULL OR split NOT IN ('train', 'validation'))")
    if stray:
        raise DataError(
            f"{stray} kept images of {table.path} have no split yet",
            f"A copy of them may be in validation. Run first: sdprep split {table.path}",
        )


def _has_field(table: PhotoTable, column: str, name: str) -> bool:
    type_ = table.schema.field(column).type
    return pa.types.is_struct(type_) and type_.get_field_index(name) >= 0


def _columns(table: PhotoTable, score: str | None) -> list[str]:
    columns = [*_PLAIN, *_STORED, *(name for name in _FOLDED if table.has(name))]
    if score:
        columns += [
            f"{score}.{name}" for name in ("score", "score_raw") if _has_field(table, score, name)
        ]
    boxes = [name for name in table.columns() if name.startswith("boxes_")]
    return columns + [f"{name}.boxes" for name in boxes if _has_field(table, name, "boxes")]


def _scan(table: PhotoTable, columns: list[str]) -> Iterator[Row]:
    """Kept rows in the order they are stored, which is the order of arrival, with their bytes.

    One pass: looking images up by id would read all ids again for every few of them.
    """
    scanner = table.dataset.scanner(
        columns={name: name for name in columns},
        filter=table.kept_predicate(),
        batch_size=BATCH_ROWS,
        batch_readahead=2,
        fragment_readahead=1,
        scan_in_order=True,
    )
    for batch in scanner.to_batches():
        yield from batch.to_pylist()


def _row(found: Row, score: str | None, license: str | None, losses: Losses) -> Row | None:
    rank = found.get(f"{score}.score")
    if isinstance(rank, int) and rank < 1:  # a rank 0 says "never train on this"
        losses.leave_out("score_zero", f"image {found['id']}: {score}.score is {rank}")
        return None
    try:
        data = original_bytes(found)
    except DataError as error:  # a linked file is gone, or is another one now
        losses.leave_out("source_changed", error.message)
        return None
    try:
        image = strip_metadata(data, found["format"], orientation=found["exif_orientation"])
    except DataError as error:
        losses.leave_out("metadata_not_removable", f"image {found['id']}: {error.message}")
        return None
    extension = image_extension(image)
    losses.num_repacked += extension == "png" and found["format"] != "PNG"
    text = found["text"] or {}
    tags = tags_of(found, text)
    return {
        "id": found["id"],
        "image": {"bytes": image, "path": f"{found['id']}.{extension}"},
        "width": found["width"],
        "height": found["height"],
        "caption": found.get("caption") or text.get("caption"),
        "captions": captions_of(found, text),
        "tags": tags,
        "score": one_to_nine(rank),
        "score_raw": _finite(found.get(f"{score}.score_raw", rank)),
        "signature": found.get("signature"),
        "rating": _rating(tags, text),
        "source": source_name(found["sources"]),
        "license": text.get("license") or license,
        "group_id": found.get("group_id"),
        "boxes": [box for name in found if name.startswith("boxes_") for box in found[name] or []],
        "repeats": text.get("repeats") or 1,
        "stable_train": bool(found.get("stable_train")),
        "validation_prompt": None,
    }


def captions_of(found: Row, text: Row) -> list[Row]:
    """Composed captions, else the one that came with the image."""
    if found.get("captions") is not None:
        return found["captions"]
    caption = found.get("caption") or text.get("caption")
    return [{"text": caption, "source": "sidecar"}] if caption else []


def tags_of(found: Row, text: Row) -> list[Row]:
    """Composed tags, else those that came with the image."""
    if found.get("tags") is not None:
        return found["tags"]
    return [{**tag, "score": None, "source": "sidecar"} for tag in text.get("tags") or []]


def _rating(tags: list[Row], text: Row) -> str | None:
    rated = [tag["name"].removeprefix("rating:") for tag in tags if tag["category"] == "rating"]
    return text.get("rating") or (rated[0] if rated else None)


def source_name(sources: list[Row] | None) -> str | None:
    """Name of the first source; of a path only its last part, which tells no one's home."""
    name = sources[0]["source"] if sources else None
    if not name or not ("/" in name or "\\" in name):
        return name
    if PurePosixPath(name).is_absolute() or name.startswith(("~", "./", "../")):
        return PurePosixPath(name).name
    windows = PureWindowsPath(name)
    return windows.name if windows.drive or "\\" in name else name


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def one_to_nine(value: float | None) -> int | None:
    """A score as it is published: a whole number from 1 to 9; None where there is none."""
    number = _finite(value)
    return None if number is None else min(9, max(1, math.floor(number + 0.5)))
