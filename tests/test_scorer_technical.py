"""Technical scorer: every metric against plain loops, and along damages made from real photos."""

from __future__ import annotations

import csv
import io
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps

from sdprep.annotate import Sample
from sdprep.images import open_image
from sdprep.plugins import config_for
from sdprep.scorers import technical

SCORER = config_for("scorer", "technical")().build()


def measured(data: bytes) -> dict:
    opened = open_image(data)
    row = {"exif_orientation": opened.info.exif_orientation, "format": opened.info.format}
    batch = SCORER.annotate([Sample("id", row, opened.image, opened.alpha, data)])
    assert batch.schema == SCORER.columns
    assert batch.num_rows == 1
    return batch.to_pylist()[0]


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def crop(path: Path, size: tuple[int, int] = (90, 70)) -> Image.Image:
    with Image.open(path) as image:
        part = image.convert("RGB").crop((150, 100, 150 + size[0], 100 + size[1]))
    part.info = {}  # a colour profile would be applied to what is written below
    return part


# --- each formula, written again as plain loops --------------------------------------------------


def reference(image: Image.Image) -> dict[str, float]:
    luma = [[int(value) for value in row] for row in np.asarray(image.convert("L"))]
    height, width = len(luma), len(luma[0])
    flat = [value for row in luma for value in row]
    mean = sum(flat) / len(flat)
    laplacian, immerkaer = [], 0
    kernel = ((1, -2, 1), (-2, 4, -2), (1, -2, 1))
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            cross = luma[y - 1][x] + luma[y + 1][x] + luma[y][x - 1] + luma[y][x + 1]
            laplacian.append(cross - 4 * luma[y][x])
            around = ((dy, dx) for dy in range(3) for dx in range(3))
            immerkaer += abs(
                sum(kernel[dy][dx] * luma[y + dy - 1][x + dx - 1] for dy, dx in around)
            )
    shares = [flat.count(level) / len(flat) for level in set(flat)]
    return {
        "sharpness": float(np.var(laplacian)),
        "noise": math.sqrt(math.pi / 2) * immerkaer / (6 * (width - 2) * (height - 2)),
        "brightness": mean / 255,
        "contrast": math.sqrt(sum((value - mean) ** 2 for value in flat) / len(flat)) / 255,
        "dark": sum(value <= 5 for value in flat) / len(flat),
        "bright": sum(value >= 250 for value in flat) / len(flat),
        "entropy": -sum(share * math.log2(share) for share in shares),
        "colourfulness": reference_colourfulness(image),
        "blockiness": reference_blockiness(luma),
    }


def reference_colourfulness(image: Image.Image) -> float:
    red, green, blue = np.moveaxis(np.asarray(image, dtype=np.float64), 2, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    return math.hypot(rg.std(), yb.std()) + 0.3 * math.hypot(rg.mean(), yb.mean())


def reference_blockiness(luma: list[list[int]]) -> float:
    on, off = [], []
    for y, row in enumerate(luma):
        for x, value in enumerate(row):
            if x:
                (off if x % 8 else on).append(abs(value - row[x - 1]))
            if y:
                (off if y % 8 else on).append(abs(value - luma[y - 1][x]))
    return (sum(on) / len(on)) / (sum(off) / len(off))


@pytest.mark.parametrize("name", ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"])
def test_formulas_agree_with_plain_loops(shared_data, name):
    image = crop(shared_data("skimage") / name)
    found = measured(encoded(image))
    for metric, expected in reference(image).items():
        assert found[metric] == pytest.approx(expected, rel=1e-5, abs=1e-6), metric
    assert found["reduce_factor"] == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 24), st.integers(9, 24), st.integers(0, 2**32))
