"""The page of an XY grid: zoom with the wheel, drag, flick between models, all in one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from sdtrain import variety
from sdtrain.contact_sheet import Cell
from sdtrain.grid_page_style import SCRIPT, STYLE
from sdtrain.outputs import write_text_whole
from sdtrain.page_parts import table

if TYPE_CHECKING:
    from sdtrain.grid import Axes, Row

_SMALL_PX = 256  # below it pixels are drawn as they are, and files are no smaller than PNG
MOST_CHARACTERS = 120
"""Of a column's head; the whole of it is a click away."""
HELP = (
    "Wheel, or + and −: zoom. Drag, or arrow keys: move. Click, or Enter: look closely; there the "
    "arrow keys flick to the neighbours, up and down between models, and P keeps a picture beside "
    "the next ones."
)


def write_grid_page(
    path: Path,
    rows: Sequence[Row],
    axes: Axes,
    relative: Sequence[Sequence[float | None]],
    space: str,
    refresh_seconds: int | None = None,
) -> None:
    """Write the page in one go.

    Args:
        path: of the page.
        rows: with their pictures.
        axes: what the columns are.
        relative: spreads of each row in units of the first row's; used with several seeds.
        space: what variety was measured in.
        refresh_seconds: how often the page loads itself anew; None: it is final.
    """
    title = escape(path.stem)
    refresh = f' data-refresh="{refresh_seconds}"' if refresh_seconds else ""
    html = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title} – sdtrain grid</title><style>{STYLE}</style></head><body{refresh}>"
        f"<header><h1>{title}</h1><p>{escape(axes.fixed)}</p><p>{HELP}</p></header>"
        f"{_board(rows, axes)}{_variety(rows, axes, relative, space)}{_DIALOG}"
        f"<script>{SCRIPT}</script></body></html>\n"
    )
    write_text_whole(path, html)


_DIALOG = (
    '<dialog aria-label="One picture"><div class="panes">'
    '<figure class="kept" hidden><img alt=""><figcaption></figcaption></figure>'
    '<figure class="shown"><img alt=""><figcaption aria-live="polite"></figcaption></figure></div>'
    '<form method="dialog" class="keys"><button type="button" data-do="left">←</button>'
    '<button type="button" data-do="up">↑</button><button type="button" data-do="down">↓</button>'
    '<button type="button" data-do="right">→</button>'
    '<button type="button" data-do="keep">Keep beside (P)</button>'
    "<button>Close (Esc)</button></form></dialog>"
)


def shortened(label: str) -> str:
    """A label that leaves room for pictures: of a long one both ends, where the axes stand."""
    if len(label) <= MOST_CHARACTERS:
        return label
    return f"{label[: MOST_CHARACTERS // 2].rstrip()} … {label[-MOST_CHARACTERS // 2 :].lstrip()}"


def _board(rows: Sequence[Row], axes: Axes) -> str:
    head = "".join(
        f'<th scope="col" title="{escape(label, quote=True)}">{escape(shortened(label))}</th>'
        for label in axes.columns
    )
    body = "".join(
        f'<tr><th scope="row">{escape(row.label)}</th>'
        + "".join(
            _cell(content, f"{row.label}: {label}", at_row, at_column)
            for at_column, (label, content) in enumerate(zip(axes.columns, row.cells, strict=True))
        )
        + "</tr>"
        for at_row, row in enumerate(rows)
    )
    return (
        '<div class="board" tabindex="0" role="region" aria-label="Grid of pictures">'
        f'<table><thead><tr><th scope="col">model</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(content: Cell, label: str, row: int, column: int) -> str:
    if content is None:
        return "<td></td>"
    uri, is_small = data_uri(content)
    kind = ' class="small"' if is_small else ""
    return (
        f'<td><button type="button" data-row="{row}" data-column="{column}" '
        f'aria-label="{escape(label, quote=True)}"><img{kind} src="{uri}" alt="" '
        'draggable="false"></button></td>'
    )


def data_uri(content: Path | Image.Image) -> tuple[str, bool]:
    """A picture for a page, and whether it is so small that its pixels should be seen."""
    if isinstance(content, Path):
        with Image.open(content) as opened:
            picture = opened.convert("RGB")
    else:
        picture = content.convert("RGB")
    is_small = max(picture.size) < _SMALL_PX
    file = io.BytesIO()
    if is_small:
        picture.save(file, "PNG")
    else:
        picture.save(file, "JPEG", quality=92)
    kind = "png" if is_small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", is_small


def _variety(
    rows: Sequence[Row], axes: Axes, relative: Sequence[Sequence[float | None]], space: str
) -> str:
    if len(axes.seeds) < 2:
        return ""
    head = ("Model", "All", *(shortened(axes.group_label(group)) for group in axes.groups))
    lines = [
        (row.label, *(_number(share) for share in (variety.mean(shares), *shares)))
        for row, shares in zip(rows, relative, strict=True)
    ]
    return (
        f'<section class="variety"><h2>Variety</h2><p>{escape(explained(space))} 1 is '
        f"{escape(rows[0].label)}; less means that its pictures look more alike.</p>"
        f"{table(head, lines, 1)}</section>"
    )


def explained(space: str) -> str:
    """What the numbers are, in a sentence."""
    if space == variety.LATENTS:
        return (
            "Mean distance between the pictures of one prompt's seeds, two by two: the root mean "
            "squared difference of their VAE latents."
        )
    return (
        "Mean distance between the pictures of one prompt's seeds, two by two: one minus the "
        f"cosine of their embeddings by {space}."
    )


def _number(share: float | None) -> str:
    return "–" if share is None else f"{share:.3f}"
