"""Signatures: the bits are what the definition says, and what an edit may and may not change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sdprep import signatures
from sdprep.annotate import Sample
from sdprep.second_look import agrees, crop_thumbnail, is_plain
from sdprep.seeding import rng_for
from sdprep.signatures import (
    LUMA_PX,
    TRIMMED,
    WHOLE,
    SignatureViews,
    border_trim,
    is_flat,
    luma_256,
    view_boxes,
    view_signatures,
)


def scene(*key: object, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """A smooth random picture: something of every low frequency."""
    cells = rng_for("scene", *key).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def bits(signature: np.ndarray) -> np.ndarray:
    return np.unpackbits(signature)


def distance(first: np.ndarray, second: np.ndarray) -> int:
    return int((bits(first) != bits(second)).sum())


def test_phash_is_the_sign_of_low_frequencies_against_their_median() -> None:
    luma = luma_256(scene("dct"))
    cells = np.asarray(luma.resize((32, 32), Image.Resampling.BOX)).astype(float)
    coefficients = []
    for v in range(8):  # the definition of DCT-II, term by term
        for u in range(8):
            y, x = np.mgrid[:32, :32]
            wave = np.cos(np.pi * v * (2 * y + 1) / 64) * np.cos(np.pi * u * (2 * x + 1) / 64)
            coefficients.append((cells * wave).sum())
    ac = np.array(coefficients[1:])
    found = bits(view_signatures(scene("dct")).upright[WHOLE])[:63]
    np.testing.assert_array_equal(found, ac > np.median(ac))
    assert found.sum() == 31  # of 63 distinct values, 31 lie above the median


def test_dhash_says_where_the_next_cell_is_brighter() -> None:
    ramp = Image.fromarray(np.tile(np.linspace(20, 230, 256).astype(np.uint8), (256, 1)))
    views = view_signatures(ramp.convert("RGB"))
    assert bits(views.upright[WHOLE])[63:127].all()
    assert not bits(views.mirrored[WHOLE])[63:127].any()
    assert not bits(views.upright[WHOLE])[127]  # spare


def test_mirrored_is_the_signature_of_the_mirror_image() -> None:
    image = scene("mirror", size=(256, 256))
    flipped = view_signatures(ImageOps.mirror(image))
    np.testing.assert_array_equal(view_signatures(image).mirrored[WHOLE], flipped.upright[WHOLE])
    assert distance(view_signatures(image).upright[WHOLE], flipped.upright[WHOLE]) > 28


def test_views_are_those_of_the_cropped_picture() -> None:
    image = scene("crops", size=(1024, 1024))
    views = view_signatures(image)
    for index, box in enumerate(view_boxes(views.trim)):
        crop = image.crop(tuple(round(edge * 4) for edge in box))  # type: ignore[arg-type]
        assert distance(views.upright[index], view_signatures(crop).upright[WHOLE]) <= 3
    assert len(views.upright) == 8


def test_changing_bits_needs_a_new_version() -> None:
    assert signatures.SIGNATURE_VERSION == 1
    image = Image.fromarray(
        np.arange(96 * 128 * 3, dtype=np.uint32).astype(np.uint8).reshape(96, 128, 3)
    )
    image = Image.blend(image, scene("golden", size=(128, 96)), 0.7)
    assert view_signatures(image).upright[WHOLE].tobytes().hex() == GOLDEN


GOLDEN = "1339aaddf21f2e01e765b3b3379fd734"


@pytest.mark.parametrize("tone", [0, 255, 120])
def test_border_is_trimmed_and_a_pixel_of_blend_with_it(tone: int) -> None:
    levels = np.asarray(scene("border").convert("L").resize((256, 256))).copy()
    levels = np.where(levels < 128, levels // 4 + 20, 160 + levels // 4).astype(np.uint8)
    levels[:40] = tone
    levels[:, 236:] = tone
    left, top, right, bottom = border_trim(levels)
    assert (left, bottom) == (0, 256)
    assert top == 41
    assert right == 235


def test_at_most_a_third_of_a_side_is_border() -> None:
    blank = np.full((LUMA_PX, LUMA_PX), 255, np.uint8)
    left, top, right, bottom = border_trim(blank)
    assert left == top == 86
    assert right == bottom == 256 - 86


def test_flat_images_are_marked_and_flat_views_unusable() -> None:
    noise = rng_for("noise").normal(250, 2.5, (300, 300, 3)).clip(0, 255).astype(np.uint8)
    page = view_signatures(Image.fromarray(noise))
    assert is_flat(page.upright[WHOLE].tobytes())
    assert not page.usable.any()
    corner = Image.new("RGB", (400, 400), "white")
    corner.paste(scene("corner", size=(90, 90)), (0, 0))
    views = view_signatures(corner)
    assert views.usable[WHOLE]
    assert not views.usable[6]  # the crop at the lower right is blank
    assert not is_flat(views.upright[WHOLE].tobytes())


def test_trimmed_is_unused_where_there_is_no_border() -> None:
    assert not view_signatures(scene("plain")).usable[TRIMMED]
    boxed = ImageOps.expand(scene("plain"), border=(0, 40), fill="black")
    assert view_signatures(boxed).usable[TRIMMED]


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 700), height=st.integers(1, 700))
def test_any_size_has_all_views(width: int, height: int) -> None:
    views = view_signatures(scene("size", size=(width, height)))
    assert views.upright.shape == (8, 16)
    assert views.mirrored.shape == (2, 16)
    left, top, right, bottom = views.trim
    assert 0 <= left < right <= 256
    assert 0 <= top < bottom <= 256


@settings(max_examples=15, deadline=None)
@given(key=st.integers(0, 10**6), factor=st.floats(0.5, 1.7))
def test_size_and_grey_hardly_matter(key: int, factor: float) -> None:
    image = scene(key)
    whole = view_signatures(image).upright[WHOLE]
    resized = image.resize((round(320 * factor), round(240 * factor)), Image.Resampling.LANCZOS)
    assert distance(whole, view_signatures(resized).upright[WHOLE]) <= 8
    grey = image.convert("L").convert("RGB")
    assert distance(whole, view_signatures(grey).upright[WHOLE]) <= 2


def test_annotator_rows_hold_what_the_views_say() -> None:
    images = [scene("a"), Image.new("RGB", (64, 64), "white")]
    batch = [Sample(id=str(i), row={}, image=image) for i, image in enumerate(images)]
    found = SignatureViews().annotate(batch)
    assert found.schema == SignatureViews.columns
    for row, image in zip(found.to_pylist(), images, strict=True):
        views = view_signatures(image)
        assert row["upright"] == views.upright.tobytes()
        assert row["mirrored"] == views.mirrored.tobytes()
        assert np.frombuffer(row["trim"], "<u2").tolist() == list(views.trim)
        assert [bool(row["usable"] >> i & 1) for i in range(8)] == views.usable.tolist()
        assert row["thumbnail"] == views.thumbnail.tobytes()


def test_second_look_tells_a_crop_from_another_scene() -> None:
    one, other = (view_signatures(scene(key)).thumbnail for key in ("one", "other"))
    whole = (0.0, 0.0, 256.0, 256.0)
    first, second = crop_thumbnail(one, whole), crop_thumbnail(other, whole)
    assert agrees(first, first, is_close=False, is_plain=True)
    assert agrees(first, first[:, ::-1][:, ::-1], is_close=False, is_plain=True)
    assert not agrees(first, second, is_close=True, is_plain=False)
    mirrored = crop_thumbnail(one, whole, is_mirrored=True)
    assert not agrees(first, mirrored, is_close=True, is_plain=True)


@pytest.mark.parametrize("axis", [0, 1])
def test_second_look_allows_for_one_pixel(axis: int) -> None:
    fine = rng_for("fine").integers(0, 256, (66, 66)).astype(np.float32)
    texture = (fine[:-2, :-2] + fine[1:-1, :-2] + fine[:-2, 1:-1] + fine[1:-1, 1:-1]) / 4
    for shift, expected in ((0, True), (1, True), (-1, True), (3, False)):
        moved = np.roll(texture, shift, axis)  # as a crop that is not quite one of the views
        assert agrees(texture, moved, is_close=False, is_plain=True) == expected


def test_plain_is_mostly_ground() -> None:
    drawing = Image.new("RGB", (256, 256), "white")
    drawing.paste(scene("figure", size=(120, 120)), (70, 70))
    assert is_plain(view_signatures(drawing).thumbnail)
    assert not is_plain(view_signatures(scene("figure")).thumbnail)
