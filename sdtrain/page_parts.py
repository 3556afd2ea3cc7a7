"""Pieces of HTML that a page is made of; every text is escaped here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def typeset(text: str) -> str:
    """Escaped text whose negative numbers carry a real minus."""
    return escape(re.sub(r"(?<![\w-])-(?=\d)", "\N{MINUS SIGN}", text))


def figure(title: str, uri: str, caption: str) -> str:
    """A picture with a heading above and an explanation below."""
    return (
        f"<figure><h3>{escape(title)}</h3>"
        f'<img src="{uri}" alt="{escape(title, quote=True)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], num_words: int) -> str:
    """A table whose first columns are words and the others numbers."""
    kinds = ["" if at < num_words else ' class="n"' for at in range(len(head))]

    def line(tag: str, cells: Sequence[str]) -> str:
        pairs = zip(kinds, cells, strict=True)
        return "".join(f"<{tag}{kind}>{typeset(cell)}</{tag}>" for kind, cell in pairs)

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    top = f"<thead><tr>{line('th', head)}</tr></thead>"
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def pairs(entries: Mapping[str, Any]) -> str:
    """Names and values; what is not known is left out."""
    known = {key: value for key, value in entries.items() if value not in (None, "")}
    rows = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in known.items()
    )
    return f"<dl>{rows}</dl>"
