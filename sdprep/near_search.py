"""Search by signature among all images: which pairs of views are within 28 bits.

A search returns its hits as (m, 6) int32, sorted: lower image, higher image, distance, whether the
higher one is the query, view of the query (0..7), view of the target (0, 1: whole, trimmed; 2, 3:
the same mirrored). `compare_all` sees every pair; `near_sampled` is for sets too large for that.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from sdprep.console import progress
from sdprep.errors import UserError
from sdprep.signatures import (
    BITS,
    NUM_MIRRORED,
    NUM_UPRIGHT,
    THUMBNAIL_PX,
    TRIMMED,
    WHOLE,
    ViewSignatures,
)

RADIUS = 28  # bits
MAX_HITS = 50_000_000  # 24 bytes each
QUERY_ROWS, TARGET_ROWS = 128, 2048  # a block of distances stays in the processor's cache

Edge = tuple[int, int, int]
"""Lower row, higher row, distance in bits."""


@dataclass(frozen=True)
class Views:
    """`ViewSignatures` of many images; row i of each array is image i."""

    upright: np.ndarray  # (n, 8, 16) uint8
    mirrored: np.ndarray  # (n, 2, 16) uint8
    usable: np.ndarray  # (n, 8) bool
    trim: np.ndarray  # (n, 4) left, top, right, bottom in the 256-px luma
    thumbnails: np.ndarray  # (n, 64, 64) uint8
    embeddings: np.ndarray | None = None  # (n, d) float, any norm; NaN where there is none

    @classmethod
    def of(cls, images: list[ViewSignatures]) -> Views:
        """Stack the signatures of single images."""
        return cls(
            np.array([image.upright for image in images]).reshape(-1, NUM_UPRIGHT, 16),
            np.array([image.mirrored for image in images]).reshape(-1, NUM_MIRRORED, 16),
            np.array([image.usable for image in images], bool).reshape(-1, NUM_UPRIGHT),
            np.array([image.trim for image in images], int).reshape(-1, 4),
            np.array([image.thumbnail for image in images], np.uint8).reshape(
                -1, THUMBNAIL_PX, THUMBNAIL_PX
            ),
        )

    def __len__(self) -> int:
        return len(self.upright)


@dataclass(frozen=True)
class Rows:
    """One list of views to compare: words of the signature, and which image and view it is."""

    words: np.ndarray  # (m, 2) uint64
    image: np.ndarray  # (m,) int
    view: np.ndarray  # (m,) int; as a target 2 and 3 are whole and trimmed, mirrored

    def of(self, is_wanted: np.ndarray) -> Rows:
        """The rows of some images."""
        here = is_wanted[self.image]
        return Rows(self.words[here], self.image[here], self.view[here])


def words_of(signatures: np.ndarray) -> np.ndarray:
    """(m, 16) uint8 -> (m, 2) uint64; only ever counted bit by bit, so byte order is no matter."""
    return np.ascontiguousarray(signatures).view(np.uint64)


def view_rows(views: Views) -> tuple[Rows, Rows]:
    """Queries: all upright views. Targets: whole, trimmed, and both mirrored."""
    usable = views.usable & views.usable[:, WHOLE : WHOLE + 1]
    image, view = np.nonzero(usable)
    queries = Rows(words_of(views.upright[image, view]), image, view)
    framed = usable[:, [WHOLE, TRIMMED, WHOLE, TRIMMED]]
    targets = np.concatenate([views.upright[:, [WHOLE, TRIMMED]], views.mirrored], axis=1)
    image, view = np.nonzero(framed)
    return queries, Rows(words_of(targets[image, view]), image, view)


def compare_all(views: Views, is_new: np.ndarray, threads: int | None = None) -> np.ndarray:
    """Compare every image with every other one.

    Args:
        views: of all images. Images whose whole is flat take no part.
        is_new: (n,) bool; only pairs with a new image are compared.
        threads: how many compare; the result is the same for any number.
    Returns:
        hits (see the top) between any view of one and the framed views of the other.
    Raises:
        UserError: so many pairs meet that most of the set must be one picture.
    """
    queries, targets = view_rows(views)
    work = [(queries.of(is_new), targets)]
    if not is_new.all():
        work.append((queries.of(~is_new), targets.of(is_new)))
    found = [np.empty((0, 6), np.int32)]
    total = sum(len(these.image) for these, those in work if len(those.image))
    with (
        progress("comparing", total, "views") as bar,
        ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool,
    ):
        for these, those in work:
            blocks = range(0, len(these.image) if len(those.image) else 0, QUERY_ROWS)
            for part in pool.map(partial(_compare, these, those), blocks):
                found.append(part)
                bar.advance(QUERY_ROWS)
                if sum(map(len, found)) > MAX_HITS:
                    pool.shutdown(cancel_futures=True)
                    raise too_many_hits(len(views))
    hits = np.concatenate(found)
    return hits[np.lexsort(hits.T[::-1])]


def too_many_hits(num_images: int) -> UserError:
    """What to say before memory runs out."""
    return UserError(
        f"more than {MAX_HITS:,} pairs of views agree among {num_images:,} images",
        "Most of the set shows one picture. Reject what is empty or repeated first "
        "(sdprep select), or use --no-near.",
    )


def _compare(queries: Rows, targets: Rows, start: int) -> np.ndarray:
    """Compare one block of queries with all targets."""
    found = [np.empty((0, 6), np.int32)]
    rows = slice(start, start + QUERY_ROWS)
    words, image, view = queries.words[rows], queries.image[rows], queries.view[rows]
    for first in range(0, len(targets.image), TARGET_ROWS):
        those = slice(first, first + TARGET_ROWS)
        bits = distances(words, targets.words[those])
        near = np.flatnonzero(bits <= RADIUS)
        if not len(near):
            continue
        row, column = np.divmod(near, bits.shape[1])
        query, target = image[row], targets.image[those][column]
        hits = np.stack(
            [
                np.minimum(query, target),
                np.maximum(query, target),
                bits.ravel()[near],
                query > target,
                view[row],
                targets.view[those][column],
            ],
            axis=1,
        )
        found.append(hits[query != target].astype(np.int32))
    return np.concatenate(found)


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(a, 2) and (b, 2) uint64 -> (a, b) uint8 bits."""
    bits = np.bitwise_count(first[:, None, 0] ^ second[None, :, 0])
    bits += np.bitwise_count(first[:, None, 1] ^ second[None, :, 1])
    return bits


