"""The bucket preview: what each bucket gets, enlarges, crops and cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdprep.buckets import Bucket, checked_sides, fit, nearest_indices


@dataclass(frozen=True)
class BucketRow:
    """One line of the preview: how many images a bucket gets and what they lose.

    Args:
        bucket: the size.
        count: images.
        upscaled: images that must be enlarged.
        mean_crop_percent: of the image's area; 0 without images.
        max_crop_percent: of the image's area; 0 without images.
        boxes_cut: boxes that the centre crop cuts or loses; None when no boxes were given.
    """

    bucket: Bucket
    count: int
    upscaled: int
    mean_crop_percent: float
    max_crop_percent: float
    boxes_cut: int | None = None


@dataclass(frozen=True)
class BucketTable:
    """The preview: one row per bucket that has images, and their totals.

    Args:
        rows: buckets in use, from tallest to widest.
        count: images in all.
        upscaled: images that must be enlarged, in all.
        mean_crop_percent: over all images.
        max_crop_percent: over all images.
        boxes_cut: in all; None when no boxes were given.
        warnings: sentences for the user, such as buckets with a single image.
    """

    rows: tuple[BucketRow, ...]
    count: int
    upscaled: int
    mean_crop_percent: float
    max_crop_percent: float
    boxes_cut: int | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The table as plain values, for cards and `--json`."""
        rows = [
            {"width": row.bucket.width, "height": row.bucket.height, **_figures(row)}
            for row in self.rows
        ]
        return {"buckets": rows, "total": _figures(self), "warnings": list(self.warnings)}


def bucket_table(
    widths: Sequence[int] | np.ndarray,
    heights: Sequence[int] | np.ndarray,
    buckets: Sequence[Bucket],
    boxes: tuple[np.ndarray, np.ndarray] | None = None,
) -> BucketTable:
    """Count what each bucket gets, enlarges, crops and cuts.

    Args:
        widths: (n,) upright pixels.
        heights: (n,) upright pixels.
        buckets: not empty.
        boxes: (m,) index of each box's image, and (m, 4) x0, y0, x1, y1 as fractions of it.

    Raises:
        DataError: an image has no area.
    """
    w, h = checked_sides(widths, heights)
    which = nearest_indices(w, h, buckets)
    bucket_w = np.array([bucket.width for bucket in buckets], np.int64)[which]
    bucket_h = np.array([bucket.height for bucket in buckets], np.int64)[which]
    is_upscaled = (bucket_w > w) | (bucket_h > h)
    by_width, by_height = bucket_w * h, bucket_h * w
    crop = 100 * (1 - np.minimum(by_width, by_height) / np.maximum(by_width, by_height))
    cut = None if boxes is None else _cut_per_image(w, h, which, buckets, boxes)
    rows = []
    for index in np.unique(which):
        of_bucket = which == index
        rows.append(
            BucketRow(buckets[index], *_summary(of_bucket, is_upscaled, crop), _sum(cut, of_bucket))
        )
    all_images = np.ones(len(w), bool)
    totals = _summary(all_images, is_upscaled, crop)
    single = [str(row.bucket) for row in rows if row.count == 1]
    warnings = [_singletons(single)] if single else []
    return BucketTable(tuple(rows), *totals, _sum(cut, all_images), tuple(warnings))


def _cut_per_image(
    w: np.ndarray,
    h: np.ndarray,
    which: np.ndarray,
    buckets: Sequence[Bucket],
    boxes: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """(n,) how many boxes of each image reach beyond what the centre crop shows."""
    cut = np.zeros(len(w), np.int64)
    for image, (x0, y0, x1, y1) in zip(*boxes, strict=True):
        bucket = buckets[which[image]]
        placed = fit(int(w[image]), int(h[image]), bucket)
        (height, width), (top, left) = placed.resized_hw, placed.crop_top_left
        slack = 1e-6  # boxes are float32 fractions
        is_inside = (
            x0 >= left / width - slack
            and y0 >= top / height - slack
            and x1 <= (left + bucket.width) / width + slack
            and y1 <= (top + bucket.height) / height + slack
        )
        cut[image] += not is_inside
    return cut


def _summary(
    rows: np.ndarray, is_upscaled: np.ndarray, crop: np.ndarray
) -> tuple[int, int, float, float]:
    if not rows.any():
        return 0, 0, 0.0, 0.0
    lost = crop[rows]
    return int(rows.sum()), int(is_upscaled[rows].sum()), float(lost.mean()), float(lost.max())


def _sum(values: np.ndarray | None, rows: np.ndarray) -> int | None:
    return None if values is None else int(values[rows].sum())


def _figures(row: BucketRow | BucketTable) -> dict[str, Any]:
    names = ("count", "upscaled", "mean_crop_percent", "max_crop_percent", "boxes_cut")
    return {name: getattr(row, name) for name in names}


def _singletons(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return (
        f"{len(names)} bucket{'s' if len(names) > 1 else ''} with a single image: {shown}; "
        "such an image always trains in a batch of its own"
    )
