"""Groups from edges, and which image of a group stays: pure folds over small columns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sdprep.errors import UserError

OF_THE_FILE = frozenset({"attributes", "owlv2"})
"""Sources of tags that describe one file (its size, its watermark) and not what it shows."""

MAX_MEMBERS_SHOWN = 1000

Link = tuple[int, int]
Tag = dict[str, Any]


def group_edges(ids: Sequence[str], edges: Iterable[Link]) -> list[str]:
    """The group of each row, named by the least id in it; a row without edges is its own group."""
    parent = list(range(len(ids)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for first, second in edges:
        one, two = root(first), root(second)
        if one != two:
            low, high = (one, two) if ids[one] < ids[two] else (two, one)
            parent[high] = low  # so a root always has the least id
    return [ids[root(row)] for row in range(len(ids))]


def links(values: Sequence[Hashable | None]) -> list[Link]:
    """Edges that join all rows of equal value; None joins nothing."""
    first: dict[Hashable, int] = {}
    found = []
    for row, value in enumerate(values):
        if value is not None and first.setdefault(value, row) != row:
            found.append((first[value], row))
    return found


def set_links(
    parents: Sequence[str | None], sources: Sequence[Sequence[Mapping[str, Any]] | None]
) -> list[Link]:
    """Edges between a post and its children, and between children of one parent.

    Args:
        parents: `text.parent_id` of each row; blank is none.
        sources: where each row was found. A parent is named by its post's number, which is the
            last part of a key without the extension; numbers of different sources are unrelated.
    """
    rows: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, parent in enumerate(parents):
        for source in (sources[row] or []) if parent and parent.strip() else []:
            rows[source["source"], (parent or "").strip()].append(row)
    for row, found_at in enumerate(sources):
        for source in found_at or []:
            post = source["source"], PurePosixPath(source["key"].replace("\\", "/")).stem
            if post in rows:
                rows[post].append(row)
    return [(family[0], row) for family in rows.values() for row in family[1:] if row != family[0]]


def members(groups: Sequence[str]) -> dict[str, list[int]]:
    """Rows of each group of two or more."""
    found: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        found[group].append(row)
    return {group: rows for group, rows in sorted(found.items()) if len(rows) > 1}


def refuse_large(ids: Sequence[str], groups: Sequence[str], names: Sequence[str]) -> None:
    """Stop at a group that is larger than duplicates ever are.

    Raises:
        UserError: a group has more than max(100, 0.1 % of the set) members; lists them.
    """
    limit = max(100, len(ids) // 1000)
    for group, rows in members(groups).items():
        if len(rows) > limit:
            shown = [f"    {ids[row]}  {names[row]}" for row in rows[:MAX_MEMBERS_SHOWN]]
            if len(rows) > MAX_MEMBERS_SHOWN:
                shown.append(f"    and {len(rows) - MAX_MEMBERS_SHOWN:,} more")
            raise UserError(
                f"group {group} has {len(rows):,} of {len(ids):,} images, more than {limit:,}, "
                "which is rarely right; its members:\n" + "\n".join(shown),
                "Look at some of them. If they belong together: --accept-large-groups (recipe: "
                "duplicates.accept_large_groups = true). Nothing was changed.",
            )


@dataclass(frozen=True)
class Quality:
    """What decides which image of a group stays, best first."""

    pixels: int
    bits_per_pixel: float
    score: float  # -inf where there is none

    def rank(self, id_: str) -> tuple[float, float, float, str]:
        """Sorts the best one first; equals go by id."""
        return -self.pixels, -self.bits_per_pixel, -self.score, id_


def best_of_groups(
    ids: Sequence[str],
    groups: Sequence[str],
    qualities: Sequence[Quality],
    is_live: Sequence[bool],
) -> dict[int, int]:
    """Row of each image that gives way → row of the better one of its group.

    Args:
        ids: of the rows.
        groups: `dup_id` of the rows.
        qualities: of the rows.
        is_live: no other stage rejects the row; the others neither stay nor give way.
    """
    better = {}
    for rows in members(groups).values():
        ranked = sorted(
            (row for row in rows if is_live[row]), key=lambda row: qualities[row].rank(ids[row])
        )
        better.update(dict.fromkeys(ranked[1:], ranked[0] if ranked else -1))
    return better


def gave_way(ids: Sequence[str], reasons: Sequence[str | None]) -> dict[int, int]:
    """What `best_of_groups` returned, read back from `reject_duplicates`."""
    rows = {id_: row for row, id_ in enumerate(ids)}
    better = {}
    for row, reason in enumerate(reasons):
        kind, _, best = (reason or "").partition(":")
        if kind == "duplicate_of" and best in rows:
            better[row] = rows[best]
    return better


def unite_tags(
    ids: Sequence[str],
    tags: Sequence[Sequence[Tag] | None],
    better: Mapping[int, int],
    removed: Iterable[tuple[str, str]] = (),
) -> dict[int, list[Tag]]:
    """New tags of the images that stay: their own, then what only their duplicates had.

    A tag keeps its source and score. Not passed on: tags that describe the file (`OF_THE_FILE`),
    ratings where there is one already, and what a person took off the image that stays. Uniting
    twice is the same as once. Composition rewrites `tags` and unites them again (`gave_way`).

    Args:
        ids: of the rows.
        tags: composed tags of the rows.
        better: as `best_of_groups` returns.
        removed: (id, tag name) taken off by people.
    Returns:
        row → tags, for the rows whose tags change.
    """
    taken_off = set(removed)
    united: dict[int, list[Tag]] = {}
    for row in sorted(better, key=lambda row: ids[row]):
        best = better[row]
        own = united.get(best, list(tags[best] or []))
        names = {tag["name"] for tag in own}
        has_rating = any(tag["category"] == "rating" for tag in own)
        new = [
            tag
            for tag in sorted(tags[row] or [], key=lambda tag: tag["name"])
            if tag["name"] not in names
            and tag["source"] not in OF_THE_FILE
            and not (has_rating and tag["category"] == "rating")
            and (ids[best], tag["name"]) not in taken_off
        ]
        if new:
            united[best] = own + new
    return united
