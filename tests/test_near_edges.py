"""The search for near duplicates: what must be found, and what must not be merged."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from sdprep.errors import UserError
from sdprep.images import open_image
from sdprep.near_edges import find_edges, verify
from sdprep.near_sampled import compare_sampled, recall
from sdprep.near_search import Views, closest_pairs, compare_all
from sdprep.seeding import rng_for
from sdprep.signatures import TRIMMED, WHOLE, view_signatures
from tests.test_signatures import distance, scene

Edit = Callable[[Image.Image], Image.Image]

# --- edits ----------------------------------------------------------------------------------------


def encoded(image: Image.Image, format_: str = "JPEG", **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **how)
    return file.getvalue()


def jpeg(image: Image.Image, quality: int = 90) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, quality=quality))).convert("RGB")


def scaled(image: Image.Image, x: float, y: float) -> Image.Image:
    size = round(image.width * x), round(image.height * y)
    return image.resize(size, Image.Resampling.LANCZOS)


def watermarked(image: Image.Image, alpha: int) -> Image.Image:
    ink = Image.new("L", image.size)
    font = ImageFont.load_default(image.width / 7)
    centre = (image.width / 2, image.height / 2)
    ImageDraw.Draw(ink).text(centre, "SAMPLE", font=font, fill=alpha, anchor="mm")
    return Image.composite(Image.new("RGB", image.size, "white"), image, ink.rotate(20))


def cropped(image: Image.Image, share: float) -> Image.Image:
    x, y = round(image.width * (1 - share) / 2), round(image.height * (1 - share) / 2)
    return image.crop((x, y, image.width - x, image.height - y))


def letterboxed(image: Image.Image, colour: str, *, sideways: bool) -> Image.Image:
    x = round(image.width * 0.12) if sideways else 0
    y = 0 if sideways else round(image.height * 0.12)
    return ImageOps.expand(image, border=(x, y, x, y), fill=colour)


MUST_FIND: dict[str, Edit] = {
    "jpeg_q60": lambda image: jpeg(image, 60),
    "webp": lambda image: Image.open(io.BytesIO(encoded(image, "WEBP", quality=75))).convert("RGB"),
    "half": lambda image: jpeg(scaled(image, 0.5, 0.5)),
    "larger": lambda image: jpeg(scaled(image, 1.7, 1.7)),
    "grey": lambda image: jpeg(image.convert("L").convert("RGB")),
    "flip": lambda image: jpeg(ImageOps.mirror(image)),
    "wider": lambda image: jpeg(scaled(image, 1.15, 1)),
    "taller": lambda image: jpeg(scaled(image, 1, 1.15)),
    "watermark": lambda image: jpeg(watermarked(image, 120)),
    "crop_0.92": lambda image: jpeg(cropped(image, 0.92)),
    "letterbox_black": lambda image: jpeg(letterboxed(image, "black", sideways=False)),
    "pillarbox_white": lambda image: jpeg(letterboxed(image, "white", sideways=True)),
}
GATED = {
    "byte_identical_copy": 0,
    "same_pixels_different_metadata": 0,
    "png_of_decoded_original": 0,
    "webp_q75": 0,
    "jpeg_q60": 0,
    "resize_0.5": 0,
    "resize_1.7": 0,
    "grayscale": 0,
    "horizontal_flip": 0,
    "aspect_stretch_1.15": 0,
    "watermark": 0,
    "crop_center_0.92": 0,
    "letterbox_12pct": 0,
}


def views_of(images: Iterable[Image.Image]) -> Views:
    return Views.of([view_signatures(image) for image in images])


def read(path: Path) -> Image.Image:
    return open_image(path).image


# --- recall and false merges ----------------------------------------------------------------------


def test_near_duplicates_are_found_and_nothing_else(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("near_duplicates")
    with (folder / "groups.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = find_edges(views_of(read(folder / row["file"]) for row in rows))
    pairs = {edge[:2] for edge in found.edges}
    originals = {row["group"]: i for i, row in enumerate(rows) if row["transform"] == "original"}
    tried = dict(GATED)
    for index, row in enumerate(rows):
        if row["transform"] in tried:
            first, second = sorted((index, originals[row["group"]]))
            assert (first, second) in pairs, (row["file"], row["transform"])
            tried[row["transform"]] += 1
    assert set(tried.values()) == {6}
    assert all(rows[one]["group"] == rows[two]["group"] for one, two in pairs)
    assert len(found.edges) == found.num_close + found.num_far


def test_other_photos_of_a_subject_are_never_merged(shared_data: Callable[[str], Path]) -> None:
    paths = sorted(shared_data("dreambooth").glob("*/*.jpg"))
    paths += sorted(path for path in shared_data("skimage").iterdir() if path.suffix == ".png")
    assert len(paths) > 100
    found = find_edges(views_of(read(path).reduce(2) for path in paths))
    assert [(paths[i].name, paths[j].name, d) for i, j, d in found.edges] == []
    assert found.num_refused > 0  # drawings on white: the signatures alone would have merged them


def test_edits_of_photos_are_found(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("dreambooth")
    names = ("red_cartoon/01", "clock/00", "cat/02", "vase/03", "teapot/01")
    paths = [folder / f"{name}.jpg" for name in names]
    paths += [shared_data("skimage") / f"{name}.png" for name in ("brick", "moon", "text")]
    for path in paths:
        photo = read(path)
        edits = [photo, *(edit(photo) for edit in MUST_FIND.values())]
        is_new = np.array([True] + [False] * len(MUST_FIND))
        found = {edge[1] for edge in find_edges(views_of(edits), is_new).edges}
        missed = [name for row, name in enumerate(MUST_FIND, 1) if row not in found]
        assert not missed, (path.name, missed)


def test_objects_on_a_shared_ground_stay_apart() -> None:
    images = []
    for number, shape in enumerate(("ellipse", "rectangle", "regular_polygon")):
        image = Image.new("RGB", (400, 400), (236, 234, 230))
        draw = ImageDraw.Draw(image)
        colour = tuple(int(c) for c in rng_for("colour", number).integers(0, 130, 3))
        if shape == "regular_polygon":
            draw.regular_polygon((200, 230, 110), 3, fill=colour)
        else:
            getattr(draw, shape)((110, 140, 290, 320), fill=colour)
        images.append(image)
    found = find_edges(views_of(images))
    assert not found.edges
    assert find_edges(views_of([images[0], jpeg(images[0], 60)])).edges


def test_blank_pages_are_never_near() -> None:
    rng = rng_for("pages")
    pages = [
        Image.fromarray(rng.normal(248, 1.5, (300, 220, 3)).clip(0, 255).astype(np.uint8))
        for _ in range(6)
    ]
    found = find_edges(views_of([*pages, Image.new("RGB", (64, 64), "white"), scene("photo")]))
    assert found == type(found)()


def test_embeddings_may_agree_where_thumbnails_do_not() -> None:
    image = scene("embedded", size=(512, 512))
    views = views_of([image, image.rotate(6, Image.Resampling.BICUBIC)])
    assert 16 < distance(views.upright[0, WHOLE], views.upright[1, WHOLE]) <= 28
    assert find_edges(views).num_refused == 1
    for second, expected in (([2.0, 4.1], 1), ([-2.0, 1.0], 0), ([np.nan, np.nan], 0)):
        embeddings = np.array([[1.0, 2.0], second])
        seen = find_edges(Views(**{**vars(views), "embeddings": embeddings}))
        assert len(seen.edges) == seen.num_far == expected


# --- properties of the search ---------------------------------------------------------------------


def family(key: int) -> list[Image.Image]:
    """Two scenes with a few edits each, and one alone."""
    first, second = (scene(key, part, size=(240, 200)) for part in "ab")
    return [
        first,
        jpeg(first, 60),
        ImageOps.mirror(first),
        cropped(first, 0.75),
        second,
        letterboxed(second, "black", sideways=False),
        ImageEnhance.Brightness(second).enhance(1.2),
        scene(key, "alone"),
    ]


def subset(views: Views, rows: Sequence[int]) -> Views:
    parts = {name: value[list(rows)] for name, value in vars(views).items() if value is not None}
    return Views(**parts)


@settings(max_examples=8, deadline=None)
@given(key=st.integers(0, 10**6), order=st.permutations(range(8)), num_old=st.integers(0, 8))
def test_edges_ignore_order_and_growth_adds_the_rest(
    key: int, order: list[int], num_old: int
) -> None:
    views = views_of(family(key))
    everything = find_edges(views, threads=1)
    assert {edge[:2] for edge in everything.edges} >= {(0, 1), (0, 2), (4, 5)}
    mixed = find_edges(subset(views, order), threads=3)
    renamed = {(*sorted((order[i], order[j])), d) for i, j, d in mixed.edges}
    assert renamed == set(everything.edges)
    assert mixed.num_refused == everything.num_refused
    old = find_edges(subset(views, range(num_old)))
    is_new = np.arange(8) >= num_old
    grown = find_edges(views, is_new)
    assert sorted(old.edges + grown.edges) == everything.edges
    assert old.num_refused + grown.num_refused == everything.num_refused


def test_many_blocks_give_what_plain_counting_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    views = views_of(image for key in range(4) for image in family(key))
    expected = find_edges(views)
    monkeypatch.setattr("sdprep.near_search.QUERY_ROWS", 7)
    monkeypatch.setattr("sdprep.near_search.TARGET_ROWS", 11)
    assert find_edges(views) == expected
    assert len(expected.edges) >= 16


def test_sets_of_one_picture_are_refused_before_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdprep.near_search.MAX_HITS", 50)
    image = view_signatures(scene("same"))
    with pytest.raises(UserError, match="50 pairs of views agree among 20 images"):
        find_edges(Views.of([image] * 20))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    views=st.integers(1, 3),
    k=st.integers(1, 8),
    key=st.integers(0, 10**6),
)
def test_closest_pairs_are_the_closest(
    sizes: tuple[int, int], views: int, k: int, key: int
) -> None:
    rng = rng_for("closest", key)
    first, second = (rng.integers(0, 4, (n, views, 16), dtype=np.uint8) for n in sizes)
    alive = [(side[:, 0, 15] & 1) == 0 for side in (first, second)]
    expected = sorted(
        (min(distance(a, b) for a in first[i] for b in second[j]), i, j)
        for i in np.flatnonzero(alive[0])
        for j in np.flatnonzero(alive[1])
    )
    assert [(d, i, j) for i, j, d in closest_pairs(first, second, k)] == expected[:k]


# --- sets too large to compare every pair ---------------------------------------------------------


def pairs_at(bits: int, count: int) -> Views:
    """Images 2i and 2i+1 are `bits` apart, all others about half the signature."""
    rng = rng_for("pairs", bits)
    upright = np.zeros((2 * count, 8, 16), np.uint8)
    upright[::2, WHOLE] = rng.integers(0, 256, (count, 16))
    flips = np.argsort(rng.random((count, 127)), axis=1) < bits
    spare = np.zeros((count, 1), bool)
    flips = np.packbits(np.concatenate([flips, spare], axis=1), axis=1)
    upright[::2, WHOLE, 15] &= 254
    upright[1::2, WHOLE] = upright[::2, WHOLE] ^ flips
    usable = np.zeros((2 * count, 8), bool)
    usable[:, WHOLE] = True
    trim = np.tile([0, 0, 256, 256], (2 * count, 1))
    nothing = np.zeros((2 * count, 64, 64), np.uint8)
    mirrored = rng.integers(0, 256, (2 * count, 2, 16)).astype(np.uint8)
    return Views(upright, mirrored, usable, trim, nothing)


@pytest.mark.parametrize("bits", [0, 8, 12, 16, 22])
def test_sampling_finds_the_share_it_says(bits: int) -> None:
    count = 1500
    hits = compare_sampled(pairs_at(bits, count), np.ones(2 * count, bool))
    assert (hits[:, 0] % 2 == 0).all()
    assert (hits[:, 1] == hits[:, 0] + 1).all()
    assert (hits[:, 2] == bits).all()
    share, expected = len(np.unique(hits[:, 0])) / count, recall(bits)
    assert abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / count) + 1e-9
    assert bits > 8 or expected > 0.999
    assert bits > 12 or expected > 0.97


def test_sampling_finds_what_comparing_all_does(monkeypatch: pytest.MonkeyPatch) -> None:
    views = views_of(image for key in range(3) for image in family(key))
    is_new = np.arange(len(views)) % 3 == 0
    full = compare_all(views, is_new)
    sampled = {tuple(hit) for hit in compare_sampled(views, is_new).tolist()}
    framed = {tuple(hit) for hit in full[full[:, 4] <= TRIMMED].tolist()}
    assert sampled <= framed
    assert {hit for hit in framed if hit[2] <= 8} <= sampled
    assert len(sampled) > 10
    monkeypatch.setattr("sdprep.near_sampled.PAIRS_AT_ONCE", 3)
    assert {tuple(hit) for hit in compare_sampled(views, is_new).tolist()} == sampled


def test_edges_are_estimated_from_the_recall() -> None:
    views = views_of(family(1))
    hits = compare_sampled(views, np.ones(8, bool))
    found = verify(views, hits, views.thumbnails, recall)
    assert found.num_estimated == pytest.approx(sum(1 / recall(d) for _, _, d in found.edges))
    assert find_edges(views).num_estimated == len(find_edges(views).edges)
