"""Duplicates: what must be found, what must not be merged, and what a table makes of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from sdprep.duplicate_groups import (
    Quality,
    best_of_groups,
    group_edges,
    links,
    members,
    refuse_large,
    set_links,
    unite_tags,
)
from sdprep.duplicates import DuplicatesConfig, find_duplicates
from sdprep.errors import UserError
from sdprep.images import open_image
from sdprep.near_edges import Views, closest_pairs, find_edges
from sdprep.schema import CORE, FOLDS
from sdprep.seeding import rng_for
from sdprep.signatures import WHOLE, view_signatures
from sdprep.table import PhotoTable
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
    with (folder / "groups.csv").open(newline="") as file:
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
    monkeypatch.setattr("sdprep.near_edges.QUERY_ROWS", 7)
    monkeypatch.setattr("sdprep.near_edges.TARGET_ROWS", 11)
    assert find_edges(views) == expected
    assert len(expected.edges) >= 16


def test_sets_of_one_picture_are_refused_before_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdprep.near_edges.MAX_HITS", 50)
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


# --- groups ---------------------------------------------------------------------------------------

EDGES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=14)
IDS = [blake2b(bytes([n]), digest_size=16).hexdigest() for n in range(10)]


@settings(max_examples=80, deadline=None)
@given(edges=EDGES, more=EDGES, order=st.permutations(range(10)), data=st.data())
def test_groups_are_components_named_by_their_least_id(
    edges: list[tuple[int, int]],
    more: list[tuple[int, int]],
    order: list[int],
    data: st.DataObject,
) -> None:
    groups = group_edges(IDS, edges)
    reach = np.eye(10, dtype=bool)
    for one, two in edges:
        reach[one, two] = reach[two, one] = True
    for _ in range(4):
        reach = reach @ reach
    assert groups == [min(IDS[j] for j in np.flatnonzero(reach[i])) for i in range(10)]
    place = {row: new for new, row in enumerate(order)}
    shuffled = data.draw(st.permutations([(place[j], place[i]) for i, j in edges]))
    assert group_edges([IDS[row] for row in order], shuffled) == [groups[row] for row in order]
    grown = group_edges(IDS, [*links(groups), *more])
    assert grown == group_edges(IDS, edges + more)  # stored names stand for all earlier edges
    for rows in members(groups).values():
        assert len({grown[row] for row in rows}) == 1  # groups may merge, never split


def test_best_goes_by_pixels_then_bits_then_score_then_id() -> None:
    qualities = [
        Quality(100, 8.0, 1.0),
        Quality(200, 0.5, 0.0),
        Quality(200, 2.0, 3.0),
        Quality(200, 2.0, 5.0),
        Quality(200, 2.0, 5.0),
        Quality(999, 9.0, 9.0),
    ]
    ids = list("fedcba")
    live = [True] * 5 + [False]
    assert set(best_of_groups(ids, ["x"] * 6, qualities, live).values()) == {4}  # id b before c
    without = [True, True, True, False, False, False]
    assert best_of_groups(ids, ["x"] * 6, qualities, without) == {0: 2, 1: 2}
    assert best_of_groups(ids, ["x"] * 6, qualities, [False] * 6) == {}
    assert best_of_groups(ids, ids, qualities, live) == {}


def tag(name: str, source: str = "sidecar", category: str = "general") -> dict[str, Any]:
    return {"name": name, "category": category, "score": 1.0, "source": source}


def test_tags_are_united_once_without_what_is_of_the_file() -> None:
    ids = ["a", "b", "c"]
    tags = [
        [tag("cat"), tag("general", category="rating")],
        [tag("sofa"), tag("lowres", "attributes"), tag("explicit", category="rating")],
        [tag("cat", "wd"), tag("watermark", "owlv2"), tag("red")],
    ]
    better = {1: 0, 2: 0}
    united = unite_tags(ids, tags, better, [("a", "red")])
    assert united == {0: [*tags[0], tag("sofa")]}
    assert unite_tags(ids, [united[0], *tags[1:]], better, [("a", "red")]) == {}
    assert unite_tags(ids, [None, None, None], better) == {}


def test_sets_join_parents_and_children_of_one_source() -> None:
    def at(source: str, key: str) -> list[dict[str, str]]:
        return [{"source": source, "key": key}]

    sources = [
        at("booru", "1/10.jpg"),
        at("booru", "1/11.jpg"),
        at("booru", "12.png"),
        at("other", "10.jpg"),
        at("other", "13.jpg"),
        None,
    ]
    parents = [None, "10", " 10 ", None, "99", "10"]
    groups = group_edges(list("abcdef"), set_links(parents, sources))
    assert groups == ["a", "a", "a", "d", "e", "f"]
    assert set_links([""] * 6, sources) == []


def test_a_large_group_is_refused_with_its_members() -> None:
    ids = [f"{n:032x}" for n in range(300)]
    groups = [ids[7]] * 101 + ids[101:]
    names = [f"photo {n}.jpg" for n in range(300)]
    refuse_large(ids, [ids[7]] * 100 + ids[100:], names)
    with pytest.raises(UserError, match="101 of 300") as caught:
        refuse_large(ids, groups, names)
    assert all(f"{ids[n]}  photo {n}.jpg" in str(caught.value) for n in range(101))
    assert "accept-large-groups" in caught.value.hint


# --- a table --------------------------------------------------------------------------------------


def add(table: PhotoTable, files: Sequence[bytes], parent: str | None = None) -> list[str]:
    ids = [blake2b(data, digest_size=16).hexdigest() for data in files]
    rows = []
    for id_, data in zip(ids, files, strict=True):
        width, height = Image.open(io.BytesIO(data)).size
        source = {"source": "test", "key": f"{id_[:6]}.jpg", "num_bytes": len(data), "mtime_ns": 0}
        rows.append(
            {
                "id": id_,
                "image": data,
                "width": width,
                "height": height,
                "num_bytes": len(data),
                "sources": [source],
                "text": {"parent_id": parent} if parent else None,
            }
        )
    with table.writer():
        table.add_images(pa.Table.from_pylist(rows, schema=CORE))
    return ids


@pytest.fixture
def table(tmp_path: Path) -> PhotoTable:
    return PhotoTable.open(tmp_path / "my photos.lance", create=True)


def column(table: PhotoTable, name: str) -> dict[str, Any]:
    rows = table.read(["id", name])
    return dict(zip(rows["id"].to_pylist(), rows[name].to_pylist(), strict=True))


def reject(table: PhotoTable, stage: str, ids: Sequence[str]) -> None:
    reasons = pa.array(["test"] * len(ids), pa.string())
    with table.writer():
        table.write_fold(ids, {f"reject_{stage}": reasons}, stage=stage)


FILES = [encoded(image, quality=95) for image in family(1)]


def test_a_table_gets_groups_and_keeps_the_best(table: PhotoTable) -> None:
    png = encoded(Image.open(io.BytesIO(FILES[0])), "PNG")
    ids = add(table, [*FILES, png])
    report = find_duplicates(table)
    assert report.to_json()["exact_groups"] == 1
    assert report.near_groups == 2
    assert report.images_in_groups == 8
    assert report.edges["pixels"] == 1
    groups, dups = column(table, "group_id"), column(table, "dup_id")
    hashes, reasons = column(table, "pixel_hash"), column(table, "reject_duplicates")
    first, second = [*ids[:4], ids[8]], ids[4:7]
    assert {groups[id_] for id_ in first} == {min(first)}
    assert {groups[id_] for id_ in second} == {min(second)}
    assert groups[ids[7]] == dups[ids[7]] == ids[7]
    assert hashes[ids[0]] == hashes[ids[8]] is not None
    assert hashes[ids[7]] is None
    assert reasons[ids[8]] is None  # as large as the JPEG, and more bits per pixel
    assert {reasons[id_] for id_ in ids[:4]} == {f"duplicate_of:{ids[8]}"}
    assert reasons[ids[5]] is None  # the letterboxed one has most pixels
    assert {len(signature) for signature in column(table, "signature").values()} == {16}
    assert report.rejected == sum(reason is not None for reason in reasons.values()) == 6
    version = table.version
    assert find_duplicates(table) == report
    assert table.version == version  # a second run writes nothing
    assert find_duplicates(table, DuplicatesConfig(keep="all")).rejected == 0
    assert not any(column(table, "reject_duplicates").values())


def test_growth_ends_where_one_run_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = PhotoTable.open(tmp_path / "once.lance", create=True)
    add(at_once, FILES)
    expected = find_duplicates(at_once)
    grown = PhotoTable.open(tmp_path / "grown.lance", create=True)
    compared: list[int] = []

    def counting(views: Views, is_new: np.ndarray) -> Any:
        compared.append(int(is_new.sum()))
        return find_edges(views, is_new)

    monkeypatch.setattr("sdprep.duplicates.find_edges", counting)
    for files in (FILES[5:], FILES[2:5], FILES[:2]):
        add(grown, files)
        report = find_duplicates(grown)
    assert compared == [3, 3, 2]
    assert report == expected
    for name in ("group_id", "dup_id", "reject_duplicates", "pixel_hash", "signature"):
        assert column(grown, name) == column(at_once, name), name
    # An undone column is no memory of what was compared: everything is compared again.
    ids = grown.read(["id"])["id"].to_pylist()
    with grown.writer():
        grown.write_fold(ids, {"dup_id": pa.array(ids)}, stage="test")
    assert find_duplicates(grown) == expected
    assert compared[-1] == 8


def test_groups_ignore_what_other_stages_reject(table: PhotoTable) -> None:
    ids = add(table, FILES[:3])
    find_duplicates(table)
    groups = column(table, "group_id")
    best = next(id_ for id_, reason in column(table, "reject_duplicates").items() if not reason)
    reject(table, "select", [best])
    find_duplicates(table)
    assert column(table, "group_id") == groups
    reasons = column(table, "reject_duplicates")
    assert reasons[best] is None
    left = [id_ for id_ in ids if id_ != best and reasons[id_] is None]
    assert len(left) == 1
    assert {reasons[id_] for id_ in ids} == {None, f"duplicate_of:{left[0]}"}


def test_without_near_only_equal_pixels_count(table: PhotoTable) -> None:
    blank = Image.new("RGB", (80, 80), "white")
    tinted = Image.new("RGB", (80, 80), (250, 250, 252))
    files = [*FILES, encoded(blank), encoded(blank, "PNG"), encoded(tinted, "PNG")]
    ids = add(table, files)
    report = find_duplicates(table, DuplicatesConfig(near=False))
    assert (report.exact_groups, report.near_groups, report.flat) == (1, 0, 3)
    groups = column(table, "group_id")
    assert groups[ids[8]] == groups[ids[9]] == min(ids[8:10])
    assert len(set(groups.values())) == len(files) - 1
    assert find_duplicates(table).near_groups == 2
    assert len(set(column(table, "group_id").values())) == 5  # two scenes, one alone, two blanks


def test_posts_of_one_parent_share_a_split_and_both_stay(table: PhotoTable) -> None:
    ids = add(table, [FILES[0], FILES[4]], parent="77")
    report = find_duplicates(table)
    assert set(column(table, "group_id").values()) == {min(ids)}
    assert column(table, "dup_id") == {id_: id_ for id_ in ids}
    assert (report.rejected, report.edges["sets"]) == (0, 1)


def test_the_best_one_gets_the_tags_of_all(table: PhotoTable) -> None:
    ids = add(table, FILES[:2])
    words = {ids[0]: "cat", ids[1]: "sofa"}
    with table.writer():
        tags = pa.array([[tag(words[id_])] for id_ in ids], FOLDS["tags"])
        table.write_fold(ids, {"tags": tags}, stage="tags", notes={"policy": "kept"})
    find_duplicates(table)
    gone = next(id_ for id_, reason in column(table, "reject_duplicates").items() if reason)
    best = next(id_ for id_ in ids if id_ != gone)
    found = column(table, "tags")
    assert [tag_["name"] for tag_ in found[best]] == [words[best], words[gone]]
    assert [tag_["name"] for tag_ in found[gone]] == [words[gone]]
    assert table.notes("tags")["policy"] == "kept"
    version = table.version
    find_duplicates(table)
    assert table.version == version


def test_the_score_decides_between_equals(table: PhotoTable) -> None:
    ids = add(table, [FILES[0], FILES[0] + b"\0"])  # the same picture, one byte more
    scores = pa.array([{"score": 1.0, "error": None}, {"score": 2.0, "error": None}])
    with table.writer():
        same = pa.array([len(FILES[0])] * 2, pa.int64())
        table.update_rows(ids, {"num_bytes": same})
        table.write_fold(ids, {"score_aesthetic": scores}, stage="score")
    find_duplicates(table)
    assert column(table, "reject_duplicates") == {ids[0]: f"duplicate_of:{ids[1]}", ids[1]: None}
    with pytest.raises(UserError, match="not numbers"):
        find_duplicates(table, DuplicatesConfig(score="format"))


def test_a_large_group_stops_before_anything_is_written(table: PhotoTable) -> None:
    blank = encoded(Image.new("RGB", (16, 16)), "PNG")
    ids = add(table, [blank + bytes([n]) for n in range(101)])
    with pytest.raises(UserError, match="101 of 101") as caught:
        find_duplicates(table)
    assert all(id_ in str(caught.value) for id_ in ids)
    assert not table.has("group_id")
    accepted = find_duplicates(table, DuplicatesConfig(accept_large_groups=True))
    assert (accepted.largest_group, accepted.exact_groups, accepted.rejected) == (101, 1, 100)


def test_unreadable_and_missing_images(table: PhotoTable) -> None:
    empty = find_duplicates(table)
    assert (empty.images, empty.near_groups, empty.largest_group) == (0, 0, 0)
    ids = add(table, [FILES[0], FILES[1], FILES[0][: len(FILES[0]) // 2]])
    report = find_duplicates(table)
    assert (report.images, report.failed, report.near_groups) == (3, 1, 1)
    assert column(table, "group_id")[ids[2]] == ids[2]
    assert column(table, "signature")[ids[2]] is None


def test_too_many_images_are_refused_by_name(
    table: PhotoTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdprep.duplicates.MAX_EXHAUSTIVE", 3)
    add(table, FILES[:4])
    with pytest.raises(UserError, match="4 images; .* among 3 at most"):
        find_duplicates(table)
    assert find_duplicates(table, DuplicatesConfig(near=False)).images == 4
