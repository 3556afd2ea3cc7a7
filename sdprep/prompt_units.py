"""Pieces of a prompt: what stands between them, and what goes when there is no room."""

from __future__ import annotations

from typing import Literal, NamedTuple

from sdprep.clip_tokens import TOKENS_PER_CHUNK, count_tokens
from sdprep.prompt_draws import Draws
from sdprep.prompt_policy import PromptPolicy


class Unit(NamedTuple):
    """A piece of the text that stays whole: a tag, a score tag, a trigger, a caption or a word."""

    subject: str  # canonical name, for keys
    text: str
    kind: Literal["tag", "score", "trigger", "caption"]
    is_protected: bool
    gap: str = ""  # what stands before it


def with_gaps(blocks: list[list[Unit]], policy: PromptPolicy, draws: Draws) -> list[Unit]:
    """All units in order, each with what stands before it: one draw per unit, keyed by the unit."""
    units = [unit for block in blocks for unit in block]
    subjects = [unit.subject for unit in units]
    how = policy.delimiter
    has_comma = [True] * len(units)
    if draws.uniform("delimiter") >= how.comma_p:
        has_comma = [u < how.mixed_comma_p for u in draws.uniforms("delimiter.comma", subjects)]
    blanks = draws.uniforms("delimiter.blank", subjects)
    gaps = [
        " " if not comma else ", " if u < how.blank_p else ","
        for comma, u in zip(has_comma, blanks, strict=True)
    ]
    if len(blocks) == 2:
        gaps[len(blocks[0])] = policy.concat.sep
    if gaps:
        gaps[0] = ""
    return [
        Unit(subject, text, kind, is_protected, gap)
        for (subject, text, kind, is_protected, _), gap in zip(units, gaps, strict=True)
    ]


def fitted(units: list[Unit], max_chunks: int) -> tuple[list[Unit], str, int, int]:
    """Remove whole tags and words from the end until the text fits.

    Triggers, kept, priority and score tags go last of all: only if they alone are too long.

    Returns:
        the units left, their text, its tokens, and how many units were removed.
    """
    limit = TOKENS_PER_CHUNK * max_chunks
    text = _joined(units)
    tokens = count_tokens(text)
    if tokens <= limit:
        return units, text, tokens, 0
    units = [piece for unit in units for piece in _words(unit)]
    last_first = range(len(units) - 1, -1, -1)
    removal = [at for at in last_first if not units[at].is_protected]
    removal += [at for at in last_first if units[at].is_protected]

    def without(number: int) -> list[Unit]:
        gone = frozenset(removal[:number])
        return [unit for at, unit in enumerate(units) if at not in gone]

    low, high = 0, len(units)  # too many tokens after `low` removals, few enough after `high`
    while high - low > 1:
        middle = (low + high) // 2
        fits = count_tokens(_joined(without(middle))) <= limit
        low, high = (low, middle) if fits else (middle, high)
    kept = without(high)
    text = _joined(kept)
    return kept, text, count_tokens(text), high


def _words(unit: Unit) -> list[Unit]:
    """A caption word by word; anything else as it is."""
    if unit.kind != "caption":
        return [unit]
    first, *others = unit.text.split(" ")
    return [_reworded(unit, first, unit.gap), *(_reworded(unit, w, " ") for w in others)]


def _reworded(unit: Unit, text: str, gap: str) -> Unit:
    """The same kind of unit with another text."""
    return Unit(unit.subject, text, unit.kind, unit.is_protected, gap)


def _joined(units: list[Unit]) -> str:
    """The text; a comma is never doubled, whatever a piece ends with."""
    text = "".join([unit.gap + unit.text for unit in units])
    if units and units[0].gap:
        text = text[len(units[0].gap) :]
    if ",," in text or ", ," in text:
        text = _rejoined(units)
    return text


def _rejoined(units: list[Unit]) -> str:
    text = ""
    for unit in units:
        gap = unit.gap if text else ""
        if gap.lstrip().startswith(",") and text.endswith(","):
            gap = gap.replace(",", "", 1) or " "
        text += gap + unit.text
    return text
