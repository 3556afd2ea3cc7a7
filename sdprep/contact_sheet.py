"""A picture of what was decided: thumbnails with their split, score and reason of rejection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from sdprep.images import open_image
from sdprep.schema import REJECT_STAGES
from sdprep.table import PhotoTable

_SIDE, _GAP, _TEXT, _FRAME = 180, 14, 40, 4
_COLOURS = {"train": "#3b6ea8", "validation": "#e08a3c", "rejected": "#c0392b", "kept": "#7f8c8d"}
_INK, _PAPER, _PALE = "#222222", "#ffffff", "#eeeeee"


def draw_sheet(table: PhotoTable, to: Path, count: int = 40) -> dict[str, Any]:
    """Draw the rejected images, each beside the one it duplicates, then some that are kept.

    Returns:
        path, number of images drawn, and how many there are.
    """
    rows = _decided(table)
    shown = _in_order(rows, count)
    _draw(table, to, shown)
    return {"path": str(to), "shown": len(shown), "images": len(rows)}


def draw_pictures(table: PhotoTable, to: Path, lines: Mapping[str, Sequence[str]]) -> None:
    """Draw some images in the order given: id → two lines of text below it."""
    rows = [
        {"id": id_, "state": "kept", "reject_ingest": None, "lines": text}
        for id_, text in lines.items()
    ]
    _draw(table, to, rows)


def _draw(table: PhotoTable, to: Path, shown: Sequence[dict[str, Any]]) -> None:
    columns = min(8, max(1, len(shown)))
    height = -(-len(shown) // columns)
    cell_w, cell_h = _SIDE + _GAP, _SIDE + _TEXT + _GAP
    size = (columns * cell_w + _GAP, max(1, height) * cell_h + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    data = table.image_bytes([row["id"] for row in shown if row["reject_ingest"] is None])
    for place, row in enumerate(shown):
        left = _GAP + place % columns * cell_w
        top = _GAP + place // columns * cell_h
        frame = (left - _FRAME, top - _FRAME, left + _SIDE + _FRAME, top + _SIDE + _FRAME)
        draw.rectangle(frame, fill=_COLOURS[row["state"]])
        picture = _thumbnail(data.get(row["id"]))
        sheet.paste(picture, (left, top))
        for line, text in enumerate(row["lines"]):
            position = (left, top + _SIDE + _FRAME + 3 + 16 * line)
            draw.text(position, _fitting(text, font), fill=_INK, font=font)
    to.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(to)


def _decided(table: PhotoTable) -> list[dict[str, Any]]:
    """Every image with what happened to it, in order of arrival."""
    rejects = [f"reject_{stage}" for stage in REJECT_STAGES if table.has(f"reject_{stage}")]
    names = ["id", "sources", *rejects]
    names += [name for name in ("split", "group_id") if table.has(name)]
    scored = table.has("score_technical")
    rows = table.read(names + (["score_technical.score"] if scored else [])).to_pylist()
    for row in rows:
        reason = next((row[name] for name in rejects if row[name]), None)
        row["duplicate_of"] = None
        if reason and reason.startswith("duplicate_of:"):
            row["duplicate_of"], reason = reason.partition(":")[2], "duplicate of the one before"
        row["state"] = "rejected" if reason else row.get("split") or "kept"
        key = row["sources"][0]["key"] if row["sources"] else row["id"]
        score = row.get("score_technical.score")
        facts = reason or row["state"] + (f", score {score:.1f}" if score is not None else "")
        row["lines"] = [key, facts]
    return rows


def _in_order(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Rejected ones first, a duplicate right behind the image that stands for it."""
    by_id = {row["id"]: row for row in rows}
    order: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["duplicate_of"]:
            order[row["duplicate_of"]] = by_id[row["duplicate_of"]]
            order[row["id"]] = row
    states = ("rejected", "validation", "train", "kept")
    for state in states:
        order |= {
            row["id"]: row for row in rows if row["state"] == state and row["id"] not in order
        }
    return list(order.values())[:count]


def _thumbnail(data: bytes | None) -> Image.Image:
    """The middle of a picture, square; a crossed box where there are no pixels."""
    square = Image.new("RGB", (_SIDE, _SIDE), _PALE)
    if data is None:
        draw = ImageDraw.Draw(square)
        draw.line((0, 0, _SIDE, _SIDE), fill=_COLOURS["kept"])
        draw.line((0, _SIDE, _SIDE, 0), fill=_COLOURS["kept"])
        return square
    image = open_image(data, first_frame=True).image
    image.thumbnail((_SIDE, _SIDE))
    square.paste(image, ((_SIDE - image.width) // 2, (_SIDE - image.height) // 2))
    return square


def _fitting(text: str, font: Any) -> str:
    """The end of a text that is too wide, which tells more than its start."""
    if font.getlength(text) <= _SIDE:
        return text
    while text and font.getlength(f"…{text}") > _SIDE:
        text = text[1:]
    return f"…{text}"
