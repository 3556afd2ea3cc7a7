"""The source `webdataset`: shards of others, broken shards, and our own export read back."""

from __future__ import annotations

import io
import json
import tarfile
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from sdprep.cli import app
from sdprep.errors import DataError
from sdprep.export import export
from sdprep.exports.webdataset import Config as Export
from sdprep.ingest import ingest
from sdprep.source_item import SourceItem
from sdprep.sources.folder import Config as Folder
from sdprep.sources.webdataset import Config
from sdprep.table import PhotoTable


def picture(number: int, format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (80, 64), (number * 20 % 256, 90, 30)).save(file, format)
    return file.getvalue()


def tar(path: Path, members: list[tuple[str, bytes | str | dict[str, Any]]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as made:
        for name, content in members:
            content = json.dumps(content) if isinstance(content, dict) else content
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return path


def read(path: Path, **options: Any) -> tuple[dict[str, SourceItem], list[tuple[str, str, str]]]:
    source = Config(path=path, **options).build()
    items = {item.key: item for item in source.iter_samples()}
    sizes = [item.num_bytes or 0 for item in items.values()]
    assert source.totals() == (len(items), sum(sizes))
    return items, [(found.level, found.kind, found.key) for found in source.findings]


def test_members_are_grouped_by_name_up_to_the_first_dot(tmp_path: Path) -> None:
    tar(
        tmp_path / "b.tar",
        [
            ("x/1.jpg", picture(1)), ("x/1.txt", "\ufeffa red thing\r\n"), ("x/1.cls", "7"),
            ("y/1.jpg", picture(2)), ("y/1.json", {"caption": "two", "tags": "a, b", "key": "1"}),
            ("0.seg.png", picture(3, "PNG")), ("0.jpg", picture(4)), ("0.png", picture(5, "PNG")),
            ("0.txt", "zero"),
        ],
    )  # fmt: skip
    tar(tmp_path / "a" / "00.tar", [("1.webp", picture(6, "WEBP"))])
    items, findings = read(tmp_path)
    assert list(items) == [
        "a/00.tar/1.webp", "b.tar/x/1.jpg", "b.tar/y/1.jpg", "b.tar/0.jpg", "b.tar/0.png",
    ]  # fmt: skip
    assert items["b.tar/x/1.jpg"].text.caption == "a red thing"
    assert items["b.tar/x/1.jpg"].text.class_name == "7"
    assert items["b.tar/y/1.jpg"].text.tags == (("a", None), ("b", None))
    assert items["b.tar/0.png"].text.caption == items["b.tar/0.jpg"].text.caption == "zero"
    load = items["b.tar/y/1.jpg"].load
    assert load is not None
    assert load() == picture(2)
    assert findings == [("ignored", "unlisted .seg.png", "b.tar/0.seg.png")]


def test_text_members_may_hold_tags(tmp_path: Path) -> None:
    shard = tar(
        tmp_path / "s.tar",
        [
            ("1.jpg", picture(1)), ("1.txt", "a, b c"),
            ("2.jpg", picture(2)), ("2.txt", "ann, b c"),
            ("2.json", {"tags": [{"name": "ann", "category": "artist"}, {"name": "b_c"}]}),
        ],
    )  # fmt: skip
    items, _ = read(shard, txt="tags")
    assert items["s.tar/1.jpg"].text.tags == (("a", None), ("b c", None))
    assert items["s.tar/1.jpg"].text.caption is None
    assert items["s.tar/2.jpg"].text.tags == (("ann", "artist"), ("b_c", None))


def test_nothing_is_unpickled_or_followed_and_the_rest_counts(tmp_path: Path) -> None:
    shard = tar(
        tmp_path / "s.tar",
        [
            ("1.jpg", picture(1)), ("1.pyd", b"cos\nsystem\n"), ("1.jpg", picture(2)),
            ("2.jpg", picture(3)), ("2.json", "[1]"), ("3.jpg", picture(4)), ("3.json", "{"),
            ("._4.jpg", b"mac"), ("../../5.jpg", picture(5)), ("README", "hello"),
        ],
    )  # fmt: skip
    with tarfile.open(shard, "a") as made:
        link = tarfile.TarInfo("6.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        made.addfile(link)
    items, findings = read(shard)
    assert list(items) == [f"s.tar/{name}.jpg" for name in ("1", "2", "3", "../../5")]
    load = items["s.tar/1.jpg"].load
    assert load is not None
    assert load() == picture(1)
    assert findings == [
        ("warning", "pickle_member", "s.tar/1.pyd"),
        ("warning", "duplicate_member", "s.tar/1.jpg"),
        ("ignored", "hidden", "s.tar/._4.jpg"),
        ("ignored", "unlisted", "s.tar/README"),
        ("skipped", "no_plain_member", "s.tar/6.jpg"),
        ("warning", "bad_json", "s.tar/2.json"),
        ("warning", "bad_json", "s.tar/3.json"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.tar"]


def test_a_shard_that_breaks_off_gives_what_came_before(tmp_path: Path) -> None:
    shard = tar(tmp_path / "s.tar", [("1.jpg", picture(1)), ("2.jpg", picture(2) * 9)])
    with tarfile.open(shard) as whole:
        end = whole.getmembers()[1].offset_data + 700
    shard.write_bytes(shard.read_bytes()[:end])
    (tmp_path / "no.tar").write_bytes(b"\x1f\x8b no tar at all" * 99)
    items, findings = read(tmp_path)
    assert list(items) == ["s.tar/1.jpg"]
    assert ("missing", "broken_shard", "no.tar") in findings
    assert {kind for level, kind, key in findings if "s.tar" in key} & {"truncated", "broken_shard"}


def test_no_shard_is_said(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(picture(1))
    for path, said in (
        (tmp_path, "no .tar shard"),
        (tmp_path / "photo.jpg", "no .tar file"),
        (tmp_path / "gone", "does not exist"),
    ):
        with pytest.raises(DataError, match=said):
            Config(path=path).build()


def test_an_export_comes_back_with_the_same_ids_captions_and_tags(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    beside = {
        "1.txt": "only, tags", "2.caption": "only a caption", "3.txt": "both", "3.caption": "b\nc",
        "4.json": json.dumps({"tags": [{"name": "a, b", "category": "artist"}], "rating": "e"}),
    }  # fmt: skip
    for name, text in beside.items():
        (folder / name).write_text(text, "utf-8")
    for number in range(1, 6):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    table = PhotoTable.open(tmp_path / "t.lance", create=True)
    ingest(table, Folder(path=folder).build())
    export(table, tmp_path / "shards", Export())
    run = CliRunner().invoke(
        app, ["ingest", str(tmp_path / "shards"), str(tmp_path / "b.lance"), "--type", "webdataset"]
    )
    assert run.exit_code == 0, run.output
    back = PhotoTable.open(tmp_path / "b.lance")
    fields = ["caption", "tags", "rating", "license"]

    def said(of: PhotoTable) -> dict[str, list[Any]]:
        rows = of.read(["id", "text"]).to_pylist()
        return {row["id"]: [(row["text"] or {}).get(field) for field in fields] for row in rows}

    assert said(back) == said(table)
    assert blake2b(picture(1), digest_size=16).hexdigest() in said(back)
    again = ingest(back, Config(path=tmp_path / "shards").build())
    assert (again.added, again.already_present) == (0, 5)
