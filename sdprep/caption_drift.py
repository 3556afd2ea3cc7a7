"""How the captions of one captioner sound as a set: openings, variety, drift from human text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from sdprep.caption_monitors import words_of
from sdprep.seeding import integer

OPENING_SHARE = 0.2  # of captions that begin with the same three words; spec/prep.md, section 5
NUM_RISERS = 50
SAMPLE = 10_000  # captions looked at; more change these numbers in the third digit at most
LEAST_CAPTIONS = 20  # shares of fewer say nothing


def keyed_sample(texts: Sequence[tuple[str, str]], count: int = SAMPLE) -> list[str]:
    """Texts of at most `count` (id, text) pairs, the same ones in any order of rows."""
    if len(texts) > count:
        texts = sorted(texts, key=lambda pair: (integer("caption_drift", pair[0]), pair))[:count]
    return [text for _, text in texts]


def describe_set(texts: Sequence[str], reference: Sequence[str] = ()) -> dict[str, Any]:
    """Numbers of a set of captions, JSON-able.

    Args:
        texts: the captions.
        reference: captions of people, or an earlier version; none: no drift is given.

    Returns:
        `captions`, `opening` (the most common first three words), `opening_share`, `distinct_2`
        (different word pairs ÷ all), `drift` (Jensen-Shannon divergence by n, in bits, 0 to 1),
        `risers` (phrases that became more frequent, with both shares) and `warnings`.
    """
    token_lists = [words_of(text) for text in texts]
    openings = Counter(" ".join(words[:3]) for words in token_lists if len(words) >= 3)
    pairs = _grams(token_lists, 2)
    found: dict[str, Any] = {"captions": len(texts), "opening": None, "opening_share": 0.0}
    if openings:
        opening, number = min(openings.items(), key=lambda entry: (-entry[1], entry[0]))
        found |= {"opening": opening, "opening_share": round(number / len(texts), 4)}
    total = sum(pairs.values())
    found["distinct_2"] = round(len(pairs) / total, 4) if total else None
    found["warnings"] = []
    if len(texts) >= LEAST_CAPTIONS and found["opening_share"] > OPENING_SHARE:
        share, opening = found["opening_share"], found["opening"]
        found["warnings"].append(f"{share:.0%} of the captions begin with {opening!r}")
    if reference and texts:
        found |= _drift(token_lists, [words_of(text) for text in reference])
    return found


def _grams(token_lists: Iterable[Sequence[str]], size: int) -> Counter[str]:
    return Counter(
        " ".join(words[at : at + size])
        for words in token_lists
        for at in range(len(words) - size + 1)
    )


def _drift(new: Sequence[Sequence[str]], old: Sequence[Sequence[str]]) -> dict[str, Any]:
    drift: dict[str, float] = {}
    risers: list[tuple[float, str, float, float]] = []
    for size in range(1, 6):
        counts, known = _grams(new, size), _grams(old, size)
        if not counts or not known:
            continue
        parts = _divergences(counts, known)
        drift[str(size)] = round(math.fsum(part for part, _, _ in parts.values()), 4)
        ups = ((part, gram, p, q) for gram, (part, p, q) in parts.items() if p > q)
        risers += sorted(ups, key=lambda up: (-up[0], up[1]))[:NUM_RISERS]
    risers.sort(key=lambda up: (-up[0], up[1]))
    rows = [
        {"phrase": gram, "share": round(p, 6), "reference_share": round(q, 6)}
        for _, gram, p, q in risers[:NUM_RISERS]
    ]
    return {"drift": drift, "risers": rows}


def _divergences(new: Counter[str], old: Counter[str]) -> dict[str, tuple[float, float, float]]:
    """Each phrase's part of the Jensen-Shannon divergence in bits, and its two shares.

    Source: Lin 1991, "Divergence measures based on the Shannon entropy".
    """
    total_new, total_old = sum(new.values()), sum(old.values())
    parts = {}
    for gram in sorted(new.keys() | old.keys()):
        p, q = new[gram] / total_new, old[gram] / total_old
        middle = (p + q) / 2
        part = sum(share * math.log2(share / middle) / 2 for share in (p, q) if share)
        parts[gram] = (part, p, q)
    return parts
