"""Bucket geometry against the published list, exact fractions and the numbers of the sheet."""

from __future__ import annotations

import csv
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdprep.bucket_table import bucket_table
from sdprep.buckets import (
    Bucket,
    bucket_list,
    default_multiple_px,
    fit,
    nearest_bucket,
    nearest_indices,
)
from sdprep.errors import DataError, UserError

SDXL = bucket_list()
SIDES = st.integers(1, 20_000)

# (height, width) of the paper's appendix, upper half and the square; the lower half mirrors it,
# without width 1344 x height 704.
PAPER_HW = """512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536
704x1472 704x1408 768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024
1024x1024"""


def test_the_sdxl_list_is_the_papers_with_one_more() -> None:
    upper = {tuple(map(int, size.split("x"))) for size in PAPER_HW.split()}
    both = upper | {(width, height) for height, width in upper}
    ours = {bucket.size_hw for bucket in SDXL}
    assert len(SDXL) == len(ours) == 41
    assert both < ours
    assert ours - both == {(704, 1344), (1344, 704)}


@pytest.mark.parametrize(
    ("low", "high", "count"), [(1 / 3, 3, 31), (0.333, 3, 31), (0.5, 3, 26), (0, 9, 41)]
)
def test_aspect_ranges(low: float, high: float, count: int) -> None:
    assert len(bucket_list(min_aspect=low, max_aspect=high)) == count


@pytest.mark.parametrize("resolution", [8, 16, 32, 64, 128, 256, 384, 512, 640, 768, 1000, 1536])
def test_other_budgets_scale_the_same_rule(resolution: int) -> None:
    buckets = bucket_list(resolution)
    multiple = default_multiple_px(resolution)
    for bucket in buckets:
        assert bucket.width % multiple == bucket.height % multiple == 0
        assert resolution / 2 <= bucket.width <= 2 * resolution
        assert resolution / 2 <= bucket.height <= 2 * resolution
        assert Fraction(231, 256) <= Fraction(bucket.area, resolution**2) <= 1
    assert {(b.height, b.width) for b in buckets} == {(b.width, b.height) for b in buckets}


def test_a_scaled_multiple_gives_the_scaled_list() -> None:
    assert bucket_list(64, 4) == tuple(Bucket(b.width // 16, b.height // 16) for b in SDXL)


def test_tiny_budgets_have_useful_lists() -> None:
    assert [str(bucket) for bucket in bucket_list(64, 16)] == [
        "32x128", "48x80", "64x64", "80x48", "128x32",
    ]  # fmt: skip
    assert len(bucket_list(64)) == 11
    assert [default_multiple_px(side) for side in (1024, 512, 256, 64, 8)] == [64, 64, 32, 8, 8]


def test_an_empty_list_is_an_error_that_names_its_limits() -> None:
    with pytest.raises(UserError, match=r"64 x 64 px.*multiples of 48"):
        bucket_list(64, 48)
    with pytest.raises(UserError, match="aspect from 5 to 6"):
        bucket_list(min_aspect=5, max_aspect=6)
    with pytest.raises(UserError, match="at least 1 px"):
        bucket_list(1024, 0)


def test_nearest_breaks_ties_by_area_then_width() -> None:
    same_aspect = (Bucket(512, 512), Bucket(1024, 1024), Bucket(768, 768))
    assert nearest_bucket(7, 7, same_aspect) == Bucket(1024, 1024)
    mirrored = (Bucket(1088, 960), Bucket(960, 1088))
    assert nearest_bucket(500, 500, mirrored) == Bucket(960, 1088)
    assert list(nearest_indices([500], [500], mirrored)) == [1]


def test_nearest_of_sizes_that_are_buckets_is_themselves() -> None:
    for bucket in SDXL:
        assert nearest_bucket(bucket.width * 3, bucket.height * 3, SDXL) == bucket


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=8), st.integers(3, 90))
def test_many_at_once_equals_one_by_one(sizes: list[tuple[int, int]], units: int) -> None:
    buckets = bucket_list(8 * units, 8)
    widths, heights = zip(*sizes, strict=True)
    chosen = [buckets[index] for index in nearest_indices(widths, heights, buckets)]
    assert chosen == [nearest_bucket(w, h, buckets) for w, h in sizes]


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, st.sampled_from(SDXL))
def test_cover_resize_covers_with_one_side_exact(width: int, height: int, bucket: Bucket) -> None:
    placed = fit(width, height, bucket)
    scale = max(Fraction(bucket.width, width), Fraction(bucket.height, height))
    expected_hw = tuple(int(side * scale + Fraction(1, 2)) for side in (height, width))
    assert placed.resized_hw == expected_hw
    assert min(placed.spare_hw) == 0
    assert placed.resized_hw[0] >= bucket.height
    assert placed.resized_hw[1] >= bucket.width
    assert placed.scale == pytest.approx(float(scale))
    shown = Fraction(bucket.area) / (width * height * scale * scale)
    assert placed.crop_fraction == pytest.approx(float(1 - shown), abs=1e-12)


