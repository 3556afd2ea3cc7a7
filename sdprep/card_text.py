"""Markdown that says what it was given: text from data can neither format, link nor run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_ACTIVE = re.compile(r"[&<>|`*\[\]#~:@$\\]|(?<![^\W_])_|_(?![^\W_])")
"""Underscores within a word are left: they format nothing there."""
_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]+"
)


def plain(value: object, limit: int = 80) -> str:
    """Text for one line of Markdown: active characters become entities, long text is cut.

    Line breaks, control characters and marks that turn the writing direction become blanks.
    """
    text = _CONTROL.sub(" ", str(value)).strip()
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return _ACTIVE.sub(lambda found: f"&#{ord(found[0])};", text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a column is right-aligned if its heading ends in `:`.

    Args:
        header: headings.
        rows: cells that are Markdown already: escape what comes from data with `plain`.
    """
    rules = ["---:" if name.endswith(":") else "---" for name in header]
    names = [name.removesuffix(":") for name in header]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [names, rules, *rows])


def fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks within."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    clean = _CONTROL_IN_CODE.sub(" ", text).rstrip("\n")
    return f"{fence}{language}\n{clean}\n{fence}"


_CONTROL_IN_CODE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
