"""What a prompt policy does to a data set: previews, histograms, and two policies side by side."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sdprep.clip_tokens import TOKENS_PER_CHUNK
from sdprep.prompts import PromptPolicy, PromptRecord, RenderedPrompt, render_prompt

REFERENCE: dict[str, dict[str, float]] = {
    "tokens_by_tags": {"8": 21, "16": 40, "32": 62, "64": 84},
    "v1_chunk_shares": {"1": 0.09, "2": 0.66, "3": 0.25},
}
"""What bigASP reports: median tokens by number of tags, and chunks of its v1 batches."""

_EXPOSED = 100  # most and least exposed tags that are listed
_TOKEN_BIN = 15  # five bins a chunk

Rows = Iterable[PromptRecord | Mapping[str, Any]]


def to_json(record_id: str, visit: int, prompt: RenderedPrompt) -> dict[str, Any]:
    """One rendered prompt: `id, text, tags, tokens, chunks` and how it came about."""
    return {
        "id": record_id,
        "visit": visit,
        "text": prompt.text,
        "tags": len(prompt.tags),
        "tokens": prompt.tokens,
        "chunks": prompt.chunks,
        "dropped": prompt.dropped,
        "mode": prompt.mode,
        "missing": prompt.missing,
        "score_tags": list(prompt.score_tags),
        "truncated": prompt.truncated,
        "removed": prompt.num_removed,
    }


def previews(
    rows: Rows, policy: PromptPolicy, seed: int, *, visit: int = 0, visits: int = 1
) -> Iterator[dict[str, Any]]:
    """The training texts of some images for `visits` visits, the first of them `visit`."""
    for record in map(_record, rows):
        for at in range(visit, visit + visits):
            yield to_json(record.id, at, render_prompt(record, policy, seed, at))


def compare(
    rows: Rows, first: PromptPolicy, second: PromptPolicy, seed: int, *, visit: int = 0
) -> Iterator[dict[str, Any]]:
    """The text of each image under two policies; draws that both make are the same."""
    for record in map(_record, rows):
        texts = [render_prompt(record, policy, seed, visit) for policy in (first, second)]
        yield {
            "id": record.id,
            "visit": visit,
            "same": texts[0].text == texts[1].text,
            "first": to_json(record.id, visit, texts[0]),
            "second": to_json(record.id, visit, texts[1]),
        }


def changed_knobs(first: PromptPolicy, second: PromptPolicy) -> dict[str, list[Any]]:
    """Knobs that differ, by dotted path, each with both values."""
    one, two = (_flat(policy.model_dump(mode="json")) for policy in (first, second))
    paths = sorted(set(one) | set(two))
    return {
        path: [one.get(path), two.get(path)] for path in paths if one.get(path) != two.get(path)
    }


def statistics(rows: Rows, policy: PromptPolicy, seed: int, *, visits: int = 4) -> dict[str, Any]:
    """Render every image `visits` times and count.

    Returns:
        `images, prompts`; `tags, tokens, chunks` ({value: prompts}, tokens in bins of 15 named by
        their lower edge); `means`; `shares` of prompts (`chunks_1` up to 75 tokens, `chunks_2` up
        to 150, and so on; `dropped`, `truncated`, `empty`, `with_score_tags`); `modes`, `missing`;
        `score_tags` (share of the prompts not dropped that show it); `exposure` of tags (prompts
        that show it ÷ prompts of images that have it); `reference`; `target`, what the laws of the
        policy say of `tags` (None without a closed form), `dropped` and `with_score_tags`.
    """
    tally = _Tally()
    num_tags = []
    for record in map(_record, rows):
        tally.images += 1
        num_tags.append(len(record.tags))
        for visit in range(visits):
            tally.add(record, render_prompt(record, policy, seed, visit))
    target = target_tags(policy, num_tags)
    targets = {
        "tags": None if target is None else {str(n): share for n, share in target.items()},
        "dropped": policy.dropout_p,
        "with_score_tags": 1 - policy.score.drop_p,
    }
    return {**tally.to_json(policy.max_chunks), "target": targets}


def target_tags(policy: PromptPolicy, num_tags: Iterable[int]) -> dict[int, float] | None:
    """What the length law says of the number of tags, for images that have so many tags.

    Args:
        policy: its law must be a normal one or `all`; priority tags are left out of account.
        num_tags: tags of each image.

    Returns:
        number of tags -> share of the prompts made of tags; None for laws without a closed form.
    """
    law = policy.length
    if law.law not in ("truncated_normal", "clamped_normal", "all"):
        return None
    shares: dict[int, float] = {}
    totals = Counter(number for number in num_tags if number)
    for total, images in totals.items():
        for number, share in _law(policy, total).items():
            shares[number] = shares.get(number, 0.0) + share * images
    whole = sum(totals.values())
    return {number: share / whole for number, share in sorted(shares.items())} if whole else {}


def _law(policy: PromptPolicy, total: int) -> dict[int, float]:
    """Share of each number of tags for one image that has `total`."""
    law = policy.length
    if law.law == "all" or total <= law.min:
        return {total: 1.0}

    def below(number: float) -> float:
        return 0.5 * math.erfc((law.mean - number) / law.sd / math.sqrt(2))

    is_cut = law.law == "truncated_normal"
    floor, scale = (below(law.min), 1 - below(law.min)) if is_cut else (0.0, 1.0)
    upto = [max(0.0, (below(number + 1) - floor) / scale) for number in range(law.min, total)]
    shares = [high - low for low, high in zip([0.0, *upto], upto, strict=False)]
    return dict(enumerate([*shares, 1 - upto[-1]], law.min))


class _Tally:
    """Running counts."""

    def __init__(self) -> None:
        self.images = 0
        self.prompts = 0
        self.by: dict[str, Counter[Any]] = {
            name: Counter() for name in ("tags", "tokens", "chunks", "modes", "missing", "scores")
        }
        self.flags: Counter[str] = Counter()
        self.shown: Counter[str] = Counter()
        self.offered: Counter[str] = Counter()
        self.sums: Counter[str] = Counter()

    def add(self, record: PromptRecord, prompt: RenderedPrompt) -> None:
        self.prompts += 1
        self.flags["dropped"] += prompt.dropped
        self.flags["truncated"] += prompt.truncated
        self.flags["empty"] += not prompt.text
        if prompt.dropped:
            return
        self.flags["with_score_tags"] += bool(prompt.score_tags)
        self.by["tags"][len(prompt.tags)] += 1
        self.by["tokens"][prompt.tokens // _TOKEN_BIN * _TOKEN_BIN] += 1
        self.by["chunks"][prompt.chunks] += 1
        self.by["modes"][prompt.mode or "nothing"] += 1
        self.by["scores"].update(prompt.score_tags)
        if prompt.missing:
            self.by["missing"][prompt.missing] += 1
        self.sums.update(tags=len(prompt.tags), tokens=prompt.tokens, removed=prompt.num_removed)
        self.offered.update(tag.name for tag in record.tags)
        self.shown.update(prompt.tags)

    def to_json(self, max_chunks: int) -> dict[str, Any]:
        rendered = self.prompts - self.flags["dropped"]
        shares = {name: _share(self.flags[name], self.prompts) for name in _FLAGS}
        shares["with_score_tags"] = _share(self.flags["with_score_tags"], rendered)
        for chunks in range(1, max_chunks + 1):
            shares[f"chunks_{chunks}"] = _share(self.by["chunks"][chunks], rendered)
        return {
            "images": self.images,
            "prompts": self.prompts,
            "tokens_per_chunk": TOKENS_PER_CHUNK,
            "means": {name: _share(self.sums[name], rendered) for name in ("tags", "tokens")},
            "units_removed": self.sums["removed"],
            "shares": shares,
            **{name: _histogram(self.by[name]) for name in ("tags", "tokens", "chunks")},
            **{name: dict(sorted(self.by[name].items())) for name in ("modes", "missing")},
            "score_tags": {
                name: _share(count, rendered) for name, count in sorted(self.by["scores"].items())
            },
            "exposure": self._exposure(),
            "reference": REFERENCE,
        }

    def _exposure(self) -> dict[str, Any]:
        """How much of the time each tag is seen: the most frequent and the least exposed ones."""
        found: list[dict[str, Any]] = [
            {
                "name": name,
                "prompts": self.shown[name],
                "offered": offered,
                "share": _share(self.shown[name], offered),
            }
            for name, offered in self.offered.items()
        ]
        frequent = sorted(found, key=lambda tag: (-tag["prompts"], tag["name"]))
        starved = sorted(found, key=lambda tag: (tag["share"], -tag["offered"], tag["name"]))
        return {
            "distinct_tags": len(found),
            "never_shown": sum(tag["prompts"] == 0 for tag in found),
            "most_frequent": frequent[:_EXPOSED],
            "least_exposed": starved[:_EXPOSED],
        }


_FLAGS = ("dropped", "truncated", "empty")


def _record(row: PromptRecord | Mapping[str, Any]) -> PromptRecord:
    return row if isinstance(row, PromptRecord) else PromptRecord.from_row(row)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _histogram(counts: Counter[int]) -> dict[str, int]:
    return {str(value): counts[value] for value in sorted(counts)}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, below in value.items():
        if isinstance(below, Mapping) and key != "aliases":
            found |= _flat(below, f"{prefix}{key}.")
        else:
            found[prefix + key] = below
    return found
