"""Boxes drawn on a picture: a colour for each label, with label and score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from sdprep.boxes import for_display
from sdprep.seeding import integer

_COLOURS = (
    *("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4"),
    *("#008080", "#f032e6", "#9a6324", "#808000", "#000075"),
)


def boxes_of(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Boxes of all detectors in a row of the table, each detector's without overlaps."""
    found: list[Mapping[str, Any]] = []
    for name, value in row.items():
        if name.startswith("boxes_") and value and value.get("boxes"):
            found += for_display(value["boxes"])
    return found


def colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each label: the same in every picture, unless two labels of one ask for it."""
    chosen: dict[str, str] = {}
    for label in sorted(dict.fromkeys(labels)):
        start = integer(0, "colour", label)
        ring = [_COLOURS[(start + step) % len(_COLOURS)] for step in range(len(_COLOURS))]
        free = [colour for colour in ring if colour not in chosen.values()]
        chosen[label] = (free or ring)[0]
    return chosen


def draw_boxes(image: Image.Image, boxes: Sequence[Mapping[str, Any]]) -> None:
    """Draw boxes onto a picture, the best last, so that it lies on top.

    Args:
        image: upright RGB; changed in place.
        boxes: as in `schema.BOX`, fractions of the picture.
    """
    draw = ImageDraw.Draw(image)
    line_px = max(2, max(image.size) // 300)
    font = ImageFont.load_default(max(12, max(image.size) // 45))
    by_label = colours([box["label"] for box in boxes])
    for box in sorted(boxes, key=lambda box: box["score"]):
        x0, x1 = (round(box[name] * (image.width - 1)) for name in ("x0", "x1"))
        y0, y1 = (round(box[name] * (image.height - 1)) for name in ("y0", "y1"))
        colour = by_label[box["label"]]
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=line_px)
        _draw_label(draw, f"{box['label']} {box['score']:.2f}", (x0, y0), colour, font, image.size)


def _draw_label(
    draw: ImageDraw.ImageDraw,
    text: str,
    corner: tuple[int, int],
    colour: str,
    font: Any,
    size: tuple[int, int],
) -> None:
    """White on a bar of the box's colour: above the box, or in it where there is no room."""
    left, top, right, bottom = font.getbbox(text)
    width, height = right - left + 4, bottom - top + 4
    x = max(0, min(corner[0], int(size[0] - width)))
    y = corner[1] - height if corner[1] >= height else corner[1]
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 2 - left, y + 2 - top), text, fill="white", font=font)
