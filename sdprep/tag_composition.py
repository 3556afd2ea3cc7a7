"""The final tags of one image: rules, sources and human edits, with no table in sight."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sdprep.errors import DataError
from sdprep.tag_rules import TagRules, normalise_tag

_SOURCE_RANK = {"human": 0, "sidecar": 1, "alias": 3, "implication": 4}  # all others: 2


class RawTag(NamedTuple):
    """A tag as its source gave it, or as it ends up."""

    name: str
    category: str | None
    score: float | None  # probability; None where the source is certain
    source: str


@dataclass
class TagEdits:
    """What people said about one image; of edits to the same tag the last one counts."""

    tags: list[tuple[str, bool, str | None]] = field(default_factory=list)
    """(name as written, whether it was added or taken away, category), in the order of time."""
    caption: str | None = None
    has_caption: bool = False

    def last_words(self, rules: TagRules) -> dict[str, tuple[bool, str | None]]:
        """The last edit of each canonical name: (added or taken away, category)."""
        return {rules.canonical(name): (added, category) for name, added, category in self.tags}


def read_edits(actions: Iterable[Mapping[str, Any]]) -> dict[str, TagEdits]:
    """Tag and caption edits by image, out of the live actions of a journal.

    Understood are `{"action": "add_tag", "id", "tag", "category"?}`, `{"action": "remove_tag",
    "id", "tag"}` and `{"action": "set_caption", "id", "caption"}`, where an empty caption takes
    the caption away. Other actions belong to other stages.

    Raises:
        DataError: an edit lacks one of its keys.
    """
    edits: dict[str, TagEdits] = {}
    wanted = {"add_tag": "tag", "remove_tag": "tag", "set_caption": "caption"}
    for action in actions:
        kind = action.get("action", "")
        if kind not in wanted:
            continue
        value = action.get(wanted[kind])
        if not isinstance(action.get("id"), str) or not isinstance(value, str):
            raise DataError(
                f"journal line {action.get('n', '?')}: {kind} needs id and {wanted[kind]}, "
                f"found {json.dumps(dict(action), ensure_ascii=False)}"
            )
        edit = edits.setdefault(action["id"], TagEdits())
        if kind == "set_caption":
            edit.caption, edit.has_caption = value.strip() or None, True
        else:
            edit.tags.append((value, kind == "add_tag", action.get("category")))
    return edits


def compose_row(
    raw: Iterable[RawTag], rules: TagRules, edits: TagEdits | None = None
) -> tuple[list[RawTag], Counter[str]]:
    """The final tags of one image.

    Which tags come out, with which category, score and source, does not depend on the order of
    `raw`, and composing the result again changes nothing. They are listed in order of first
    appearance (so the first tags of a sidecar stay first), then human, then entailed ones.

    Returns:
        the tags, and counts of `aliased`, `implied`, `blacklisted`, `deprecated`, `ancestors`
        and `human` (tags that people added or took away).
    """
    counts: Counter[str] = Counter()
    edits = edits or TagEdits()
    last = edits.last_words(rules)
    human = {name: category for name, (added, category) in last.items() if added and name}
    removed = {name for name in last if name not in human}
    best: dict[str, RawTag] = {}
    for tag in raw:
        _take(best, tag, rules, counts)
    for name in removed:
        counts["human"] += best.pop(name, None) is not None
    for name, category in human.items():
        counts["human"] += 1
        known = best[name].category if name in best else rules.categories.get(name)
        best[name] = RawTag(name, category or known or "general", None, "human")
    _apply_implications(best, rules, removed, human, counts)
    for names, kind in ((rules.blacklist, "blacklisted"), (rules.deprecated, "deprecated")):
        for name in [name for name in best if name in names and name not in human]:
            del best[name]
            counts[kind] += 1
    return list(best.values()), counts


def _take(best: dict[str, RawTag], tag: RawTag, rules: TagRules, counts: Counter[str]) -> None:
    """Keep a raw tag under its canonical name, if none of a better source is there."""
    plain = normalise_tag(tag.name)
    if not plain:
        return
    name, category, source = rules.aliases.get(plain, plain), tag.category, tag.source
    if name != plain:
        counts["aliased"] += 1
        category, source = rules.categories.get(name, category), "alias"
    category = category or rules.categories.get(name) or "general"
    found = RawTag(name, category, tag.score, source)
    present = best.get(name)
    if present is None or _rank(found) < _rank(present):
        best[name] = found


def _rank(tag: RawTag) -> tuple[int, float, str, str]:
    """Order of preference among sources of the same tag; never two alike, so order-free."""
    score = 2.0 if tag.score is None else tag.score
    return _SOURCE_RANK.get(tag.source, 2), -score, tag.source, tag.category or ""


def _apply_implications(
    best: dict[str, RawTag],
    rules: TagRules,
    removed: set[str],
    human: Mapping[str, str | None],
    counts: Counter[str],
) -> None:
    if rules.mode == "off" or not rules.implications:
        return
    entailed = {other for name in best for other in rules.implications.get(name, ())}
    if rules.mode == "drop_ancestors":
        for name in [name for name in best if name in entailed and name not in human]:
            del best[name]
            counts["ancestors"] += 1
        return
    for name in sorted(entailed - removed - set(best)):
        best[name] = RawTag(name, rules.categories.get(name, "general"), None, "implication")
        counts["implied"] += 1