def closest_pairs(first: np.ndarray, second: np.ndarray, k: int = 20) -> list[Edge]:
    """The k closest pairs across two sides, such as train and validation.

    A published set holds the signature of the whole only. The mirrored one cannot be had from its
    bits: flipping turns the sign of odd frequencies, which moves the median they are compared
    with, and ties of dHash stay ties. So mirrored twins and crops are found on a table only.

    Args:
        first: (a, 16) or (a, v, 16) uint8, signatures of one side, of one or more views each.
        second: (b, 16) or (b, w, 16) uint8, of the other. Flat images take no part.
        k: how many.
    Returns:
        (row of first, row of second, bits), closest first, ties by row; the first one is the
        minimum distance between the sides. Empty if a side is.
    """
    sides = []
    for side in (first, second):
        views = side[:, None] if side.ndim == 2 else side
        image, view = np.nonzero(np.broadcast_to(views[:, :1, 15] & 1 == 0, views.shape[:2]))
        sides.append(Rows(words_of(views[image, view]), image, view))
    best = np.empty(0, np.uint64)
    limit = BITS
    for start in range(0, len(sides[0].image), QUERY_ROWS):
        for begin in range(0, len(sides[1].image), TARGET_ROWS):
            rows, columns = slice(start, start + QUERY_ROWS), slice(begin, begin + TARGET_ROWS)
            bits = distances(sides[0].words[rows], sides[1].words[columns])
            row, column = np.nonzero(bits <= limit)
            one = sides[0].image[rows][row].astype(np.uint64)
            two = sides[1].image[columns][column].astype(np.uint64)
            keys = (bits[row, column].astype(np.uint64) << 56) | (one << 28) | two
            best = _smallest(np.concatenate([best, keys]), k)
            if len(best) == k:
                limit = int(best[-1] >> 56)
    return [(key >> 28 & _ROW, key & _ROW, key >> 56) for key in best.tolist()]


_ROW = (1 << 28) - 1


def _smallest(keys: np.ndarray, k: int) -> np.ndarray:
    """The k smallest of distance << 56 | pair, each pair once."""
    keys = np.sort(keys)
    _, first = np.unique(keys & np.uint64((1 << 56) - 1), return_index=True)
    return np.sort(keys[first])[:k]
