"""The closest pairs across the split, and which of them are too close to be let stand."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from sdprep.assignment import TRAIN, VALIDATION
from sdprep.near_search import closest_pairs
from sdprep.second_look import agrees, is_plain
from sdprep.seeding import integer
from sdprep.signatures import COLUMN, THUMBNAIL_PX
from sdprep.split_rows import SplitRows
from sdprep.table import PhotoTable

NUM_CLOSEST = 20
MOST_CLOSE = 1000  # pairs under the threshold that are told apart one by one
MOST_COMPARISONS = 2_100_000_000  # 10 s on one core; beyond, a keyed part of validation is compared

Pair = dict[str, Any]


def cross_split(
    rows: SplitRows,
    threshold: int | None,
    different: Collection[Sequence[str]] = (),
    *,
    tell_apart: Callable[[Sequence[Pair]], list[tuple[str, str]]] | None = None,
) -> dict[str, Any]:
    """Compare the signatures of the two sides.

    Args:
        rows: images with and without a signature; those without, and flat ones, take no part.
        threshold: bits; a closer or equal pair belongs on one side. None: only measure.
        different: (validation id, train id) that were told apart earlier, in spite of it.
        tell_apart: a second look at pairs at or under the threshold.

    Returns:
        threshold; min_distance (None if a side has no signatures); closest, the 20 closest pairs;
        close, those at or under the threshold that are not in `different`; different; compared.
    """
    train, _ = _side(rows, TRAIN)
    validation, compared = _side(rows, VALIDATION, limit=MOST_COMPARISONS // max(1, len(train)))
    limit = -1 if threshold is None else threshold
    pairs = _pairs(rows, validation, train, NUM_CLOSEST)
    if pairs and pairs[-1]["distance"] <= limit:
        pairs = _pairs(rows, validation, train, MOST_CLOSE)
    close = [pair for pair in pairs if pair["distance"] <= limit]
    known = {(first, second) for first, second in different}
    if tell_apart is not None and close:
        known.update(tell_apart(close))
    return {
        "threshold": threshold,
        "min_distance": pairs[0]["distance"] if pairs else None,
        "closest": pairs[:NUM_CLOSEST],
        "close": [pair for pair in close if (pair[VALIDATION], pair[TRAIN]) not in known],
        "different": sorted(list(pair) for pair in known),
        "compared": compared,
    }


def told_apart(table: PhotoTable, pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """Pairs of close signatures whose thumbnails show two pictures, as dedup judged them too."""
    if not table.has(COLUMN):
        return []
    wanted = sorted({pair[side] for pair in pairs for side in (TRAIN, VALIDATION)})
    where = "id IN (" + ", ".join(f"'{id_}'" for id_ in wanted) + ")"
    found = table.read(["id", f"{COLUMN}.thumbnail"], where)
    shape = THUMBNAIL_PX, THUMBNAIL_PX
    thumbnails = {
        id_: np.frombuffer(data, np.uint8).reshape(shape)
        for id_, data in zip(*(column.to_pylist() for column in found.columns), strict=True)
        if data is not None
    }
    apart = []
    for pair in pairs:
        first, second = thumbnails.get(pair[VALIDATION]), thumbnails.get(pair[TRAIN])
        if first is not None and second is not None and not _agree(first, second):
            apart.append((pair[VALIDATION], pair[TRAIN]))
    return apart


def _agree(first: np.ndarray, second: np.ndarray) -> bool:
    either_plain = is_plain(first) or is_plain(second)
    levels = (thumbnail.astype(np.float32) for thumbnail in (first, second))
    return agrees(*levels, is_close=True, is_plain=either_plain)


def _side(rows: SplitRows, side: str, limit: int | None = None) -> tuple[np.ndarray, str]:
    """Row numbers of one side in order of id; only a keyed part of them beyond `limit`."""
    there = [row for row in np.flatnonzero(rows.has_signature).tolist() if rows.splits[row] == side]
    compared = "all"
    if limit is not None and len(there) > limit:
        compared = f"{limit} of {len(there)} validation images with all of train"
        there = sorted(there, key=lambda row: integer("closest", rows.ids[row]))[:limit]
    return np.array(sorted(there, key=lambda row: rows.ids[row]), np.int64), compared


def _pairs(rows: SplitRows, validation: np.ndarray, train: np.ndarray, count: int) -> list[Pair]:
    """The closest pairs, closest first, ties by id; the same for any number of threads."""
    threads = min(8, os.cpu_count() or 1)
    parts = [part for part in np.array_split(validation, threads) if len(part)]
    others = rows.signatures[train]
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda part: closest_pairs(rows.signatures[part], others, count), parts)
        ranked = sorted(
            (distance, rows.ids[part[first]], rows.ids[train[second]])
            for part, pairs in zip(parts, found, strict=True)
            for first, second, distance in pairs
        )
    return [
        {VALIDATION: first, TRAIN: second, "distance": distance}
        for distance, first, second in ranked[:count]
    ]