def test_formulas_agree_on_any_pixels(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = measured(encoded(image))
    for metric, expected in reference(image).items():
        assert found[metric] == pytest.approx(expected, rel=1e-5, abs=1e-6), metric


@pytest.mark.parametrize(
    ("size", "factor"), [((1024, 40), 1), ((1025, 40), 2), ((40, 2049), 3), ((3000, 2000), 3)]
)
def test_luma_is_reduced_by_a_whole_factor(shared_data, size, factor):
    with Image.open(shared_data("skimage") / "coffee.png") as photo:
        image = photo.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    found = measured(encoded(image))
    assert found["reduce_factor"] == factor
    small = np.asarray(image.convert("L").reduce(factor), dtype=np.float64)
    assert found["brightness"] == pytest.approx(small.mean() / 255, rel=1e-5)
    inner = small[:-2, 1:-1] + small[2:, 1:-1] + small[1:-1, :-2] + small[1:-1, 2:]
    assert found["sharpness"] == pytest.approx((inner - 4 * small[1:-1, 1:-1]).var(), rel=1e-5)


def test_detail_is_the_mean_over_four_octaves(shared_data):
    image = crop(shared_data("skimage") / "chelsea.png").convert("L")
    values = []
    for step in (1, 2, 4, 8):
        y = np.asarray(image.reduce(step), dtype=np.float64)
        lap = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]
        values.append(math.log2(1 + lap.var()))
    assert technical.detail(image) == pytest.approx(sum(values) / 4, rel=1e-9)


# --- the JPEG grid, and what the file says -------------------------------------------------------


def test_blockiness_looks_at_the_centred_crop_on_the_grid():
    pixels = np.zeros((1600, 1300), dtype=np.uint8)
    crop_top, crop_left = (1600 - 1024) // 2 // 8 * 8, (1300 - 1024) // 2 // 8 * 8
    inside = (slice(crop_top, crop_top + 1024), slice(crop_left, crop_left + 1024))
    pixels[inside] = np.random.default_rng(1).integers(0, 256, (1024, 1024), dtype=np.uint8)
    expected = technical.blockiness(pixels[inside].copy())
    assert technical.blockiness(pixels) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(100, 75), (1163, 1050)])
def test_blockiness_is_that_of_the_stored_grid(shared_data, orientation, size):
    with Image.open(shared_data("skimage") / "coffee.png") as photo:
        stored = photo.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = encoded(stored, "JPEG", quality=12)
    turned = encoded(stored, "JPEG", quality=12, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(turned)))
    assert (upright.size != stored.size) == (orientation >= 5)
    assert measured(turned)["blockiness"] == measured(plain)["blockiness"] > 1.5


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_quality_is_exact_for_standard_tables(shared_data, mode):
    image = crop(shared_data("skimage") / "astronaut.png", (16, 16)).convert(mode)
    qualities = range(1, 101)
    files = [encoded(image, "JPEG", quality=quality) for quality in qualities]
    assert [technical.jpeg_quality(data) for data in files] == list(qualities)


def test_jpeg_quality_of_other_tables_is_the_nearest():
    image = Image.new("RGB", (16, 16), (200, 30, 90))
    with Image.open(io.BytesIO(encoded(image, "JPEG", quality=71))) as standard:
        tables = [list(standard.quantization[0]), list(standard.quantization[1])]
    tables[0][5] += 1
    tables[0][60] -= 1
    assert technical.jpeg_quality(encoded(image, "JPEG", qtables=tables)) == 71
    flat = encoded(image, "JPEG", qtables=[[7] * 64, [7] * 64])
    assert 1 <= technical.jpeg_quality(flat) <= 100


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_other_formats_have_no_jpeg_quality(kind):
    found = measured(encoded(Image.new("RGB", (64, 48), (90, 120, 30)), kind))
    assert found["jpeg_quality"] is None
    assert found["score"] is not None


def test_bits_per_pixel_counts_the_file():
    data = encoded(Image.new("RGB", (64, 48), (90, 120, 30)), "BMP")
    assert measured(data)["bits_per_pixel"] == pytest.approx(8 * len(data) / (64 * 48))


# --- borders -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bars", "expected"),
    [
        ((0, 0, 0, 0), 0.0),
        ((0, 12, 0, 12), 24 / 94),
        ((10, 0, 20, 0), 30 / 100),
        ((5, 10, 5, 10), 1 - 70 * 70 / (80 * 90)),
        ((0, 0, 0, 30), 30 / 100),
    ],
)
@pytest.mark.parametrize("colour", [(0, 0, 0), (250, 251, 249), (180, 20, 20)])
def test_border_fraction_is_the_share_of_uniform_lines(shared_data, bars, expected, colour):
    left, top, right, bottom = bars
    photo = crop(shared_data("skimage") / "astronaut.png", (70, 70))
    image = Image.new("RGB", (70 + left + right, 70 + top + bottom), colour)
    image.paste(photo, (left, top))
    assert measured(encoded(image))["border_fraction"] == pytest.approx(expected, abs=1e-6)
    if max(bars) >= 10:  # a bar of a JPEG rings a little where it meets the picture
        assert measured(encoded(image, "JPEG", quality=90))["border_fraction"] > 0.6 * expected


