"""Boxes as areas: how much of an image they cover, and the loss mask of one training view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdprep.errors import DataError

_CORNERS = ("x0", "y0", "x1", "y1")


def corners(boxes: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Corners of boxes as they stand in a column of `schema.BOX`.

    Returns:
        (m, 4) float64: x0, y0, x1, y1 as fractions of the upright original.
    """
    rows = [[box[name] for name in _CORNERS] for box in boxes]
    return np.array(rows, np.float64).reshape(-1, 4)


def coverage(boxes: np.ndarray) -> float:
    """Area of the union of some boxes, as a share of the image, 0..1.

    Args:
        boxes: (m, 4) x0, y0, x1, y1 as fractions of the image.

    Raises:
        DataError: see `boxes_to_mask`.
    """
    return 1.0 - float(boxes_to_mask(boxes, (1, 1), (0, 0), (1, 1), (1, 1))[0, 0])


def boxes_to_mask(
    boxes: np.ndarray | Sequence[Sequence[float]],
    resized_hw: tuple[int, int],
    crop_top_left: tuple[int, int],
    target_size_hw: tuple[int, int],
    grid_hw: tuple[int, int],
    *,
    is_flipped: bool = False,
) -> np.ndarray:
    """The share of each cell of a grid that no box covers, after the resize and crop of the pixels.

    The picture is scaled to `resized_hw` (`buckets.fit`), mirrored if asked for, and cropped. The
    grid lies over the crop. Boxes that overlap cover what they share once.

    Args:
        boxes: (m, 4) x0, y0, x1, y1 as fractions of the upright original; beyond 0..1 is cut off.
        resized_hw: picture scaled to cover the bucket, px.
        crop_top_left: corner of the crop in that picture, px; where it is mirrored, in the mirrored
            one, as `MicroConditioning` has it.
        target_size_hw: size of the crop, px.
        grid_hw: cells, such as latents.
        is_flipped: whether the picture was mirrored left to right.

    Returns:
        grid_hw float64 in 0..1: exactly 0 inside a box, exactly 1 where none reaches.

    Raises:
        DataError: a box is not four finite numbers with x0 <= x1 and y0 <= y1.
    """
    fractions = _checked(boxes)
    if is_flipped:
        fractions = np.stack(
            [1 - fractions[:, 2], fractions[:, 1], 1 - fractions[:, 0], fractions[:, 3]], axis=1
        )
    spans = [
        _in_cells(fractions[:, [axis, axis + 2]], resized, start, target, cells)
        for axis, resized, start, target, cells in (
            (0, resized_hw[1], crop_top_left[1], target_size_hw[1], grid_hw[1]),
            (1, resized_hw[0], crop_top_left[0], target_size_hw[0], grid_hw[0]),
        )
    ]
    return _uncovered(spans[0], spans[1], grid_hw)


def _checked(boxes: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    """Boxes as (m, 4) float64, cut to the image."""
    array = np.asarray(boxes, np.float64)
    array = array.reshape(0, 4) if array.size == 0 else array
    if array.ndim != 2 or array.shape[1] != 4:
        raise DataError(f"boxes have the shape {array.shape}; expected (number, 4)")
    is_bad = ~np.isfinite(array).all(1) | (array[:, 0] > array[:, 2]) | (array[:, 1] > array[:, 3])
    for index in np.flatnonzero(is_bad)[:1]:
        raise DataError(
            f"box {index} is {array[index].tolist()}; expected finite x0 <= x1 and y0 <= y1",
            "Boxes are x0, y0, x1, y1 as fractions of the image, origin top left.",
        )
    return array.clip(0.0, 1.0)


def _in_cells(
    fractions: np.ndarray, resized_px: int, start_px: int, target_px: int, cells: int
) -> np.ndarray:
    """(m, 2) ends along one axis, in cells from the edge of the crop, cut to it."""
    return ((fractions * resized_px - start_px) * (cells / target_px)).clip(0, cells)


def _uncovered(x: np.ndarray, y: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
    """Cut the grid along every edge of a box; each piece is then covered whole or not at all.

    Args:
        x: (m, 2) left and right ends, in cells.
        y: (m, 2) top and bottom ends, in cells.
    """
    height, width = grid_hw
    xs = np.unique(np.concatenate([np.arange(width + 1.0), x.ravel()]))
    ys = np.unique(np.concatenate([np.arange(height + 1.0), y.ravel()]))
    is_covered = np.zeros((len(ys) - 1, len(xs) - 1), bool)
    columns, rows = np.searchsorted(xs, x), np.searchsorted(ys, y)
    for (left, right), (top, bottom) in zip(columns, rows, strict=True):
        is_covered[top:bottom, left:right] = True
    area = np.diff(ys)[:, None] * np.diff(xs)[None, :]
    first_row = np.searchsorted(ys, np.arange(height))
    first_column = np.searchsorted(xs, np.arange(width))

    def by_cell(pieces: np.ndarray) -> np.ndarray:
        return np.add.reduceat(np.add.reduceat(pieces, first_row, 0), first_column, 1)

    is_reached = by_cell(is_covered.astype(np.int64)) > 0
    # Pieces of a cell that no box reaches may add up to a hair beside 1.
    return np.where(is_reached, by_cell(np.where(is_covered, 0.0, area)).clip(0, 1), 1.0)