def test_a_half_pixel_rounds_up() -> None:
    assert fit(200, 301, Bucket(100, 100)).resized_hw == (151, 100)  # 150.5
    assert fit(1200, 800, Bucket(1216, 832)).crop_top_left == (0, 16)


def test_crop_loss_over_log_uniform_aspects() -> None:
    aspects = np.exp(np.linspace(-np.log(3), np.log(3), 20_001))
    widths, heights = np.round(20_000 * aspects).astype(int), np.full(20_001, 20_000)
    table = bucket_table(widths, heights, SDXL)
    # 2.19 % is the sheet's figure, from random draws; the integral is 2.205 %.
    assert table.mean_crop_percent == pytest.approx(2.19, abs=0.02)
    assert table.max_crop_percent == pytest.approx(6.97, abs=0.01)
    assert len(table.rows) == 31
    assert table.upscaled == 0


def test_the_table_counts_crops_upscales_and_warns_of_singletons() -> None:
    table = bucket_table([1024, 2048, 500, 1216], [1024, 2048, 500, 832], SDXL)
    square, wide = table.rows
    assert (square.bucket, square.count, square.upscaled) == (Bucket(1024, 1024), 3, 1)
    assert (wide.count, wide.upscaled, wide.max_crop_percent) == (1, 0, 0.0)
    assert (table.count, table.upscaled) == (4, 1)
    assert len(table.warnings) == 1
    assert "1216x832" in table.warnings[0]
    assert table.to_json()["total"]["count"] == 4


def test_boxes_that_the_centre_crop_cuts_are_counted() -> None:
    # One square bucket: 50 of 1100 px go on the left and on the right, 4.5 % each.
    buckets = (Bucket(1000, 1000),)
    boxes = np.array([[0, 0, 0.5, 0.5], [0.1, 0, 0.9, 1.0], [0.9, 0, 1, 0.1]], np.float32)
    table = bucket_table([1100, 900], [1000, 900], buckets, (np.array([0, 0, 0]), boxes))
    assert table.boxes_cut == 2
    assert bucket_table([1], [1], buckets).boxes_cut is None
    on_the_whole = bucket_table([900], [900], buckets, (np.array([0]), np.array([[0, 0, 1, 1]])))
    assert on_the_whole.boxes_cut == 0


def test_no_images_make_an_empty_table() -> None:
    table = bucket_table([], [], SDXL)
    assert (table.rows, table.count, table.mean_crop_percent, table.warnings) == ((), 0, 0.0, ())


def test_an_image_without_area_is_refused() -> None:
    for call in (
        lambda: nearest_bucket(0, 5, SDXL),
        lambda: nearest_indices([5, 0], [5, 5], SDXL),
        lambda: fit(5, -1, SDXL[0]),
    ):
        with pytest.raises(DataError, match="no bucket"):
            call()


def test_real_crops_take_the_bucket_of_their_aspect(shared_data: Callable[[str], Path]) -> None:
    with (shared_data("aspect") / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = [(int(row["width"]), int(row["height"])) for row in rows]
    assert len(sizes) == 35
    table = bucket_table(*zip(*sizes, strict=True), SDXL)
    assert table.count == 35
    assert table.max_crop_percent < 7.5
    assert table.upscaled == sum(w < _of(w, h).width or h < _of(w, h).height for w, h in sizes)


def _of(width: int, height: int) -> Bucket:
    return nearest_bucket(width, height, SDXL)
