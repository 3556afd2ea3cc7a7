"""File names that every system takes, never two alike, whatever the images were called before."""

from __future__ import annotations

import re
import unicodedata
from itertools import chain, count

MAX_STEM_BYTES = 100
"""Room for extensions and suffixes within the 255 bytes that file systems allow."""

_DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])", re.IGNORECASE)  # Windows keeps these
_SETTINGS = ("multiply", "flip_p", "cond_dropout", "shuffle_tags", "batch_id", "local", "global")
"""EveryDream takes text files of these names for the settings of a folder."""


def safe_stem(text: str) -> str:
    """A name without extension that is valid everywhere; empty if nothing is left of the text.

    Letters, marks and digits of any script stay, so do spaces, `-`, `_`, `(` and `)`; all else,
    dots and separators among it, becomes `_`.
    """
    text = unicodedata.normalize("NFC", text)
    kept = "".join(char if _is_plain(char) else "_" for char in text)
    stem = _cut(kept.strip(" ").lstrip("-")).strip(" ")
    if _DEVICES.fullmatch(stem) or stem.lower() in _SETTINGS:
        stem += "_"
    return "" if set(stem) <= {"_"} else stem


def _is_plain(char: str) -> bool:
    return char in " -_()" or unicodedata.category(char)[0] in "LMN"


def _cut(text: str) -> str:
    return text.encode("utf-8")[:MAX_STEM_BYTES].decode("utf-8", "ignore")


class Stems:
    """Gives every image a name of its own, also where case and accents are not told apart.

    Args:
        by_key: name images after their source keys; else after their ids.
    """

    def __init__(self, *, by_key: bool) -> None:
        self._by_key = by_key
        self._taken: set[str] = set()

    def take(self, id_: str, key: str | None) -> str:
        """The name of one image; of two that would share one, the later gets part of its id."""
        if not self._by_key:
            return id_
        last = re.split(r"[/\\]", key or "")[-1]
        stem = safe_stem(last.rpartition(".")[0] or last)
        named = [stem, f"{stem}-{id_[:8]}"] if stem else []
        names = chain(named, [id_], (f"{id_}-{number}" for number in count(2)))
        name = next(name for name in names if _folded(name) not in self._taken)
        self._taken.add(_folded(name))
        return name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
