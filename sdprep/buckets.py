"""Aspect buckets: which sizes there are, which one an image takes, and what its crop costs.

Pure geometry, used by the curator's preview and by the trainer, so both see the same pixels.
Widths and heights are named everywhere; a pair always says its order (`size_hw`, `resized_hw`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from sdprep.errors import DataError, UserError

SDXL_RESOLUTION_PX = 1024
LOW_AREA = Fraction(946_176, 1_048_576)
"""Smallest bucket area as a share of the budget: 704 x 1344 of 1024 x 1024 is in, 231/256."""

_TIE = 1e-9  # float logarithms closer than this are compared again in exact integers
_CHUNK_ROWS = 65_536


@dataclass(frozen=True, order=True)
class Bucket:
    """A training size in pixels. Not a tuple on purpose: nobody can unpack it the wrong way round.

    Args:
        width: pixels.
        height: pixels.
    """

    width: int
    height: int

    @property
    def area(self) -> int:
        """Pixels in all."""
        return self.width * self.height

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height

    @property
    def size_hw(self) -> tuple[int, int]:
        """(height, width), as tensors and micro-conditioning want it."""
        return self.height, self.width

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Fit:
    """How one image is scaled to cover its bucket and cropped in the centre.

    Args:
        resized_hw: (height, width) after scaling; at least one side equals the bucket's.
        crop_top_left: (top, left) of the centre crop, in resized pixels.
        spare_hw: (height, width) left over; a random crop starts anywhere in 0..spare, inclusive.
        scale: resized over original; above 1 the image is enlarged.
        crop_fraction: share of the image's area that is lost, in [0, 1).
    """

    resized_hw: tuple[int, int]
    crop_top_left: tuple[int, int]
    spare_hw: tuple[int, int]
    scale: float
    crop_fraction: float


def default_multiple_px(resolution_px: int) -> int:
    """64, or less for tiny budgets: the largest of 64, 32, 16, 8 with 8 steps on a square side."""
    multiple = 64
    while multiple > 8 and multiple * 8 > resolution_px:
        multiple //= 2
    return multiple


def bucket_list(
    resolution_px: int = SDXL_RESOLUTION_PX,
    multiple_px: int | None = None,
    min_aspect: float = 0.0,
    max_aspect: float = float("inf"),
) -> tuple[Bucket, ...]:
    """All buckets of one pixel budget, from tallest to widest.

    Sides are multiples of `multiple_px` from half to twice `resolution_px`; the area lies between
    231/256 of the budget and the budget. For 1024 px these are SDXL's 41 sizes.

    Args:
        resolution_px: side of the square that has the budget's area.
        multiple_px: 64 for Stable Diffusion, 16 for packed latents; None asks
            `default_multiple_px`.
        min_aspect: smallest width over height, inclusive.
        max_aspect: largest width over height, inclusive.

    Raises:
        UserError: no size fits.
    Source: arXiv:2307.01952, appendix I (whose list leaves out 1344 x 704).
    """
    multiple = default_multiple_px(resolution_px) if multiple_px is None else multiple_px
    if resolution_px < 1 or multiple < 1:
        raise UserError(
            f"buckets need a resolution and a multiple of at least 1 px; "
            f"found {resolution_px} and {multiple}"
        )
    budget = resolution_px**2
    first = -(-resolution_px // (2 * multiple)) or 1
    sides = range(first * multiple, 2 * resolution_px + 1, multiple)
    buckets = [
        Bucket(width, height)
        for width in sides
        for height in sides
        if LOW_AREA * budget <= width * height <= budget
        and min_aspect <= width / height <= max_aspect
    ]
    if not buckets:
        raise UserError(
            f"no bucket has {resolution_px} x {resolution_px} px of area, sides that are "
            f"multiples of {multiple} and an aspect from {min_aspect:g} to {max_aspect:g}",
            "Widen the aspect range, or take a smaller multiple or a larger resolution.",
        )
    return tuple(sorted(buckets, key=lambda bucket: (bucket.aspect, -bucket.area, bucket.width)))


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket with the least difference of log aspect; ties to larger area, then smaller width.

    Args:
        width: upright pixels of the image.
        height: upright pixels of the image.
        buckets: not empty.

    Raises:
        DataError: the image has no area.
    """
    return buckets[_nearest_exactly(width, height, buckets)]


def nearest_indices(
    widths: Sequence[int] | np.ndarray,
    heights: Sequence[int] | np.ndarray,
    buckets: Sequence[Bucket],
) -> np.ndarray:
    """`nearest_bucket` for many images at once.

    Returns:
        (n,) int64, indices into `buckets`.

    Raises:
        DataError: an image has no area.
    """
    w, h = checked_sides(widths, heights)
    # Of buckets with one aspect the first rule of a tie decides, whatever the image.
    first: dict[Fraction, int] = {}
    for index in sorted(range(len(buckets)), key=lambda i: (-buckets[i].area, buckets[i].width)):
        first.setdefault(Fraction(buckets[index].width, buckets[index].height), index)
    by_aspect = np.array([first[aspect] for aspect in sorted(first)])
    logs = np.array([np.log(buckets[i].width) - np.log(buckets[i].height) for i in by_aspect])
    edges = (logs[1:] + logs[:-1]) / 2  # half-way between neighbours
    chosen = np.empty(len(w), np.int64)
    for start in range(0, len(w), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        aspects = np.log(w[rows]) - np.log(h[rows])
        at = np.searchsorted(edges, aspects)
        chosen[rows] = by_aspect[at]
        around = np.concatenate([[-np.inf], edges, [np.inf]])
        is_close = np.minimum(aspects - around[at], around[at + 1] - aspects) <= _TIE
        for row in np.flatnonzero(is_close) + start:
            chosen[row] = _nearest_exactly(int(w[row]), int(h[row]), buckets)
    return chosen


def fit(width: int, height: int, bucket: Bucket) -> Fit:
    """Scale to cover: s = max(bw/w, bh/h), sides floor(x*s + 1/2), then crop the centre.

    Integer arithmetic throughout, so the side that decides the scale comes out exact.

    Raises:
        DataError: the image has no area.
    """
    _check(width, height)
    by_width, by_height = bucket.width * height, bucket.height * width
    if by_width >= by_height:  # the width decides
        resized_width, resized_height = bucket.width, _half_up(by_width, width)
    else:
        resized_width, resized_height = _half_up(by_height, height), bucket.height
    spare = resized_height - bucket.height, resized_width - bucket.width
    return Fit(
        resized_hw=(resized_height, resized_width),
        crop_top_left=(spare[0] // 2, spare[1] // 2),
        spare_hw=spare,
        scale=max(bucket.width / width, bucket.height / height),
        crop_fraction=1 - min(by_width, by_height) / max(by_width, by_height),
    )


def _nearest_exactly(width: int, height: int, buckets: Sequence[Bucket]) -> int:
    _check(width, height)

    def distance(index: int) -> tuple[Fraction, int, int]:
        bucket = buckets[index]
        across, down = width * bucket.height, height * bucket.width
        # |log a - log b| orders like max(a, b) / min(a, b), which is exact.
        return Fraction(max(across, down), min(across, down)), -bucket.area, bucket.width

    return min(range(len(buckets)), key=distance)


def _half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def _check(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise DataError(f"an image of {width} x {height} px has no bucket; both must be >= 1")


def checked_sides(widths: Any, heights: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as int64 arrays.

    Raises:
        DataError: an image has no area.
    """
    w, h = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
    for row in np.flatnonzero((w < 1) | (h < 1))[:1]:
        _check(int(w[row]), int(h[row]))
    return w, h