def test_a_smooth_slope_is_no_border():
    slope = np.repeat(np.arange(200, dtype=np.uint8)[:, None], 100, axis=1)
    assert technical.border_fraction(slope) == pytest.approx(2 * 13 / 200)


# --- degenerate pictures -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(1, 1), (2, 2), (1, 500), (500, 1), (2, 9), (3, 3), (8, 8), (9, 9)]
)
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (17, 200, 3)])
def test_tiny_and_flat_pictures_get_finite_values(size, colour):
    for data in (
        encoded(Image.new("RGB", size, colour)),
        encoded(Image.new("L", size, colour[0]), "JPEG"),
    ):
        found = measured(data)
        for name, value in found.items():
            assert value is None or math.isfinite(value), name
        assert (found["sharpness"] is None) == (found["noise"] is None) == (min(size) < 3)
        assert found["detail"] is None if min(size) < 3 else found["detail"] == 0
        assert (found["blockiness"] is None) == (max(size) <= 8)
        assert found["blockiness"] in (None, 1.0)
        assert found["entropy"] == 0
        assert found["border_fraction"] == 1
        assert 0 <= found["score"] < 2  # a flat picture teaches nothing


def test_flat_blocks_give_a_finite_large_blockiness():
    blocks = np.random.default_rng(0).integers(0, 256, (12, 12), dtype=np.uint8)
    value = technical.blockiness(blocks.repeat(8, axis=0).repeat(8, axis=1))
    assert math.isfinite(value)
    assert value > 1000


def test_every_sample_file_is_measured(shared_data):
    num_measured = 0
    for path in sorted(shared_data("formats").iterdir()):
        if path.suffix in (".md", ".csv"):
            continue
        opened = open_image(path, first_frame=True)
        row = {"exif_orientation": opened.info.exif_orientation}
        batch = SCORER.annotate([Sample("x", row, opened.image, None, path.read_bytes())])
        for name, value in batch.to_pylist()[0].items():
            assert value is None or math.isfinite(value), (path.name, name)
        num_measured += 1
    assert num_measured >= 50


def test_a_value_never_depends_on_its_batch(shared_data):
    files = [shared_data("skimage") / name for name in ("coffee.png", "rocket.jpg", "text.png")]
    samples = []
    for path in files:
        opened = open_image(path)
        samples.append(Sample(path.name, {}, opened.image, None, path.read_bytes()))
    together = SCORER.annotate(samples).to_pylist()
    assert together == [SCORER.annotate([sample]).to_pylist()[0] for sample in samples]
    assert SCORER.annotate(samples[::-1]).to_pylist() == together[::-1]
    assert SCORER.annotate([]).num_rows == 0


# --- damages -------------------------------------------------------------------------------------

NAMING = {  # damage: metrics that name it, with the direction in which they go
    "gaussian_blur_sigma": [("sharpness", -1), ("detail", -1)],
    "jpeg_quality": [("jpeg_quality", -1), ("blockiness", 1)],
    "gaussian_noise_sigma": [("noise", 1)],
    "downscale_factor": [("detail", -1)],
    "underexposed_gain": [("brightness", -1)],
}


def assert_monotone(rungs: list[dict], kind: str, where: str) -> None:
    for metric, direction in NAMING[kind]:
        values = [rung[metric] for rung in rungs if rung[metric] is not None]
        steps = [direction * (after - before) for before, after in zip(values, values[1:])]  # noqa: B905
        assert len(steps) >= 3
        assert min(steps) > 0, (where, kind, metric, values)


def test_shipped_ladders_are_followed(shared_data):
    folder = shared_data("quality_ladder")
    rows = list(csv.DictReader((folder / "ladder.csv").open(encoding="utf-8")))
    ladders: dict[tuple[str, str], list[dict]] = {}
    clean = {}
    for row in sorted(rows, key=lambda row: int(row["rank_within_kind"])):
        found = measured((folder / row["file"]).read_bytes())
        if row["kind"] == "none":
            clean[row["base"]] = found
        else:
            ladders.setdefault((row["base"], row["kind"]), []).append(found)
    assert len(ladders) == 10
    for (base, kind), rungs in ladders.items():
        assert len(rungs) == 4
        assert_monotone([clean[base], *rungs], kind, base)
        if kind != "gaussian_noise_sigma":
            assert rungs[-1]["score"] < 2
        assert rungs[-1]["score"] < clean[base]["score"] / 3
    assert all(found["score"] > 5 for found in clean.values())


