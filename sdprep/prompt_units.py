"""Pieces of a prompt: what stands between them, and what goes when there is no room."""

from __future__ import annotations

from typing import Literal, NamedTuple

from sdprep.clip_tokens import TOKENS_PER_CHUNK, count_tokens
from sdprep.prompt_draws import Draws
from sdprep.prompt_policy import PromptPolicy

_MAX_CACHED_UNITS = 500_000


class Unit(NamedTuple):
    """A piece of the text that stays whole: a tag, a score tag, a trigger, a caption or a word."""

    subject: str  # canonical name, for keys
    text: str
    kind: Literal["tag", "score", "trigger", "caption"]
    is_protected: bool = False


def gaps_of(blocks: list[list[Unit]], policy: PromptPolicy, draws: Draws) -> list[str]:
    """What stands before each unit of all blocks: one draw per unit, keyed by the unit."""
    subjects = [unit.subject for block in blocks for unit in block]
    how = policy.delimiter
    blanks = draws.uniforms("delimiter.blank", subjects)
    blank_p = how.blank_p
    gaps = [", " if u < blank_p else "," for u in blanks]
    if draws.uniform("delimiter") >= how.comma_p:
        commas = draws.uniforms("delimiter.comma", subjects)
        comma_p = how.mixed_comma_p
        gaps = [gap if u < comma_p else " " for gap, u in zip(gaps, commas, strict=True)]
    if len(blocks) == 2:
        gaps[len(blocks[0])] = policy.concat.sep
    if gaps:
        gaps[0] = ""
    return gaps


def fitted(units: list[Unit], gaps: list[str], max_chunks: int) -> tuple[list[Unit], str, int, int]:
    """Remove whole tags and words from the end until the text fits.

    Triggers, kept, priority and score tags go last of all: only if they alone are too long.

    Returns:
        the units left, their text, its tokens, and how many units were removed.
    """
    limit = TOKENS_PER_CHUNK * max_chunks
    text = _joined(units, gaps)
    tokens = _tokens(units, gaps, text)
    if tokens <= limit:
        return units, text, tokens, 0
    pairs = [piece for unit, gap in zip(units, gaps, strict=True) for piece in _words(unit, gap)]
    last_first = range(len(pairs) - 1, -1, -1)
    removal = [at for at in last_first if not pairs[at][0].is_protected]
    removal += [at for at in last_first if pairs[at][0].is_protected]

    def without(number: int) -> tuple[list[Unit], str, int]:
        gone = frozenset(removal[:number])
        left = [pair for at, pair in enumerate(pairs) if at not in gone]
        kept, before = [unit for unit, _ in left], [gap for _, gap in left]
        text = _joined(kept, before)
        return kept, text, _tokens(kept, before, text)

    low, high = 0, len(pairs)  # too many tokens after `low` removals, few enough after `high`
    while high - low > 1:
        middle = (low + high) // 2
        fits = without(middle)[2] <= limit
        low, high = (low, middle) if fits else (middle, high)
    return *without(high), high


def _words(unit: Unit, gap: str) -> list[tuple[Unit, str]]:
    """A caption word by word, each with its gap; anything else as it is."""
    if unit.kind != "caption":
        return [(unit, gap)]
    words = [unit._replace(text=word) for word in unit.text.split(" ")]
    return list(zip(words, [gap] + [" "] * (len(words) - 1), strict=True))


def _joined(units: list[Unit], gaps: list[str]) -> str:
    """The text; a comma is never doubled, whatever a piece ends with."""
    text = "".join([gap + unit[1] for unit, gap in zip(units, gaps, strict=True)])
    if units and gaps[0]:
        text = text[len(gaps[0]) :]
    if ",," in text or ", ," in text:
        text = ""
        for unit, gap in zip(units, gaps, strict=True):
            if gap.lstrip().startswith(",") and text.endswith(","):
                gap = gap.replace(",", "", 1) or " "
            text += (gap if text else "") + unit.text
    return text


def _tokens(units: list[Unit], gaps: list[str], text: str) -> int:
    """Tokens of the joined text, added up over its units where that is exact.

    CLIP's pre-tokeniser runs punctuation together, so a comma belongs to the unit before it; a unit
    that begins with a letter or digit begins a new piece.
    """
    if not units:
        return 0
    total = 0
    ends = [gap[:1] if gap[:1] == "," else "" for gap in gaps[1:]]
    ends.append("")
    for unit, end in zip(units, ends, strict=True):
        known = _UNIT_TOKENS[unit[1] + end]
        if known < 0:
            return count_tokens(text)
        total += known
    return total


class _UnitTokens(dict[str, int]):
    """Tokens by text of a unit; -1 where they cannot be added up, as in `:)` or long captions."""

    def __missing__(self, text: str) -> int:
        is_plain = text[:1].isascii() and text[:1].isalnum() and len(text) <= 100
        if not is_plain:
            return -1
        if len(self) >= _MAX_CACHED_UNITS:
            self.clear()
        self[text] = count = count_tokens(text)
        return count


_UNIT_TOKENS = _UnitTokens()
