"""What detectors share: the fields of their columns, and the suppression of overlapping boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sdprep.masks import corners, coverage
from sdprep.schema import BOX

COLUMNS = pa.schema([pa.field("boxes", pa.list_(BOX)), pa.field("coverage", pa.float32())])
"""Fields of every detector: the raw list, and the area of its union as a share of the image."""

DISPLAY_IOU = 0.5
"""Boxes of one label that overlap by more than this are shown once."""


def found(labels: Sequence[str], scores: Sequence[float], places: np.ndarray) -> dict[str, Any]:
    """The value of `COLUMNS` for one image.

    Args:
        labels: of each box.
        scores: of each box, 0..1.
        places: (m, 4) x0, y0, x1, y1 as fractions of the upright original; cut to 0..1 here.
    """
    places = np.asarray(places, np.float64).reshape(-1, 4).clip(0, 1)
    rows = [
        {"label": label, "score": float(score)}
        | dict(zip(("x0", "y0", "x1", "y1"), map(float, place), strict=True))
        for label, score, place in zip(labels, scores, places, strict=True)
    ]
    return {"boxes": rows, "coverage": coverage(places)}


def not_overlapping(places: np.ndarray, scores: np.ndarray, max_iou: float) -> np.ndarray:
    """Greedy non-maximum suppression: the best box stays, and what overlaps it too much goes.

    Args:
        places: (m, 4) x0, y0, x1, y1 in any unit.
        scores: (m,); of equal ones the earlier box comes first.
        max_iou: a box goes if it shares more than this of the union with a better one.

    Returns:
        indices of those that stay, best first.
    """
    order = np.argsort(-scores, kind="stable")
    area = (places[:, 2] - places[:, 0]) * (places[:, 3] - places[:, 1])
    kept: list[int] = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(int(best))
        low = np.maximum(places[best, :2], places[rest, :2])
        high = np.minimum(places[best, 2:], places[rest, 2:])
        shared = (high - low).clip(0).prod(1)
        union = area[best] + area[rest] - shared
        order = rest[shared <= max_iou * union]
    return np.array(kept, np.int64)


def for_display(boxes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Boxes as people look at them: label by label without overlaps, best first."""
    shown = []
    for label in dict.fromkeys(box["label"] for box in boxes):
        same = [box for box in boxes if box["label"] == label]
        scores = np.array([box["score"] for box in same])
        shown += [same[index] for index in not_overlapping(corners(same), scores, DISPLAY_IOU)]
    return sorted(shown, key=lambda box: -box["score"])