def damaged(photo: Image.Image, kind: str) -> list[bytes]:
    """The photo and four rungs of growing damage, made as the shipped ladders were."""
    pixels = np.asarray(photo, dtype=np.float64)
    rng = np.random.default_rng(0)

    def redrawn(values: np.ndarray) -> Image.Image:
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))

    def enlarged(factor: int) -> Image.Image:
        size = (max(1, photo.width // factor), max(1, photo.height // factor))
        return photo.resize(size, Image.Resampling.BICUBIC).resize(
            photo.size, Image.Resampling.BICUBIC
        )

    if kind == "jpeg_quality":
        return [encoded(photo, "JPEG", quality=quality) for quality in (95, 60, 30, 12, 4)]
    rungs = {
        "gaussian_blur_sigma": lambda: [
            photo.filter(ImageFilter.GaussianBlur(sigma)) for sigma in (0.7, 1.5, 3, 6)
        ],
        "gaussian_noise_sigma": lambda: [
            redrawn(pixels + rng.normal(0, sigma, pixels.shape)) for sigma in (6, 14, 28, 55)
        ],
        "downscale_factor": lambda: [enlarged(factor) for factor in (2, 4, 8, 16)],
        "underexposed_gain": lambda: [redrawn(pixels * gain) for gain in (0.6, 0.35, 0.15, 0.05)],
    }[kind]()
    return [encoded(rung, "JPEG", quality=95, subsampling=0) for rung in [photo, *rungs]]


@pytest.mark.parametrize("kind", sorted(NAMING))
def test_ladders_of_other_photos_are_followed(shared_data, kind):
    paths = sorted(shared_data("skimage").glob("*.png")) + sorted(
        shared_data("dreambooth").glob("*/03.jpg")
    )
    assert len(paths) >= 25
    for path in paths:
        with Image.open(path) as image:
            photo = image.convert("RGB")
        photo.thumbnail((256, 256), Image.Resampling.LANCZOS)
        assert_monotone([measured(data) for data in damaged(photo, kind)], kind, path.name)


def test_good_photos_pass_and_ruined_ones_do_not(shared_data):
    paths = sorted(shared_data("dreambooth").glob("*/*.jpg"))
    assert len(paths) >= 72
    for path in random.Random(0).sample(paths, 24):
        assert measured(path.read_bytes())["score"] >= 2, path
    for path in sorted(shared_data("skimage").glob("*.[pj][np]g")):
        assert measured(path.read_bytes())["score"] >= 2, path


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("sharpness", (1, 5, 30, 200, 3000)),
        ("noise", (30, 20, 10, 2, 0)),
        ("brightness", (0, 0.02, 0.1, 0.3, 0.6)),
        ("contrast", (0, 0.01, 0.05, 0.2)),
        ("border_fraction", (1, 0.7, 0.3, 0)),
        ("jpeg_quality", (1, 10, 40, 75, 90)),
        ("blockiness", (30, 5, 2, 1.2, 1)),
    ],
)
def test_quality_rises_as_each_metric_betters(metric, values):
    fine = {"sharpness": 600.0, "noise": 1.0, "brightness": 0.5, "contrast": 0.2}
    fine |= {"blockiness": 1.0, "jpeg_quality": 95, "border_fraction": 0.0}
    if metric == "noise":  # white noise: the Laplacian holds little else
        rows = [fine | {"noise": value, "sharpness": 200 + 20 * value**2} for value in values]
    else:
        rows = [fine | {metric: value} for value in values]
    shares = [technical.quality(row) for row in rows]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1


def test_score_is_not_sharpness_in_disguise(shared_data):
    with Image.open(shared_data("skimage") / "astronaut.png") as image:
        photo = image.convert("RGB").resize((256, 256), Image.Resampling.LANCZOS)
    clean, *_, noisy = (measured(data) for data in damaged(photo, "gaussian_noise_sigma"))
    assert noisy["sharpness"] > 5 * clean["sharpness"]
    assert noisy["score"] < clean["score"] / 3
    assert clean["score_raw"] == pytest.approx(math.log2(clean["score"] / 9), abs=1e-4)
