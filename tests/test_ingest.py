"""Ingest into a real table: one row per image, a verdict per file, and a second run that rests."""

from __future__ import annotations

import os
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdprep import ingest as ingest_module
from sdprep.ingest import ingest
from sdprep.ingest_report import IngestReport
from sdprep.seeding import rng_for
from sdprep.sources.folder import Config
from sdprep.table import PhotoTable


def picture(path: Path, number: int, size: tuple[int, int] = (72, 64), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng_for(11, number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def id_of(path: Path) -> str:
    return blake2b(path.read_bytes(), digest_size=16).hexdigest()


@pytest.fixture
def table(tmp_path) -> PhotoTable:
    return PhotoTable.open(tmp_path / "t.lance", create=True)


@pytest.fixture
def photos(tmp_path) -> Path:
    for number in range(6):
        picture(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


def run(table: PhotoTable, folder: Path, **options) -> IngestReport:
    source = Config(path=folder).build()
    report = ingest(table, source, **options)
    assert report.found == report.added + report.already_present + report.rejected
    assert len(report.rejects) == report.rejected
    return report


def rows(table: PhotoTable) -> dict[str, dict]:
    names = ["id", "image_uri", "width", "height", "sources", "text", "reject_ingest", "warnings"]
    return {row["id"]: row for row in table.read([*names, "ordinal"]).to_pylist()}


def keys(row: dict) -> list[str]:
    return [entry["key"] for entry in row["sources"]]


# --- verdicts -----------------------------------------------------------------------------------


def test_every_file_of_corrupt_gets_its_verdict(table, shared_data):
    report = run(table, shared_data("corrupt"), max_rejected_share=1.0)
    assert (report.found, report.added, report.already_present, report.rejected) == (24, 11, 6, 7)
    assert {entry["source_key"]: entry["reason"] for entry in report.rejects} == {
        "broken_data_stream.png": "decode_error",
        "half.jpg": "truncated",
        "html_error_page.jpg": "not_an_image",
        "png_decompression_dos.png": "decode_error",
        "truncated_jpeg.jpg": "truncated",
        "unknown_compression_method.png": "decode_error",
        "zero_bytes.jpg": "empty_file",
    }
    assert report.ignored == 3
    assert report.warnings["extension_lies"] == ["png_named.jpg"]
    assert report.warnings["bad_exif"] == ["hopper_bad_exif.jpg"]
    assert report.warnings["text_cp1252"] == ["caption_latin1.txt"]
    found = rows(table)
    assert len(found) == 18
    assert table.count("reject_ingest IS NOT NULL AND image IS NULL") == 7
    hopper = found[id_of(shared_data("corrupt") / "hopper.jpg")]
    assert len(keys(hopper)) == 7
    assert hopper["text"]["tags"][0]["name"] == "1girl"
    assert sorted(report.warnings["text_conflict"]) == [
        f"caption_{name}.jpg" for name in ("crlf", "dups", "emoji", "latin1")
    ]


def test_every_file_of_formats_gets_its_verdict(table, shared_data):
    report = run(table, shared_data("formats"))
    assert (report.found, report.added, report.rejected) == (51, 44, 7)
    reasons = {entry["source_key"]: entry["reason"] for entry in report.rejects}
    assert sorted(name for name, reason in reasons.items() if reason == "animated") == [
        "apng_animated.png",
        "gif_animated.gif",
        "tiff_multipage.tif",
        "webp_animated.webp",
    ]
    small = ("tiny_1x1.png", "tiny_31x47.png", "tiny_8x8.png")
    assert all(reasons[name] == "too_small" for name in small)
    turned = rows(table)[id_of(shared_data("formats") / "orientation_6.jpg")]
    assert (turned["width"], turned["height"]) == (480, 320)


def test_bytes_are_stored_as_they_are(table, photos):
    run(table, photos)
    found = table.read(["id", "image"]).to_pylist()
    assert [row["id"] for row in found] == [id_of(photos / f"{n}.png") for n in range(6)]
    assert [row["image"] for row in found] == [(photos / f"{n}.png").read_bytes() for n in range(6)]


def test_rows_come_in_key_order_whatever_the_threads_do(tmp_path, photos, monkeypatch):
    original = ingest_module.open_image

    def slow_first(data, **options):
        if blake2b(data, digest_size=16).hexdigest() == id_of(photos / "0.png"):
            time.sleep(0.2)
        return original(data, **options)

    monkeypatch.setattr(ingest_module, "open_image", slow_first)
    table = PhotoTable.open(tmp_path / "a.lance", create=True)
    run(table, photos, num_threads=4)
    assert table.read(["id"])["id"].to_pylist() == [id_of(photos / f"{n}.png") for n in range(6)]


def test_the_same_bytes_are_one_row(table, photos, tmp_path):
    (photos / "sub").mkdir()
    (photos / "sub" / "copy.png").write_bytes((photos / "0.png").read_bytes())
    report = run(table, photos)
    assert (report.found, report.added, report.already_present) == (7, 6, 1)
    assert keys(rows(table)[id_of(photos / "0.png")]) == ["0.png", "sub/copy.png"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.png").write_bytes((photos / "0.png").read_bytes())
    report = run(table, other)
    assert (report.found, report.added, report.already_present) == (1, 0, 1)
    entries = rows(table)[id_of(photos / "0.png")]["sources"]
    assert [(e["source"], e["key"]) for e in entries] == [
        ("photos", "0.png"),
        ("photos", "sub/copy.png"),
        ("other", "x.png"),
    ]


def test_unreadable_files_are_listed_and_are_no_rows(table, photos, monkeypatch):
    (photos / "3.png").chmod(0)
    if os.access(photos / "3.png", os.R_OK):  # an administrator may read everything
        read = ingest_module._read

        def refuse(item):
            if item.key == "3.png":
                raise PermissionError(13, "Permission denied")
            return read(item)

        monkeypatch.setattr(ingest_module, "_read", refuse)
    report = run(table, photos)
    assert report.rejects == [{"source_key": "3.png", "reason": "unreadable"}]
    assert table.count() == 5


def test_a_file_that_vanishes_under_way_is_listed(table, photos):
    source = Config(path=photos).build()
    source.totals()
    (photos / "2.png").unlink()
    report = ingest(table, source)
    assert report.rejects == [{"source_key": "2.png", "reason": "missing_file"}]
    assert report.added == 5


def test_oversized_files_are_hashed_but_not_held(table, photos, monkeypatch):
    monkeypatch.setattr(ingest_module, "MAX_FILE_BYTES", 1000)
    big = picture(photos / "big.png", 99)
    report = run(table, photos, max_rejected_share=1.0)
    assert {"source_key": "big.png", "reason": "file_too_large"} in report.rejects
    assert rows(table)[id_of(big)]["reject_ingest"] == "file_too_large"


def test_findings_of_the_source_are_reported(table, photos):
    (photos / "orphan.txt").write_text("x")
    (photos / "meta.json").write_text('{"nowhere": {"caption": "x"}, "0": {"caption": "c"}}')
    if hasattr(os, "mkfifo"):
        os.mkfifo(photos / "pipe.png")
    report = run(table, photos)
    assert (report.added, report.ignored_by_kind["orphan_sidecar"]) == (6, 1)
    assert report.rejects == [{"source_key": "nowhere", "reason": "missing_file"}]
    if hasattr(os, "mkfifo"):
        assert report.skipped == [{"source_key": "pipe.png", "reason": "fifo"}]
    assert rows(table)[id_of(photos / "0.png")]["text"]["caption"] == "c"


def test_an_empty_folder_is_no_error(table, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run(table, tmp_path / "empty").found == 0


# --- a second run -------------------------------------------------------------------------------


def test_a_second_run_reads_nothing_and_writes_nothing(table, photos, monkeypatch):
    (photos / "bad.png").write_bytes(b"no image")
    first = run(table, photos)
    version = table.version
    monkeypatch.setattr(ingest_module, "_read", lambda item: pytest.fail(f"{item.key} was read"))
    again = run(table, photos)
    assert (again.added, again.already_present, again.rejected) == (0, 6, 1)
    assert again.rejects == first.rejects
    assert table.version == version
    assert (again.updated, again.gone, again.superseded) == (0, 0, 0)


def test_rehash_reads_everything_and_changes_nothing(table, photos):
    run(table, photos)
    version = table.version
    stat = (photos / "1.png").stat()
    assert run(table, photos, rehash=True).already_present == 6
    assert table.version == version
    data = picture(photos / "new.png", 50).read_bytes()
    (photos / "new.png").unlink()
    (photos / "1.png").write_bytes(data[: stat.st_size].ljust(stat.st_size, b"\0"))
    os.utime(photos / "1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run(table, photos).already_present == 6  # same size and time: trusted
    assert run(table, photos, rehash=True).added == 1


def test_touched_files_are_hashed_but_not_decoded(table, photos, monkeypatch):
    run(table, photos)
    os.utime(photos / "1.png", ns=(1, 12345))
    monkeypatch.setattr(ingest_module, "open_image", lambda *a, **k: pytest.fail("decoded"))
    assert run(table, photos).already_present == 6
    (entry,) = rows(table)[id_of(photos / "1.png")]["sources"]
    assert entry["mtime_ns"] == 12345
    version = table.version
    run(table, photos)
    assert table.version == version


def test_new_files_are_added_to_the_end(table, photos):
    run(table, photos)
    picture(photos / "00.png", 70)
    report = run(table, photos)
    assert (report.added, report.already_present) == (1, 6)
    assert rows(table)[id_of(photos / "00.png")]["ordinal"] == 6


def test_a_photo_edited_in_place_is_another_photo(table, photos):
    run(table, photos)
    old = id_of(photos / "1.png")
    picture(photos / "1.png", 80)
    report = run(table, photos)
    assert (report.added, report.already_present, report.superseded) == (1, 5, 1)
    found = rows(table)
    assert found[old]["reject_ingest"] == "source_changed"
    assert keys(found[old]) == ["1.png"]  # for the record
    assert found[id_of(photos / "1.png")]["reject_ingest"] is None
    version = table.version
    assert run(table, photos).superseded == 0
    assert table.version == version
    picture(photos / "1.png", 1)  # and back again
    assert id_of(photos / "1.png") == old
    report = run(table, photos)
    assert (report.added, report.already_present, report.superseded) == (0, 6, 1)
    found = rows(table)
    assert found[old]["reject_ingest"] is None
    assert sorted(row["reject_ingest"] or "" for row in found.values())[-1] == "source_changed"


def test_a_restored_backup_brings_its_row_back(table, photos):
    run(table, photos)
    data, stat = (photos / "1.png").read_bytes(), (photos / "1.png").stat()
    picture(photos / "1.png", 80)
    run(table, photos)
    (photos / "1.png").write_bytes(data)
    os.utime(photos / "1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as cp -p does
    assert run(table, photos).already_present == 6
    assert rows(table)[id_of(photos / "1.png")]["reject_ingest"] is None


def test_an_edited_copy_leaves_the_row_to_the_other_copy(table, photos):
    (photos / "copy.png").write_bytes((photos / "1.png").read_bytes())
    run(table, photos)
    old = id_of(photos / "copy.png")
    picture(photos / "1.png", 81)
    report = run(table, photos)
    assert (report.added, report.superseded) == (1, 0)
    assert keys(rows(table)[old]) == ["copy.png"]
    assert rows(table)[old]["reject_ingest"] is None


def test_swapped_files_swap_their_keys(table, photos):
    run(table, photos)
    a, b = (photos / "1.png").read_bytes(), (photos / "2.png").read_bytes()
    (photos / "1.png").write_bytes(b)
    (photos / "2.png").write_bytes(a)
    report = run(table, photos, rehash=True)
    assert (report.added, report.already_present, report.superseded) == (0, 6, 0)
    found = rows(table)
    assert keys(found[id_of(photos / "1.png")]) == ["1.png"]
    assert keys(found[id_of(photos / "2.png")]) == ["2.png"]
    assert all(row["reject_ingest"] is None for row in found.values())


def test_rows_of_files_that_are_gone_stay(table, photos):
    run(table, photos)
    gone = id_of(photos / "1.png")
    (photos / "1.png").unlink()
    report = run(table, photos)
    assert (report.found, report.gone) == (5, 1)
    assert rows(table)[gone]["reject_ingest"] is None


def test_rejections_are_reconsidered_under_other_options(table, photos):
    picture(photos / "small.png", 90, size=(40, 40))
    frames = [Image.new("RGB", (80, 80), colour) for colour in ("red", "blue")]
    frames[0].save(photos / "moving.gif", save_all=True, append_images=frames[1:])
    assert run(table, photos, max_rejected_share=1).rejected == 2
    report = run(table, photos, min_side=32, max_rejected_share=1)
    assert (report.added, report.rejected) == (1, 1)
    report = run(table, photos, first_frame=True)
    assert (report.added, report.rejected) == (1, 0)
    small, moving = id_of(photos / "small.png"), id_of(photos / "moving.gif")
    found = rows(table)
    assert found[small]["reject_ingest"] is found[moving]["reject_ingest"] is None
    assert table.image_bytes([small])[small] == (photos / "small.png").read_bytes()
    assert found[moving]["width"] == 80
    version = table.version
    assert run(table, photos, first_frame=True).already_present == 8
    assert table.version == version


def test_a_missing_plugin_is_asked_again_without_writing(table, photos):
    (photos / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(64))
    for _ in range(2):
        report = run(table, photos)
        assert report.rejects == [
            {"source_key": "phone.heic", "reason": "needs_plugin:pillow-heif"}
        ]
    assert table.version == 2  # made, and filled once


def test_tombstones_keep_images_out(table, photos):
    report = run(table, photos, tombstones={id_of(photos / "1.png")})
    assert report.rejects == [{"source_key": "1.png", "reason": "purged"}]
    assert table.count() == 5
