"""The folder source: what counts as an image, whose text is whose, and what is never opened."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from PIL import Image

from sdprep.errors import DataError
from sdprep.recipe import options
from sdprep.sidecars import decode_text, split_tags, text_of_record
from sdprep.source_item import SourceItem
from sdprep.sources.folder import Config, FolderSource


def picture(path: Path, shade: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (shade, 0, 0)).save(path)
    return path


def listed(root: Path, **how) -> tuple[dict[str, SourceItem], dict[str, str], FolderSource]:
    """Items by key, findings as key → kind, and the source."""
    source = Config(path=root, **how).build()
    items = list(source.iter_samples())
    assert [item.key for item in items] == sorted(item.key for item in items)
    assert source.totals() == (len(items), sum(item.num_bytes or 0 for item in items))
    return {i.key: i for i in items}, {f.key: f.kind for f in source.findings}, source


def names(item: SourceItem) -> list[str]:
    return [name for name, _ in item.text.tags]


def test_kohya_layout(shared_data):
    items, findings, source = listed(shared_data("layouts") / "kohya")
    assert len(items) == 18
    assert findings == {"dataset.toml": "unlisted .toml"}
    dog = items["img/10_sks dog/dog_00.jpg"].text
    assert (dog.repeats, dog.class_name) == (10, "sks dog")
    assert dog.caption == "a happy corgi with its tongue out in front of pale blossoms"
    assert dog.tags[:3] == (("sks dog", None), ("dog", None), ("animal", None))
    assert items["reg/1_dog/dog3_00.jpg"].text.repeats == 1
    assert items["reg/1_dog/dog3_00.jpg"].text.caption is None
    assert source.name == "kohya"


def test_metadata_json_fills_in_what_sidecars_do_not_say(shared_data, tmp_path):
    original = shared_data("layouts") / "kohya"
    records = json.loads((original / "meta_cap_dd.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(records))
    for name in records:
        picture(tmp_path / f"{name}.jpg")
    first = next(iter(records))
    (tmp_path / f"{first}.caption").write_text("mine")
    items, findings, _ = listed(tmp_path)
    assert findings == {}
    assert len(items) == len(records) == 15
    for name, record in records.items():
        item = items[f"{name}.jpg"]
        assert item.text.caption == ("mine" if name == first else record["caption"])
        assert names(item) == [tag.strip() for tag in record["tags"].split(",")]


def test_metadata_keys_may_be_absolute_bare_or_windows_but_not_leave_the_folder(tmp_path):
    for name in ("a", "sub/b", "sub/c"):
        picture(tmp_path / f"{name}.png")
    records = {
        str(tmp_path / "a.png"): {"caption": "absolute"},
        "b": {"caption": "bare"},
        "sub\\c.png": {"caption": "windows", "tags": 7},
        "gone": {"caption": "x"},
        "../outside": {"caption": "x"},
        "/etc/passwd": {"caption": "x"},
    }
    (tmp_path / "meta.json").write_text(json.dumps(records))
    items, findings, source = listed(tmp_path)
    assert [item.text.caption for item in items.values()] == ["absolute", "bare", "windows"]
    assert findings == {
        "sub\\c.png": "bad_tags",
        "gone": "missing_file",
        "../outside": "outside_root",
        "/etc/passwd": "outside_root",
    }
    levels = {finding.key: finding.level for finding in source.findings}
    assert levels["gone"] == "missing"


def test_sidecars_their_roles_and_precedence(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("One, two\nthree ,, One")
    (tmp_path / "a.caption").write_text("A cat.")
    (tmp_path / "a.json").write_text(
        json.dumps({"caption": "no", "tags": "no", "rating": "q", "license": "CC0", "other": [1]})
    )
    item = listed(tmp_path)[0]["a.png"]
    assert names(item) == ["One", "two", "three", "One"]
    assert item.text.caption == "A cat."
    assert (item.text.rating, item.text.license) == ("questionable", "CC0")
    swapped = listed(tmp_path, txt="caption", caption="tags")[0]["a.png"]
    assert swapped.text.caption == "One, two\nthree ,, One"
    assert names(swapped) == ["A cat."]
    both = listed(tmp_path, txt="caption")[0]["a.png"]
    assert both.text.caption == "A cat."
    assert names(both) == ["no"]  # from the JSON


def test_the_full_name_comes_before_the_stem(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "a.webp")
    (tmp_path / "a.png.txt").write_text("own")
    (tmp_path / "a.txt").write_text("shared")
    items, findings, _ = listed(tmp_path)
    assert names(items["a.png"]) == ["own"]
    assert names(items["a.webp"]) == ["shared"]
    (tmp_path / "a.png.txt").unlink()
    items, findings, source = listed(tmp_path)
    assert names(items["a.png"]) == names(items["a.webp"]) == ["shared"]
    assert findings == {"a.txt": "shared_sidecar"}
    assert len(source.findings) == 1  # once, not once an image


def test_corrupt_text(shared_data):
    items, findings, _ = listed(shared_data("corrupt"))
    assert names(items["caption_bom.jpg"]) == ["1girl", "solo"]
    assert names(items["caption_crlf.jpg"]) == ["1girl", "solo", "smile"]
    assert names(items["caption_latin1.jpg"]) == ["café", "naïve"]
    assert names(items["caption_emoji.jpg"]) == ["1girl", "😀", "^_^", ":3"]
    assert items["caption_empty.jpg"].text.row("corrupt") is None
    assert findings["caption_latin1.txt"] == "text_cp1252"
    assert findings["orphan_caption.txt"] == "orphan_sidecar"
    assert findings["pillow13_behaviour.csv"] == "unlisted .csv"
    assert "html_error_page.jpg" in items


@pytest.mark.parametrize(
    ("data", "text", "is_guess"),
    [
        (b"", "", False),
        (b"\xef\xbb\xbf  a\r\nb\rc \n", "a\nb\nc", False),
        ("\ufeffgrün".encode("utf-16-le"), "grün", False),
        (b"a\x00b\x07c\x7fd\te", "abcd\te", False),
        (b"caf\xe9 \x81", "caf\xe9 \ufffd", True),
        ("ｅ\u200d😀".encode(), "ｅ\u200d😀", False),
    ],
)
def test_text_is_decoded_and_cleaned(data, text, is_guess):
    assert decode_text(data) == (text, is_guess)


def test_tag_lists():
    assert split_tags(" a b ,c_d\n\n,E, ") == (("a b", None), ("c_d", None), ("E", None))
    assert split_tags("") == ()


def test_records_are_read_field_by_field():
    record = {"tags": [{"name": "x", "category": "artist"}, "y", 1980], "rating": "nope"}
    text, bad = text_of_record(record | {"caption": 5, "repeats": "3", "license": ["a"]})
    assert text.tags == (("x", "artist"), ("y", None), ("1980", None))
    assert (text.caption, text.repeats) == ("5", 3)
    assert sorted(bad) == ["license", "rating"]
    assert text_of_record({"text": "words"})[0].caption == "words"


def test_broken_json_is_named_and_the_rest_proceeds(tmp_path):
    for name in ("a", "b", "c"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "a.json").write_text("{broken")
    (tmp_path / "b.json").write_text("[1]")
    (tmp_path / "c.json").write_text('{"caption": "fine", "rating": "?"}')
    (tmp_path / "other.json").write_text('{"version": 1}')
    items, findings, _ = listed(tmp_path)
    assert items["c.png"].text.caption == "fine"
    assert findings == {
        "a.json": "bad_json",
        "b.json": "bad_json",
        "c.json": "bad_rating",
        "other.json": "orphan_sidecar",
    }


def test_oversized_sidecars_are_not_read(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"x" * (2**20 + 1))
    items, findings, _ = listed(tmp_path)
    assert items["a.png"].text.tags == ()
    assert findings == {"a.txt": "sidecar_too_large"}


def test_what_counts_as_an_image(tmp_path):
    picture(tmp_path / "upper.JPG")
    picture(tmp_path / "plain.png").rename(tmp_path / "no_extension")
    picture(tmp_path / "ünïcode 写真.webp")
    for name in ("page.jpg", "phone.heic", "new.JXL", "README", "clip.mp4", "raw.cr2"):
        (tmp_path / name).write_bytes(b"something else")
    items, findings, _ = listed(tmp_path)
    expected = {"upper.JPG", "no_extension", "ünïcode 写真.webp"}
    assert items.keys() == expected | {"page.jpg", "phone.heic", "new.JXL"}
    assert findings == {
        "README": "unlisted",
        "clip.mp4": "unlisted .mp4",
        "raw.cr2": "unlisted .cr2",
    }


def test_junk_and_hidden_things_are_counted_not_read(tmp_path):
    for folder in (".git", "@eaDir", "__MACOSX", "old.lance", "good"):
        picture(tmp_path / folder / "a.png")
    for name in ("Thumbs.db", ".DS_Store", "._a.jpg"):
        (tmp_path / name).write_bytes(b"x")
    items, findings, _ = listed(tmp_path)
    assert list(items) == ["good/a.png"]
    assert findings.pop("old.lance") == "table"
    assert set(findings.values()) == {"hidden"}
    assert len(findings) == 6


def test_special_files_and_links_are_skipped_unopened(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no FIFOs")
    root, outside = tmp_path / "root", tmp_path / "outside"
    picture(root / "sub" / "a.png")
    picture(outside / "b.png")
    os.mkfifo(root / "pipe.jpg")
    os.mkfifo(root / "a.txt")
    (root / "loop").symlink_to(root)
    (root / "self.png").symlink_to(root / "self.png")
    (root / "dead.png").symlink_to(root / "nowhere.png")
    (root / "out").symlink_to(outside)
    (root / "out.png").symlink_to(outside / "b.png")
    (root / "again").symlink_to(root / "sub")
    (root / "inside.png").symlink_to(root / "sub" / "a.png")
    (root / "null.jpg").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(root)
        try:
            server.bind("s.jpg")
        finally:
            os.chdir(here)
        items, findings, source = listed(root)
    assert list(items) == ["inside.png", "sub/a.png"]
    assert findings == {
        "pipe.jpg": "fifo",
        "a.txt": "fifo",
        "loop": "link_loop",
        "self.png": "link_loop",
        "dead.png": "broken_link",
        "out": "outside_root",
        "out.png": "outside_root",
        "again": "linked_folder",
        "null.jpg": "outside_root",
        "s.jpg": "socket",
    }
    assert {finding.level for finding in source.findings} == {"skipped"}


def test_names_that_are_not_utf8_are_kept_readable(tmp_path):
    raw = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        os.close(os.open(raw, os.O_CREAT | os.O_WRONLY))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    items, _, _ = listed(tmp_path)
    assert list(items) == ["caf\\xe9.png"]
    items["caf\\xe9.png"].key.encode("utf-8")


def test_not_recursive(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "sub" / "b.png")
    items, findings, _ = listed(tmp_path, recursive=False)
    assert list(items) == ["a.png"]
    assert findings == {"sub": "subfolder"}


@pytest.mark.parametrize(
    ("folder", "repeats", "class_name"),
    [
        ("10_sks dog", 10, "sks dog"),
        ("3_a/nested", 3, "a"),
        ("5_outer/7_inner", 7, "inner"),
        ("2023_summer", None, None),  # a year, not 2,023 copies
        ("99999999999999999999_x", None, None),
        ("dogs", None, None),
        ("0_skip", 0, "skip"),
    ],
)
def test_kohya_folder_names(tmp_path, folder, repeats, class_name):
    picture(tmp_path / folder / "a.png")
    text = listed(tmp_path)[0][f"{folder}/a.png"].text
    assert (text.repeats, text.class_name) == (repeats, class_name)
    assert listed(tmp_path, kohya_folders=False)[0][f"{folder}/a.png"].text.repeats is None


def test_the_root_itself_may_be_a_kohya_folder(tmp_path):
    picture(tmp_path / "4_sks toy" / "a.png")
    assert listed(tmp_path / "4_sks toy")[0]["a.png"].text.repeats == 4


def test_the_same_files_give_the_same_stamp_and_an_edit_another(tmp_path):
    picture(tmp_path / "a.png")
    stamps = []
    for words in ("one, two", "one, two", "one"):
        (tmp_path / "a.txt").write_text(words)
        row = listed(tmp_path)[0]["a.png"].text.row("s")
        assert row is not None
        stamps.append(row["stamp"])
    assert stamps[0] == stamps[1] != stamps[2]


def test_a_missing_folder_or_a_file_is_said_kindly(tmp_path):
    for path, found in ((tmp_path / "gone", "does not exist"), (picture(tmp_path / "a.png"), "is")):
        with pytest.raises(DataError, match=found):
            Config(path=path).build()
    assert listed(tmp_path / "." / "")[2].name == tmp_path.name


def test_options_come_from_a_recipe(tmp_path):
    config = options(Config, ["txt=caption", "min_side=32", "name=mine"], path=str(tmp_path))
    source = config.build()
    assert source.limits.min_side == 32
    assert (source.name, source.name_is_chosen) == ("mine", True)
