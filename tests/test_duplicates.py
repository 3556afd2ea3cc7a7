"""What the search for duplicates makes of a table."""

from __future__ import annotations

import io
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from sdprep.duplicates import DuplicatesConfig, find_duplicates
from sdprep.errors import UserError
from sdprep.near_search import Views, compare_all
from sdprep.schema import CORE, SCORED_TAG
from sdprep.table import PhotoTable
from sdprep.tags import TagsConfig, compose_tags
from tests.test_near_edges import encoded, family


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

    def counting(views: Views, is_new: np.ndarray) -> np.ndarray:
        compared.append(int(is_new.sum()))
        return compare_all(views, is_new)

    monkeypatch.setattr("sdprep.duplicates.compare_all", counting)
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
    with table.writer():
        table.update_rows(ids, {"text": pa.nulls(2, CORE.field("text").type)})
    assert find_duplicates(table).edges["sets"] == 0
    assert set(column(table, "group_id").values()) == {min(ids)}  # groups never split


def test_the_best_one_gets_the_tags_of_all(table: PhotoTable) -> None:
    ids = add(table, FILES[:2])
    words = {ids[0]: ("cat", "red"), ids[1]: ("sofa", "sky")}
    raw = [
        {"tags": [{"name": name, "p": 1.0, "category": "general"} for name in words[id_]]}
        for id_ in ids
    ]
    type_ = pa.struct({"tags": pa.list_(SCORED_TAG)})
    with table.writer():
        table.write_fold(ids, {"tags_sidecar": pa.array(raw, type_)}, stage="tag")
    compose_tags(table, TagsConfig())
    notes = table.notes("tags")
    find_duplicates(table)
    gone = next(id_ for id_, reason in column(table, "reject_duplicates").items() if reason)
    best = next(id_ for id_ in ids if id_ != gone)
    found = column(table, "tags")
    assert {tag["name"] for tag in found[best]} == {*words[best], *words[gone]}
    assert {tag["name"] for tag in found[gone]} == {*words[gone]}
    assert table.notes("tags") == notes
    version = table.version
    compose_tags(table, TagsConfig())  # composition unites them again
    find_duplicates(table)
    assert table.version == version
    table.journal().append({"action": "remove_tag", "id": best, "tag": words[gone][1]})
    compose_tags(table, TagsConfig())
    find_duplicates(table)
    left = {tag["name"] for tag in column(table, "tags")[best]}
    assert left == {*words[best], words[gone][0]}  # what people take off stays off


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


def test_a_large_set_is_sampled_and_its_groups_never_split(
    table: PhotoTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = add(table, FILES[:4])
    find_duplicates(table)
    assert set(column(table, "group_id").values()) == {min(ids)}  # the crop is found, too
    monkeypatch.setattr("sdprep.duplicates.MAX_EXHAUSTIVE", 3)
    ids += add(table, FILES[4:])
    report = find_duplicates(table)
    groups = column(table, "group_id")
    assert {groups[id_] for id_ in ids[:4]} == {min(ids[:4])}
    assert groups[ids[4]] == groups[ids[5]]  # letterboxed: trimmed takes part
    assert report.edges["near_estimated"] >= report.second_look["agreed"] >= 7
    assert '"mode": "sampled"' in table.notes("group_id")["duplicates"]
