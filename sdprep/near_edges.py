"""Pairs of images that show one photo, found by comparing every image with every other one.

An edge needs signatures within `radius` bits in some pair of views, and thumbnails of those views
that agree (`second_look`). Nothing here knows about tables; rows are numbers. A search that does
not compare all pairs would replace `_candidates` and nothing else.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from sdprep.console import progress
from sdprep.errors import UserError
from sdprep.second_look import agrees, crop_thumbnail, is_plain
from sdprep.signatures import (
    BITS,
    NUM_MIRRORED,
    NUM_UPRIGHT,
    THUMBNAIL_PX,
    TRIMMED,
    WHOLE,
    ViewSignatures,
    view_boxes,
)

STANDS_ALONE = 16  # bits: stands unless the second look contradicts
RADIUS = 28  # bits: stands if the second look agrees
VERIFIED = 20  # bits: edges up to here make `dup_id`
MIN_COSINE = 0.95  # of embeddings, which may agree in place of thumbnails
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


@dataclass
class Edges:
    """The edges found, and how they were."""

    edges: list[Edge] = field(default_factory=list)  # sorted
    num_close: int = 0  # up to 16 bits
    num_far: int = 0  # 17 to 28 bits
    num_refused: int = 0  # pairs within 28 bits whose thumbnails do not agree


@dataclass(frozen=True)
class _Rows:
    """One list of views to compare: words of the signature, and which image and view it is."""

    words: np.ndarray  # (m, 2) uint64
    image: np.ndarray  # (m,) int
    view: np.ndarray  # (m,) int; as a target 2 and 3 are whole and trimmed, mirrored

    def of(self, is_wanted: np.ndarray) -> _Rows:
        """The rows of some images."""
        here = is_wanted[self.image]
        return _Rows(self.words[here], self.image[here], self.view[here])


def find_edges(
    views: Views, is_new: np.ndarray | None = None, *, threads: int | None = None
) -> Edges:
    """Find all pairs of images that show one photo.

    Args:
        views: of all images. Images whose whole is flat take no part.
        is_new: (n,) bool; only pairs with a new image are compared. None: all are new.
        threads: how many compare; the result is the same for any number.
    Raises:
        UserError: so many pairs meet that most of the set must be one picture.
    """
    hits = _candidates(views, np.ones(len(views), bool) if is_new is None else is_new, threads)
    found = Edges()
    plain: dict[int, bool] = {}
    starts = np.flatnonzero(np.any(np.diff(hits[:, :2], axis=0, prepend=-1), axis=1))
    with progress("second look", len(starts), "pairs") as bar:
        for of_pair in np.split(hits, starts[1:]) if len(hits) else []:
            distance = _verified_distance(views, of_pair.tolist(), plain)
            bar.advance()
            if distance is None:
                found.num_refused += 1
                continue
            found.edges.append((int(of_pair[0, 0]), int(of_pair[0, 1]), distance))
            if distance <= STANDS_ALONE:
                found.num_close += 1
            else:
                found.num_far += 1
    return found


def _verified_distance(views: Views, hits: list[list[int]], plain: dict[int, bool]) -> int | None:
    """The least distance of two views whose thumbnails agree, or None if none do.

    Args:
        views: of all images.
        hits: all of one pair: lower, higher, distance, whether the higher is the query, view of
            the query, view of the target; by distance.
        plain: which images are plain, as far as known.
    """
    pair = hits[0][:2]
    for image in pair:
        if image not in plain:
            plain[image] = is_plain(views.thumbnails[image])
    either_plain = plain[pair[0]] or plain[pair[1]]
    for _, _, distance, is_swapped, query_view, target_view in hits:
        query, target = (pair[1], pair[0]) if is_swapped else (pair[0], pair[1])
        is_mirrored, upright_view = divmod(target_view, NUM_MIRRORED)
        first = crop_thumbnail(views.thumbnails[query], view_boxes(views.trim[query])[query_view])
        second = crop_thumbnail(
            views.thumbnails[target],
            view_boxes(views.trim[target])[upright_view],
            is_mirrored=bool(is_mirrored),
        )
        is_close = distance <= STANDS_ALONE
        if agrees(first, second, is_close=is_close, is_plain=either_plain):
            return distance
        if not is_close and not either_plain and _cosine(views, query, target) >= MIN_COSINE:
            return distance
    return None


def _cosine(views: Views, first: int, second: int) -> float:
    """Of two embeddings; -1 where there are none."""
    if views.embeddings is None:
        return -1.0
    one, two = views.embeddings[[first, second]].astype(np.float64)
    norm = float(np.linalg.norm(one) * np.linalg.norm(two))
    return float(one @ two) / norm if norm > 0 else -1.0  # NaN compares false


def _words(signatures: np.ndarray) -> np.ndarray:
    """(m, 16) uint8 -> (m, 2) uint64; only ever counted bit by bit, so byte order is no matter."""
    return np.ascontiguousarray(signatures).view(np.uint64)


def _rows(views: Views) -> tuple[_Rows, _Rows]:
    """Queries: all upright views. Targets: whole, trimmed, and both mirrored."""
    usable = views.usable & views.usable[:, WHOLE : WHOLE + 1]
    image, view = np.nonzero(usable)
    queries = _Rows(_words(views.upright[image, view]), image, view)
    framed = usable[:, [WHOLE, TRIMMED, WHOLE, TRIMMED]]
    targets = np.concatenate([views.upright[:, [WHOLE, TRIMMED]], views.mirrored], axis=1)
    image, view = np.nonzero(framed)
    return queries, _Rows(_words(targets[image, view]), image, view)


def _candidates(views: Views, is_new: np.ndarray, threads: int | None) -> np.ndarray:
    """All views within 28 bits, (m, 6) int32, sorted; columns as `_verified_distance` says."""
    queries, targets = _rows(views)
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
                    raise UserError(
                        f"more than {MAX_HITS:,} pairs of views agree among {len(views):,} images",
                        "Most of the set shows one picture. Reject what is empty or repeated "
                        "first (sdprep select), or use --no-near.",
                    )
    hits = np.concatenate(found)
    return hits[np.lexsort(hits.T[::-1])]


def _compare(queries: _Rows, targets: _Rows, start: int) -> np.ndarray:
    """Compare one block of queries with all targets."""
    found = [np.empty((0, 6), np.int32)]
    rows = slice(start, start + QUERY_ROWS)
    words, image, view = queries.words[rows], queries.image[rows], queries.view[rows]
    for first in range(0, len(targets.image), TARGET_ROWS):
        those = slice(first, first + TARGET_ROWS)
        bits = _distances(words, targets.words[those])
        near = np.flatnonzero(bits <= RADIUS)
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


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
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
        sides.append(_Rows(_words(views[image, view]), image, view))
    best = np.empty(0, np.uint64)
    limit = BITS
    for start in range(0, len(sides[0].image), QUERY_ROWS):
        for begin in range(0, len(sides[1].image), TARGET_ROWS):
            rows, columns = slice(start, start + QUERY_ROWS), slice(begin, begin + TARGET_ROWS)
            bits = _distances(sides[0].words[rows], sides[1].words[columns])
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
