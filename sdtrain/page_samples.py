"""The pictures of a run on its page: a row each time, a column each prompt and seed."""

from __future__ import annotations

from functools import lru_cache
from html import escape
from pathlib import Path

from PIL import Image

from sdtrain import contact_sheet
from sdtrain.grid_page import data_uri
from sdtrain.run_folder import RunFolder
from sdtrain.sample_files import Key, moments, shown

MOST_COLUMNS, MOST_PICTURES = 48, 144
"""What one page can hold; the folder has every picture in full."""
_THUMBNAIL_PX = 288


def section(folder: RunFolder, until: int) -> str:
    """A table of thumbnails with labels as text, so that any script and screen can read it.

    Args:
        folder: of the run.
        until: the clock; pictures of a course that was given up are left out.
    """
    found = moments(folder.samples, until)
    if not found:
        return ""
    keys = list(dict.fromkeys(key for each in found.values() for key in each))
    columns = keys[:MOST_COLUMNS]
    most = max(2, min(contact_sheet.MOST_ROWS, MOST_PICTURES // len(columns)))
    clocks = contact_sheet.spread(list(found), most)
    head = "".join(f'<th scope="col">{_label(key)}</th>' for key in columns)
    body = "".join(
        f'<tr><th scope="row">{clock:,}</th>'
        + "".join(_cell(found[clock].get(key), key, clock) for key in columns)
        + "</tr>"
        for clock in clocks
    )
    return (
        '<h2>Samples</h2><section class="card"><div class="scroll" tabindex="0" role="region" '
        f'aria-label="Samples over time"><table class="pictures" style="--n:{len(columns)}">'
        f'<thead><tr><th scope="col">samples seen</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{_note(len(clocks), len(found), columns, keys)}"
        "</section>"
    )


def _label(key: Key) -> str:
    prompt, seed = key
    small = "" if seed is None else f"<small>seed {seed}</small>"
    text = escape(shown(prompt), quote=True)
    return f'<span title="{text}">{text}</span>{small}'


def _cell(path: Path | None, key: Key, clock: int) -> str:
    if path is None or not path.is_file():
        return "<td></td>"
    uri, is_small = _thumbnail(path, path.stat().st_mtime_ns)
    kind = ' class="small"' if is_small else ""
    prompt, seed = key
    words = f"{shown(prompt)}, {clock:,} samples" + ("" if seed is None else f", seed {seed}")
    return f'<td><img{kind} src="{uri}" alt="{escape(words, quote=True)}"></td>'


@lru_cache(maxsize=512)
def _thumbnail(path: Path, mtime_ns: int) -> tuple[str, bool]:
    """A small copy for the page; made once, however often a run renews its page."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return data_uri(picture)


def _note(num_rows: int, num_moments: int, columns: list[Key], keys: list[Key]) -> str:
    left_out = []
    if num_rows < num_moments:
        left_out.append(f"{num_rows} of {num_moments} moments")
    if len(columns) < len(keys):
        left_out.append(f"{len(columns)} of {len(keys)} columns")
    which = f"Shown: {' and '.join(left_out)}. " if left_out else ""
    return f"<p><small>{which}All pictures in full lie in the run's folder samples.</small></p>"
