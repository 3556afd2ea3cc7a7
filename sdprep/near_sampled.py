"""Search by signature in sets too large to compare every pair.

Two signatures become candidates when they are equal in all of 22 bits chosen at random, for one of
64 choices; equal keys are brought together by sorting. Only whole and trimmed take part, upright
and mirrored: crops are left to the exhaustive search.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import comb

import numpy as np

from sdprep.console import progress
from sdprep.near_search import MAX_HITS, RADIUS, Rows, Views, too_many_hits, view_rows
from sdprep.seeding import rng_for
from sdprep.signatures import BITS, SIGNATURE_VERSION, TRIMMED

NUM_SAMPLES = 64
SAMPLE_BITS = 22
PAIRS_AT_ONCE = 1 << 22


@cache
def recall(distance: int) -> float:
    """Share of the pairs at a distance that are found: 1 up to 8, .92 at 16, .15 at 28."""
    one = comb(BITS - distance, SAMPLE_BITS) / comb(BITS, SAMPLE_BITS)
    return 1 - (1 - one) ** NUM_SAMPLES


def compare_sampled(views: Views, is_new: np.ndarray) -> np.ndarray:
    """Compare those images whose signatures agree in a sample of bits.

    Args:
        views: of all images. Images whose whole is flat take no part.
        is_new: (n,) bool; only pairs with a new image are compared.
    Returns:
        hits, as `near_search` says.
    Raises:
        UserError: so many pairs meet that most of the set must be one picture.
    """
    queries, targets = view_rows(views)
    framed = queries.view <= TRIMMED
    queries = Rows(queries.words[framed], queries.image[framed], queries.view[framed])
    work = [(queries.of(is_new), targets)]
    if not is_new.all():
        work.append((queries.of(~is_new), targets.of(is_new)))
    hits = np.empty((0, 6), np.int32)
    with progress("comparing", NUM_SAMPLES, "samples") as bar:
        for sample in range(NUM_SAMPLES):
            places = rng_for("near duplicates", SIGNATURE_VERSION, sample).permutation(BITS)
            found = [hits]
            for these, those in work:
                found.extend(_equal_keys(these, those, places[:SAMPLE_BITS]))
            hits = np.unique(np.concatenate(found), axis=0)  # sorted; most samples repeat hits
            if len(hits) > MAX_HITS:
                raise too_many_hits(len(views))
            bar.advance()
    return hits


def _keys(words: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(m, 2) uint64 -> (m,) uint32, the bits at some places."""
    keys = np.zeros(len(words), np.uint32)
    for place in places.tolist():
        bit = words[:, place // 64] >> np.uint64(place % 64) & np.uint64(1)
        keys = keys << np.uint32(1) | bit.astype(np.uint32)
    return keys


def _equal_keys(queries: Rows, targets: Rows, places: np.ndarray) -> Iterator[np.ndarray]:
    """Hits among the pairs of equal keys, a bounded number of pairs at a time."""
    order = np.argsort(_keys(targets.words, places), kind="stable")
    sorted_keys = _keys(targets.words, places)[order]
    keys = _keys(queries.words, places)
    first = np.searchsorted(sorted_keys, keys, "left")
    count = np.searchsorted(sorted_keys, keys, "right") - first
    ends = np.cumsum(count)
    start = 0
    while start < len(keys):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + PAIRS_AT_ONCE, "right")))
        here = slice(start, stop)
        query = np.repeat(np.arange(start, stop), count[here])
        offset = np.arange(len(query)) - np.repeat(ends[here] - count[here] - done, count[here])
        target = order[first[query] + offset]
        yield _within_radius(queries, targets, query, target)
        start = stop


def _within_radius(
    queries: Rows, targets: Rows, query: np.ndarray, target: np.ndarray
) -> np.ndarray:
    differing = queries.words[query] ^ targets.words[target]
    bits = np.bitwise_count(differing).sum(axis=1)
    one, two = queries.image[query], targets.image[target]
    columns = (
        np.minimum(one, two),
        np.maximum(one, two),
        bits,
        one > two,
        queries.view[query],
        targets.view[target],
    )
    is_hit = (bits <= RADIUS) & (one != two)
    return np.stack([column[is_hit] for column in columns], axis=1).astype(np.int32)
