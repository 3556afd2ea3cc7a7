"""Loss masks: exact areas by another method, and the very crop that the pixels get."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from sdprep.buckets import Bucket, fit
from sdprep.errors import DataError
from sdprep.masks import boxes_to_mask, corners, coverage
from sdtrain.pixels import evaluation_view, training_view

WHOLE = {"resized_hw": (64, 96), "crop_top_left": (0, 0), "target_size_hw": (64, 96)}

edge = st.floats(0, 1, width=32)
box = st.tuples(edge, edge, edge, edge).map(
    lambda c: [min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3])]
)


def exact_union(boxes: list[list[float]], window: list[Fraction]) -> Fraction:
    """Area of a union inside a window, by inclusion and exclusion in fractions."""
    total = Fraction(0)
    for count in range(1, len(boxes) + 1):
        for chosen in combinations(boxes, count):
            parts = [[Fraction(value) for value in part] for part in chosen] + [window]
            width = min(part[2] for part in parts) - max(part[0] for part in parts)
            height = min(part[3] for part in parts) - max(part[1] for part in parts)
            if width > 0 and height > 0:
                total += (-1) ** (count + 1) * width * height
    return total


@settings(max_examples=120, deadline=None)
@given(
    boxes=st.lists(box, max_size=5),
    size=st.tuples(st.integers(20, 5000), st.integers(20, 5000)),
    bucket=st.sampled_from([Bucket(64, 64), Bucket(128, 64), Bucket(64, 192), Bucket(832, 1216)]),
    is_flipped=st.booleans(),
)
def test_covered_area_is_that_of_exact_geometry(boxes, size, bucket, is_flipped):
    placed = fit(*size, bucket)
    (height, width), (top, left) = placed.resized_hw, placed.crop_top_left
    grid = bucket.height // 8, bucket.width // 8
    mask = boxes_to_mask(
        boxes, placed.resized_hw, (top, left), bucket.size_hw, grid, is_flipped=is_flipped
    )
    assert mask.shape == grid
    assert mask.min() >= 0
    assert mask.max() <= 1
    edges = [left, top, left + bucket.width, top + bucket.height]
    if is_flipped:
        edges[0], edges[2] = width - edges[2], width - edges[0]
    window = [Fraction(at, side) for at, side in zip(edges, [width, height] * 2, strict=True)]
    in_cells = exact_union(boxes, window) * width * height / 64
    assert abs((1 - mask).sum() - float(in_cells)) <= 1e-6


@settings(max_examples=40, deadline=None)
@given(boxes=st.lists(box, max_size=4), row=st.integers(0, 2), column=st.integers(0, 4))
def test_each_cell_holds_its_own_share(boxes, row, column):
    mask = boxes_to_mask(boxes, grid_hw=(3, 5), **WHOLE)
    window = [Fraction(column, 5), Fraction(row, 3), Fraction(column + 1, 5), Fraction(row + 1, 3)]
    assert abs(mask[row, column] - float(1 - exact_union(boxes, window) * 15)) <= 1e-6


@settings(max_examples=60, deadline=None)
@given(st.lists(box, max_size=5))
def test_coverage_is_the_union(boxes):
    whole = [Fraction(0), Fraction(0), Fraction(1), Fraction(1)]
    assert abs(coverage(np.array(boxes)) - float(exact_union(boxes, whole))) <= 1e-9


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (256, 256)])
@pytest.mark.parametrize("flip_prob", [0.0, 1.0])
def test_a_mask_lies_where_the_pixels_lie(size, flip_prob):
    """A black box in a white picture, through the trainer's own crop, against its mask."""
    image = Image.new("RGB", size, "white")
    x0, y0, x1, y1 = 60, 70, 140, 150
    ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), fill="black")
    fractions = [[x0 / size[0], y0 / size[1], x1 / size[0], y1 / size[1]]]
    bucket = Bucket(128, 192) if size[0] < size[1] else Bucket(160, 128)
    views = [training_view(image, bucket, (1, "a", visit), flip_prob) for visit in range(4)]
    views += [evaluation_view(image, bucket)] if not flip_prob else []
    for pixels, micro in views:
        mask = boxes_to_mask(
            fractions,
            fit(*size, bucket).resized_hw,
            micro.crop_top_left,
            micro.target_size_hw,
            (bucket.height // 8, bucket.width // 8),
            is_flipped=bool(flip_prob),
        )
        seen = (pixels[0].numpy() + 1) / 2
        cells = seen.reshape(bucket.height // 8, 8, bucket.width // 8, 8).mean((1, 3))
        assert 0.05 < 1 - mask.mean() < 0.9
        assert np.abs(mask - cells).max() < 0.08


def test_nothing_covered_is_exactly_one_and_a_full_box_exactly_zero():
    assert (boxes_to_mask([], grid_hw=(8, 12), **WHOLE) == 1).all()
    full = [[0.0, 0.0, 1.0, 1.0], [0.1, 0.3, 0.7, 0.9]]
    assert (boxes_to_mask(full, grid_hw=(8, 12), **WHOLE) == 0).all()
    left = boxes_to_mask([[0.0, 0.0, 0.5, 1.0]], grid_hw=(8, 12), **WHOLE)
    assert (left[:, :6] == 0).all()
    assert (left[:, 6:] == 1).all()
    assert boxes_to_mask([[0.5, 0.5, 0.5, 0.9]], grid_hw=(2, 2), **WHOLE).min() == 1


def test_a_box_beyond_the_image_is_cut_off():
    mask = boxes_to_mask([[-3.0, -1.0, 0.25, 9.0]], grid_hw=(1, 4), **WHOLE)
    assert mask.tolist() == [[0, 1, 1, 1]]


def test_boxes_of_a_column_become_corners():
    boxes = [{"label": "text", "score": 0.5, "x0": 0.1, "y0": 0.2, "x1": 0.3, "y1": 0.4}]
    assert corners(boxes).tolist() == [[0.1, 0.2, 0.3, 0.4]]
    assert corners([]).shape == (0, 4)


@pytest.mark.parametrize(
    "broken",
    [[[0.5, 0, 0.2, 1]], [[0, 0.5, 1, 0.2]], [[0, 0, float("nan"), 1]], [[0, 0, float("inf"), 1]]],
)
def test_a_box_that_is_none_is_named(broken):
    with pytest.raises(DataError, match=r"box 1 is .*expected finite x0 <= x1"):
        boxes_to_mask([[0, 0, 1, 1], *broken], grid_hw=(2, 2), **WHOLE)
    with pytest.raises(DataError, match=r"shape \(1, 3\)"):
        boxes_to_mask([[0, 0, 1]], grid_hw=(2, 2), **WHOLE)
