"""Where a table stands: what is there, what is left, what was rejected and why."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

from sdprep.caption_check import caption_counts
from sdprep.errors import DataError
from sdprep.schema import REJECT_STAGES
from sdprep.table import FINGERPRINT, PhotoTable


def status(table: PhotoTable) -> dict[str, Any]:
    """Counts of everything, JSON-able."""
    return {
        "table": str(table.path),
        "version": table.version,
        "images": table.count(),
        "kept": table.count(table.kept_predicate()),
        "rejected": _rejected(table),
        "annotators": [_annotator(table, name) for name in annotator_columns(table)],
        "splits": _splits(table),
        "warnings": _warnings(table),
        "captions": caption_counts(table),
        "human_actions": len(table.journal().fold()),
    }


def annotator_columns(table: PhotoTable) -> list[str]:
    """Names of the struct columns that annotators fill."""
    return [
        field.name
        for field in table.schema
        if pa.types.is_struct(field.type) and FINGERPRINT in table.notes(field.name)
    ]


def _annotator(table: PhotoTable, column: str) -> dict[str, Any]:
    open_rows = table.count(f"reject_ingest IS NULL AND {column} IS NULL")
    failed = table.count(f"{column}.error IS NOT NULL")
    all_rows = table.count("reject_ingest IS NULL")
    return {
        "column": column,
        "done": all_rows - open_rows - failed,
        "open": open_rows,
        "failed": failed,
        "fingerprint": table.notes(column)[FINGERPRINT],
    }


def _rejected(table: PhotoTable) -> dict[str, dict[str, int]]:
    """Stage → reason → images; `duplicate_of:<id>` counts as one reason."""
    found = {}
    for stage in REJECT_STAGES:
        column = f"reject_{stage}"
        if table.has(column):
            reasons = table.read([column], f"{column} IS NOT NULL")[column].to_pylist()
            counts = Counter(reason.split(":")[0] for reason in reasons)
            if counts:
                found[stage] = dict(sorted(counts.items()))
    return found


def _splits(table: PhotoTable) -> dict[str, int]:
    if not table.has("split"):
        return {}
    names = table.kept(["split"])["split"].to_pylist()
    return dict(sorted(Counter(name or "unassigned" for name in names).items()))


def _warnings(table: PhotoTable) -> dict[str, int]:
    lists = table.read(["warnings"], "warnings IS NOT NULL")["warnings"].to_pylist()
    return dict(sorted(Counter(name for names in lists for name in names).items()))


def tag_counts(table: PhotoTable, count: int) -> dict[str, Any]:
    """The most frequent composed tags of the images that are kept."""
    if not table.has("tags"):
        return {"tags": []}
    lists = table.kept(["tags"])["tags"].to_pylist()
    counts = Counter(tag["name"] for tags in lists for tag in tags or [])
    ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return {"tags": [{"name": name, "count": number} for name, number in ranked[:count]]}


def find_row(table: PhotoTable, name: str) -> dict[str, Any]:
    """One image by its id, the start of its id, or the key of its file in a source.

    Raises:
        DataError: there is none, or several.
    """
    safe = name.replace("'", "''")
    rows = table.read(["id", "sources"], f"starts_with(id, '{safe}')").to_pylist()
    if not rows:
        everything = table.read(["id", "sources"]).to_pylist()
        rows = [
            row
            for row in everything
            if any(source["key"].endswith(name) for source in row["sources"] or [])
        ]
    if not rows:
        raise DataError(f"{table.path} has no image {name!r}", "Give an id or a file name.")
    if len(rows) > 1:
        some = ", ".join(row["id"] for row in rows[:5])
        raise DataError(f"{name!r} fits {len(rows)} images: {some}", "Give more of the id.")
    columns = [column for column in table.columns() if column != "image"]
    return table.read(columns, f"id = '{rows[0]['id']}'").to_pylist()[0]


def save_picture(table: PhotoTable, row: dict[str, Any], path: Path) -> None:
    """Write one image as every stage sees it: upright, sRGB, on white; with its boxes drawn."""
    from sdprep.box_drawing import boxes_of, draw_boxes
    from sdprep.images import open_image

    data = table.image_bytes([row["id"]])[row["id"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    image = open_image(data, first_frame=True).image
    draw_boxes(image, boxes_of(row))
    image.save(path)
