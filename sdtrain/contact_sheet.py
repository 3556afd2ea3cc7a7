"""Pictures side by side with legible labels, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from sdtrain.fonts import file_for

MOST_ROWS = 24
_SMALLEST_CELL_PX, _LARGEST_CELL_PX = 192, 384
_GAP_PX, _FONT_PX, _MOST_LABEL_LINES = 12, 16, 4
_LINE_PX = _FONT_PX + 8
_PAPER, _INK, _DIM, _BLANK = "#ffffff", "#1f2328", "#59636e", "#eceef0"

Cell = Path | Image.Image | None
Footer = tuple[str, Sequence[tuple[str, dict[int, str]]]]
"""A heading, and lines of a label with texts by column."""


def spread(moments: Sequence[int], most: int = MOST_ROWS) -> list[int]:
    """At most `most` of them, evenly spaced, the first and the last among them."""
    if len(moments) <= most:
        return list(moments)
    last = len(moments) - 1
    return [moments[round(k * last / (most - 1))] for k in range(most)]


def sheet(pictures: Sequence[Image.Image], labels: Sequence[str], title: str) -> Image.Image:
    """One picture of many, in rows of up to four, each with its label below."""
    columns = max(1, min(4, len(pictures)))
    cell = _cell_px(pictures)
    texts = [_wrapped(label, cell) for label in labels]
    pitch = cell + _label_px(texts) + _GAP_PX
    head = _FONT_PX + 2 * _GAP_PX
    size = columns * (cell + _GAP_PX) + _GAP_PX, head + -(-len(pictures) // columns) * pitch
    canvas = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((_GAP_PX, _GAP_PX), _cut(title, size[0] - 2 * _GAP_PX), _DIM, _font(title))
    for at, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        left = _GAP_PX + at % columns * (cell + _GAP_PX)
        top = head + at // columns * pitch
        _paste(canvas, picture, (left, top), cell)
        pen.multiline_text((left, top + cell + 4), text, _INK, _font(text), spacing=3)
    return canvas


def grid(
    rows: Sequence[tuple[str, Sequence[Cell]]],
    columns: Sequence[str],
    corner: str,
    footer: Footer | None = None,
) -> Image.Image:
    """A table of pictures.

    Args:
        rows: label, and a picture, its path or nothing for each column.
        columns: their labels.
        corner: what the row labels are.
        footer: numbers below the pictures.
    """
    cell = _cell_px([_opened(cells[0]) for _, cells in rows[-1:] if cells[0] is not None])
    texts = [_wrapped(label, cell) for label in columns]
    widest = max(_width(label) for label in [corner, *(label for label, _ in rows)])
    left_px, head = round(widest) + 2 * _GAP_PX, _label_px(texts) + _GAP_PX
    bottom = head + len(rows) * (cell + _GAP_PX)
    lines_px = (len(footer[1]) + 1) * _LINE_PX + _GAP_PX if footer else 0
    size = left_px + len(columns) * (cell + _GAP_PX), bottom + lines_px
    canvas = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((_GAP_PX, head - _GAP_PX), corner, _DIM, _font(), anchor="ls")
    for at, text in enumerate(texts):
        place = (left_px + at * (cell + _GAP_PX), head - _GAP_PX)
        pen.multiline_text(place, text, _INK, _font(text), anchor="ld", spacing=3)
    for row, (label, cells) in enumerate(rows):
        top = head + row * (cell + _GAP_PX)
        pen.text((left_px - _GAP_PX, top + cell / 2), label, _INK, _font(label), anchor="rm")
        for at, content in enumerate(cells):
            _paste(canvas, content, (left_px + at * (cell + _GAP_PX), top), cell)
    if footer:
        title, lines = footer
        pen.text((left_px, bottom), _cut(title, size[0] - left_px), _DIM, _font(title))
        for row, (label, numbers) in enumerate(lines, 1):
            top = bottom + row * _LINE_PX
            pen.text((left_px - _GAP_PX, top), label, _INK, _font(label), anchor="ra")
            for at, text in numbers.items():
                pen.text((left_px + at * (cell + _GAP_PX), top), text, _INK, _font())
    return canvas


def _paste(canvas: Image.Image, content: Cell, place: tuple[int, int], cell: int) -> None:
    if content is None:
        canvas.paste(_BLANK, (*place, place[0] + cell, place[1] + cell))
        return
    picture = _opened(content)
    scale = cell / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    # Tiny models draw tiny pictures: enlarge those without smearing their pixels.
    sampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    canvas.paste(picture.resize(size, sampling), place)


def _opened(content: Any) -> Image.Image:
    if isinstance(content, Image.Image):
        return content
    with Image.open(content) as picture:
        return picture.convert("RGB")


def _cell_px(pictures: Sequence[Image.Image]) -> int:
    side = max((max(picture.size) for picture in pictures), default=_SMALLEST_CELL_PX)
    return min(max(side, _SMALLEST_CELL_PX), _LARGEST_CELL_PX)


def _label_px(texts: Sequence[str]) -> int:
    lines = max((text.count("\n") + 1 for text in texts), default=1)
    return lines * (_FONT_PX + 5) + 6


def _wrapped(text: str, width_px: int) -> str:
    """Text in lines of at most `width_px`; a long one ends in an ellipsis.

    What follows a line break stays, so that a seed is seen below the longest prompt.
    """
    head, *tail = text.split("\n")
    font = _font(text)
    lines, most = _lines(head, width_px, font), max(1, _MOST_LABEL_LINES - len(tail))
    if len(lines) > most:
        lines = [*lines[: most - 1], _cut(f"{lines[most - 1]} …", width_px, font)]
    return "\n".join([*lines, *(_cut(line, width_px, font) for line in tail)])


def _lines(text: str, width_px: int, font: Any) -> list[str]:
    lines = [""]
    for word in text.split():
        for piece in _pieces(word, width_px, font):
            longer = f"{lines[-1]} {piece}".strip()
            if font.getlength(longer) <= width_px:
                lines[-1] = longer
            else:
                lines.append(piece)
    return [line for line in lines if line]


def _pieces(word: str, width_px: int, font: Any) -> list[str]:
    """A word, broken where it is wider than a line, as a Japanese sentence may be."""
    found = []
    while font.getlength(word) > width_px:
        count = 1
        while font.getlength(word[: count + 1]) <= width_px:
            count += 1
        found.append(word[:count])
        word = word[count:]
    return [*found, word] if word else found


def _cut(text: str, width_px: float, font: Any = None) -> str:
    font = font or _font(text)
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(f"{text}…") > width_px:
        text = text[:-1]
    return f"{text}…"


def _width(text: str) -> float:
    return float(_font(text).getlength(text))


def _font(text: str = "") -> Any:
    return _loaded(file_for(text))


@lru_cache
def _loaded(file: str) -> Any:
    return ImageFont.truetype(file, _FONT_PX)
