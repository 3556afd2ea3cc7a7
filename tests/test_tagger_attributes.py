"""Attributes tagger: each rule at its edges, and colour against a plain recount."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdprep.annotate import Sample
from sdprep.images import open_image
from sdprep.plugins import config_for
from sdprep.size_tags import SIZE_TAGS, size_tags
from sdprep.taggers import attributes

TAGGER = config_for("tagger", "attributes")().build()
COLOURFUL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def tags_of(image: Image.Image = COLOURFUL, alpha: Image.Image | None = None, **row) -> set[str]:
    row = {"width": 800, "height": 800, "format": "JPEG", "mode": "RGB", "frames": 1} | row
    batch = TAGGER.annotate([Sample("id", {"exif_orientation": 1} | row, image, alpha)])
    assert batch.schema == TAGGER.columns
    (tags,) = batch.column("tags").to_pylist()
    assert all(tag["p"] == 1.0 and tag["category"] == "meta" for tag in tags)
    names = [tag["name"] for tag in tags]
    assert len(set(names)) == len(names)
    return set(names)


# --- size ----------------------------------------------------------------------------------------

HUGE = {"incredibly_absurdres", "absurdres", "highres"}


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (500, 500, {"lowres"}),
        (501, 500, set()),
        (500, 501, set()),
        (1, 1, {"lowres"}),
        (1599, 1199, set()),
        (1600, 800, {"highres"}),
        (800, 1200, {"highres"}),
        (3199, 2399, {"highres"}),
        (3200, 1000, {"highres", "absurdres"}),
        (1000, 2400, {"highres", "absurdres"}),
        (9999, 9999, {"highres", "absurdres"}),
        (10_000, 9000, HUGE),
        (9000, 10_000, HUGE),
        (1024, 256, {"wide_image"}),
        (1023, 255, set()),
        (1024, 257, set()),
        (256, 1024, {"tall_image"}),
        (257, 1024, set()),
        (255, 1023, set()),
        (10_000, 1, HUGE | {"wide_image"}),
    ],
)
def test_size_rules_at_their_edges(width, height, expected):
    assert tags_of(width=width, height=height) == expected
    assert set(size_tags(width, height)) == expected


def test_only_size_tags_are_recomputed():
    assert set(SIZE_TAGS) == HUGE | {"lowres"}


# --- file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format_name", "frames", "expected"),
    [
        ("GIF", 2, {"animated_gif"}),
        ("GIF", 1, set()),
        ("PNG", 2, {"animated_png"}),
        ("PNG", 1, set()),
        ("WEBP", 9, set()),
        ("TIFF", 3, set()),
        ("GIF", None, set()),
    ],
)
def test_animation_needs_two_frames(format_name, frames, expected):
    assert tags_of(format=format_name, frames=frames) == expected


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_exif_rotation_is_one_of_three_plain_rotations(orientation):
    expected = {"exif_rotation"} if orientation in (3, 6, 8) else set()
    assert tags_of(exif_orientation=orientation) == expected


# --- colour --------------------------------------------------------------------------------------

GREY = {"greyscale", "monochrome"}


def filled(size: tuple[int, int], *parts: tuple[int, tuple[int, int, int]]) -> Image.Image:
    """A picture of mid grey with so many pixels of each given colour."""
    pixels = np.full((size[1] * size[0], 3), 128, dtype=np.uint8)
    start = 0
    for count, colour in parts:
        pixels[start : start + count] = colour
        start += count
    return Image.fromarray(pixels.reshape(size[1], size[0], 3))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16", "I;16B", "I", "F"])
def test_a_file_of_one_channel_is_greyscale(mode):
    assert tags_of(mode=mode) == GREY  # whatever its pixels became through a profile


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "CMYK", None])
def test_other_files_are_judged_by_their_pixels(mode):
    assert tags_of(mode=mode) == set()
    assert tags_of(filled((100, 100)), mode=mode) == GREY


def test_greyscale_allows_a_thousandth_of_chroma_over_8():
    assert tags_of(filled((100, 100), (10, (200, 20, 20)), (4000, (128, 132, 136)))) == GREY
    two_hues = ((6, (200, 20, 20)), (5, (20, 20, 200)))
    assert tags_of(filled((100, 100), *two_hues)) == set()
    assert tags_of(filled((100, 100), (11, (137, 128, 128)))) == {"monochrome"}


def test_one_stray_pixel_in_a_large_picture_is_seen():
    pixels = np.full((3000, 2000, 3), 90, dtype=np.uint8)
    pixels[::30, ::30] = (90, 90, 120)  # 6,700 of 6 million are over a thousandth
    pixels[5, 7] = (200, 30, 30)
    assert "greyscale" not in tags_of(Image.fromarray(pixels))


def test_monochrome_wants_99_percent_within_30_degrees():
    red, blue = (200, 20, 20), (20, 20, 200)
    assert tags_of(filled((100, 100), (9900, red), (100, blue))) == {"monochrome"}
    assert tags_of(filled((100, 100), (9899, red), (101, blue))) == set()
    faint = (128, 136, 144)  # chroma 16 is too little to count
    assert tags_of(filled((100, 100), (3000, red), (6000, faint))) == {"monochrome"}
    assert tags_of(filled((100, 100), (30, red), (1, blue), (6000, faint))) == set()


def test_an_arc_may_cross_red():
    purple_red, orange_red = (200, 20, 50), (200, 50, 20)  # 350 and 10 degrees
    assert tags_of(filled((100, 100), (4000, purple_red), (4000, orange_red))) == {"monochrome"}


def test_arc_is_30_degrees_both_ends_included():
    red, at_30 = (220, 20, 20), (220, 120, 20)
    assert tags_of(filled((100, 100), (4000, red), (4000, at_30))) == {"monochrome"}
    assert tags_of(filled((100, 100), (4000, red), (4000, (220, 121, 20)))) == set()


def test_a_tint_without_chroma_is_monochrome_only():
    assert tags_of(filled((100, 100), (10_000, (128, 120, 116)))) == {"monochrome"}


def test_fine_patterns_in_large_pictures_are_not_averaged():
    pixels = np.zeros((2048, 2048, 3), dtype=np.uint8)
    pixels[...] = (200, 20, 20)
    pixels[1::2, 1::2] = (20, 200, 20)  # a thin sample sees red alone
    assert tags_of(Image.fromarray(pixels)) == set()
    pixels[1::2, 1::2] = (200, 40, 20)
    assert tags_of(Image.fromarray(pixels)) == {"monochrome"}


def plain_colour_tags(image: Image.Image) -> set[str]:
    pixels = [tuple(int(v) for v in pixel) for pixel in np.asarray(image).reshape(-1, 3)]
    if 1000 * sum(max(p) - min(p) > 8 for p in pixels) <= len(pixels):
        return GREY
    hues = [360 * colorsys.rgb_to_hsv(*p)[0] for p in pixels if max(p) - min(p) > 16]
    best = max((sum((hue - start) % 360 <= 30.005 for hue in hues) for start in hues), default=0)
    return {"monochrome"} if 100 * best >= 99 * len(hues) else set()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 300), st.floats(0, 1), st.integers(0, 4))
def test_colour_tags_agree_with_a_plain_recount(seed, spread, saturation, strays):
    rng = np.random.default_rng(seed)
    base = rng.uniform(0, 1)
    colours = [
        colorsys.hsv_to_rgb((base + rng.uniform(0, spread / 3600)) % 1, saturation, rng.uniform())
        for _ in range(256)
    ]
    pixels = (np.array(colours) * 255).round().astype(np.uint8)
    pixels[:strays] = rng.integers(0, 256, (strays, 3))
    image = Image.fromarray(pixels.reshape(16, 16, 3))
    assert set(attributes.colour_tags(image)) == plain_colour_tags(image)


def test_real_photos(shared_data):
    def of(name: str) -> set[str]:
        opened = open_image(shared_data("skimage") / name)
        info = opened.info
        row = {"width": info.width, "height": info.height, "mode": info.mode}
        return tags_of(opened.image, opened.alpha, format=info.format, **row)

    for name in ("camera.png", "coins.png", "moon.png", "page.png"):
        assert of(name) >= GREY, name
    for name in ("astronaut.png", "coffee.png", "rocket.jpg"):
        assert not of(name) & GREY, name


# --- transparency --------------------------------------------------------------------------------


def alpha_with(num_clear: int, value: int = 15) -> Image.Image:
    """Alpha of 10 x 10 pixels, of whose ring of 36 so many are nearly clear; the middle is."""
    ring = [(y, x) for y in range(10) for x in range(10) if y in (0, 9) or x in (0, 9)]
    pixels = np.zeros((10, 10), dtype=np.uint8)
    for index, place in enumerate(ring):
        pixels[place] = value if index < num_clear else 255
    return Image.fromarray(pixels)


def test_background_is_transparent_from_half_of_the_ring():
    assert tags_of(alpha=alpha_with(18)) == {"transparent_background"}
    assert tags_of(alpha=alpha_with(17)) == set()
    assert tags_of(alpha=alpha_with(36, value=16)) == set()
    assert tags_of(alpha=None) == set()
    for size in ((1, 1), (1, 9), (2, 2), (9, 1)):
        assert tags_of(alpha=Image.new("L", size, 0)) == {"transparent_background"}


def test_transparency_of_real_files(shared_data):
    for name in ("png_rgba_soft.png", "png_rgba_hidden_magenta.png"):
        opened = open_image(shared_data("formats") / name)
        assert opened.alpha is not None
        found = tags_of(opened.image, opened.alpha)
        assert ("transparent_background" in found) == attributes.is_background_transparent(
            opened.alpha
        )
    soft = open_image(shared_data("formats") / "png_rgba_soft.png")
    assert "transparent_background" in tags_of(soft.image, soft.alpha)
    buffer = io.BytesIO()
    Image.new("RGBA", (20, 20), (200, 10, 10, 255)).save(buffer, "PNG")
    assert open_image(buffer.getvalue()).alpha is None
