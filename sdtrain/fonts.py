"""Fonts for labels: DejaVu Sans, and beside it whatever this machine has for other scripts.

DejaVu comes with matplotlib and knows Latin, Greek, Cyrillic and much more, but no Chinese,
Japanese or Korean. What no font here has is drawn as boxes, and said.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdprep.console import warn

USUAL = "DejaVu Sans"
_NO_TEXT_FONTS = ("emoji", "lastresort", "last resort", "unifont")


def usual_file() -> str:
    """DejaVu Sans, which comes with matplotlib."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@lru_cache(maxsize=4096)
def file_for(text: str) -> str:
    """File of the one font that shows the most letters of a text; DejaVu Sans where that will do.

    Args:
        text: a label.
    """
    return _best(_lacked(text, usual_file()), text)[0]


def families_for(texts: Sequence[str]) -> list[str]:
    """Names for matplotlib, which takes each letter from the first font that has it."""
    lacked = {letter for text in texts for letter in _lacked(text, usual_file())}
    if not lacked:
        return [USUAL]
    name = _best(frozenset(lacked), "".join(sorted(lacked)))[1]
    return list(dict.fromkeys([USUAL, name]))


def _best(lacked: frozenset[str], text: str) -> tuple[str, str]:
    """File and name of the font in which the fewest letters of a text are missing."""
    found, name, left = usual_file(), USUAL, len(lacked)
    if lacked:
        for entry in _others():
            missing = len(_lacked(text, entry.fname))
            if missing < left:
                found, name, left = entry.fname, entry.name, missing
            if not left:
                return found, name
        _say_once("".join(sorted(_lacked(text, found))))
    return found, name


@lru_cache
def _others() -> Sequence[Any]:
    """Upright text fonts of this machine, plain weights and wide coverage by name first."""
    from matplotlib.font_manager import fontManager

    def order(entry: Any) -> tuple[bool, bool, str]:
        return "Sans" not in entry.name, str(entry.weight) not in ("400", "normal"), entry.fname

    usable = [
        entry
        for entry in fontManager.ttflist
        if entry.style == "normal" and not any(x in entry.name.lower() for x in _NO_TEXT_FONTS)
    ]
    return sorted(usable, key=order)


@lru_cache(maxsize=512)
def _letters(file: str) -> frozenset[int]:
    """Code points that a font has; none where it cannot be read or scaled."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(file)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError):
        return frozenset()


def _lacked(text: str, file: str) -> frozenset[str]:
    known = _letters(file)
    return frozenset(x for x in text if ord(x) not in known and x.isprintable() and x != " ")


@lru_cache(maxsize=64)
def _say_once(letters: str) -> None:
    shown = letters if len(letters) <= 12 else f"{letters[:12]}…"
    warn(
        f"no font on this machine has {shown}: labels in pictures show boxes there; pages show "
        "them where the reader has a font (such as Noto Sans CJK)"
    )
