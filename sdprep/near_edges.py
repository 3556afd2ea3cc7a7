"""Pairs of images that show one photo: what a search by signature found, looked at again.

An edge needs signatures within 28 bits in some pair of views, and thumbnails of those views that
agree (`second_look`). Nothing here knows about tables; rows are numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from sdprep.console import progress
from sdprep.near_search import Edge, Views, compare_all
from sdprep.second_look import agrees, crop_thumbnail, is_plain
from sdprep.signatures import NUM_MIRRORED, view_boxes

STANDS_ALONE = 16  # bits: stands unless the second look contradicts
VERIFIED = 20  # bits: edges up to here make `dup_id`
MIN_COSINE = 0.95  # of embeddings, which may agree in place of thumbnails


@dataclass
class Edges:
    """The edges found, and how they were."""

    edges: list[Edge] = field(default_factory=list)  # sorted
    num_close: int = 0  # up to 16 bits
    num_far: int = 0  # 17 to 28 bits
    num_refused: int = 0  # pairs within 28 bits whose thumbnails do not agree
    num_estimated: float = 0.0  # edges there are, as far as the recall of the search tells


def find_edges(
    views: Views, is_new: np.ndarray | None = None, *, threads: int | None = None
) -> Edges:
    """Find all pairs of images that show one photo, by comparing each with each.

    Args:
        views: of all images. Images whose whole is flat take no part.
        is_new: (n,) bool; only pairs with a new image are compared. None: all are new.
        threads: how many compare; the result is the same for any number.
    Raises:
        UserError: so many pairs meet that most of the set must be one picture.
    """
    is_new = np.ones(len(views), bool) if is_new is None else is_new
    return verify(views, compare_all(views, is_new, threads), views.thumbnails)


def verify(
    views: Views,
    hits: np.ndarray,
    thumbnails: Mapping[int, np.ndarray] | np.ndarray,
    recall: Callable[[int], float] = lambda distance: 1.0,
) -> Edges:
    """Take the second look at what a search found.

    Args:
        views: of all images; their thumbnails are not read.
        hits: as the searches of `near_search` return.
        thumbnails: (64, 64) uint8 of at least the images that occur.
        recall: of that search, by distance.
    """
    found = Edges()
    plain: dict[int, bool] = {}
    starts = np.flatnonzero(np.any(np.diff(hits[:, :2], axis=0, prepend=-1), axis=1))
    with progress("second look", len(starts), "pairs") as bar:
        for of_pair in np.split(hits, starts[1:]) if len(hits) else []:
            distance = _verified_distance(views, of_pair.tolist(), thumbnails, plain)
            bar.advance()
            if distance is None:
                found.num_refused += 1
                continue
            found.edges.append((int(of_pair[0, 0]), int(of_pair[0, 1]), distance))
            found.num_estimated += 1 / recall(distance)
            if distance <= STANDS_ALONE:
                found.num_close += 1
            else:
                found.num_far += 1
    return found


def _verified_distance(
    views: Views,
    hits: list[list[int]],
    thumbnails: Mapping[int, np.ndarray] | np.ndarray,
    plain: dict[int, bool],
) -> int | None:
    """The least distance of two views whose thumbnails agree, or None if none do.

    Args:
        views: of all images.
        hits: all of one pair: lower, higher, distance, whether the higher is the query, view of
            the query, view of the target; by distance.
        thumbnails: by image.
        plain: which images are plain, as far as known.
    """
    pair = hits[0][:2]
    for image in pair:
        if image not in plain:
            plain[image] = is_plain(thumbnails[image])
    either_plain = plain[pair[0]] or plain[pair[1]]
    for _, _, distance, is_swapped, query_view, target_view in hits:
        query, target = (pair[1], pair[0]) if is_swapped else (pair[0], pair[1])
        is_mirrored, upright_view = divmod(target_view, NUM_MIRRORED)
        first = crop_thumbnail(thumbnails[query], view_boxes(views.trim[query])[query_view])
        second = crop_thumbnail(
            thumbnails[target],
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
