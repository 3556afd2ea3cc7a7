"""The captions of every image, whoever wrote them, and what else was seen in the picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sdprep.caption_claims import Seen, is_person_label, is_text_label
from sdprep.caption_similarity import cosines_of, similarity_columns
from sdprep.tag_composition import read_edits

if TYPE_CHECKING:
    from sdprep.table import PhotoTable

SIDECAR = "text"
_ROWS_AT_A_TIME = 10_000


@dataclass(frozen=True)
class Caption:
    """One caption of one image."""

    column: str  # `text` for the one that lay beside the image
    text: str
    prompt: str | None = None
    finish_reason: str | None = None
    cosines: Mapping[str, float] = field(default_factory=dict)  # with the picture, by scorer
    uncompared: tuple[str, ...] = ()  # scorers that saw another text, or none, in its place

    @property
    def source(self) -> str:
        """The name that captions have in a data set."""
        return "sidecar" if self.column == SIDECAR else self.column.removeprefix("caption_")


def caption_columns(table: PhotoTable) -> dict[str, list[str]]:
    """Columns of captioners, with the fields of theirs that are read."""
    found = {}
    for column in table.schema:
        if column.name.startswith("caption_") and pa.types.is_struct(column.type):
            names = [column.type.field(at).name for at in range(column.type.num_fields)]
            if "text" in names:
                known = ("text", "prompt", "finish_reason")
                found[column.name] = [name for name in known if name in names]
    return found


def caption_rows(
    table: PhotoTable, *, with_seen: bool
) -> Iterator[tuple[str, list[Caption], Seen]]:
    """Id, captions and what was seen of every image, in order of arrival.

    A caption that a person wrote stands in place of all others, and nobody doubts it.
    """
    edited = {id_ for id_, edit in read_edits(table.journal().fold()).items() if edit.has_caption}
    columns = caption_columns(table)
    paths = [f"{column}.{part}" for column, parts in columns.items() for part in parts]
    boxes = [
        column.name
        for column in table.schema
        if column.name.startswith("boxes_")
        and pa.types.is_struct(column.type)
        and column.type.get_field_index("boxes") >= 0
    ]
    more = ["tags"] if table.has("tags") else []
    more += [f"{column}.boxes" for column in boxes]
    more += ["tags_attributes.tags"] if table.has("tags_attributes") else []
    scorers = similarity_columns(table)
    paths += [f"{scorer}.captions" for scorer in scorers]
    wanted = ["id", "text.caption", *paths, *(more if with_seen else [])]
    rows = table.read(wanted, "reject_ingest IS NULL")
    finds = _found_kinds(rows, boxes) if with_seen else {}
    for batch in rows.to_batches(max_chunksize=_ROWS_AT_A_TIME):
        for row in batch.to_pylist():
            captions = [] if row["id"] in edited else captions_of(row, columns, scorers)
            yield row["id"], captions, _seen(row, boxes, finds) if with_seen else Seen()


def captions_of(
    row: Mapping[str, Any], columns: Mapping[str, Sequence[str]], scorers: Sequence[str] = ()
) -> list[Caption]:
    """The captions of one row of `text.caption` and the parts of `caption_columns`.

    Args:
        scorers: those of similarity, whose `<scorer>.captions` the row holds.
    """
    found = []
    if (row["text.caption"] or "").strip():
        found.append(Caption(SIDECAR, row["text.caption"].strip()))
    for column, parts in columns.items():
        values = {part: row[f"{column}.{part}"] for part in parts}
        if values["text"] is not None:
            values["text"] = values["text"].strip()
            found.append(Caption(column, **values))
    return [
        replace(caption, cosines=cosines, uncompared=uncompared)
        for caption in found
        for cosines, uncompared in [cosines_of(caption.column, caption.text, row, scorers)]
    ]


def _found_kinds(rows: pa.Table, columns: Sequence[str]) -> dict[str, tuple[bool, bool]]:
    """Whether each detector has ever found people, and text: only then no box means none."""
    found = {}
    for column in columns:
        labels: set[str] = set()
        for chunk in rows[f"{column}.boxes"].chunks:
            labels.update(filter(None, chunk.flatten().field("label").unique().to_pylist()))
        found[column] = (any(map(is_person_label, labels)), any(map(is_text_label, labels)))
    return found


def _seen(
    row: Mapping[str, Any], columns: Sequence[str], finds: Mapping[str, tuple[bool, bool]]
) -> Seen:
    ran = [column for column in columns if row[f"{column}.boxes"] is not None]
    boxes = [
        (box["label"] or "", box["score"] or 0.0)
        for column in ran
        for box in row[f"{column}.boxes"]
    ]
    return Seen(
        tags=frozenset(tag["name"] for tag in row.get("tags") or []),
        boxes=boxes,
        looked_for_people=any(finds[column][0] for column in ran),
        looked_for_text=any(finds[column][1] for column in ran),
        looked_for_colour=row.get("tags_attributes.tags") is not None,
    )
