"""Source `imagefolder`: the lists that load_dataset reads; names of folders mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from sdprep.cli import app
from sdprep.sources import folder, imagefolder
from sdprep.table import PhotoTable

ROWS = [
    {"file_name": "a b.jpg", "text": 'A dog, "Rex", sits.', "tags": "dog, grass"},
    {"file_name": "ü.jpg", "text": "Zwei Zeilen\nTëxt.", "tags": ""},
    {"file_name": "gone.jpg", "text": "Nobody.", "tags": ""},
]


def write_folder(root: Path, kind: str) -> Path:
    images = root / "10_dogs"
    images.mkdir(parents=True)
    for number, name in enumerate(("a b.jpg", "ü.jpg", "bare.jpg")):
        Image.new("RGB", (70, 64 + number), (number, 9, 9)).save(images / name)
    path = images / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    elif kind == "csv":
        lines = ["file_name,text,tags"]
        for row in ROWS:
            quoted = row["text"].replace('"', '""')
            lines.append(f'{row["file_name"]},"{quoted}","{row["tags"]}"')
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    (images / f"other.{kind}").write_bytes(b"x,y")
    return root


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("module", [imagefolder, folder])
def test_every_kind_of_list_gives_the_same_text(tmp_path, kind, module):
    source = module.Config(path=write_folder(tmp_path / "some images", kind)).build()
    items = {item.key: item.text for item in source.iter_samples()}
    assert list(items) == ["10_dogs/a b.jpg", "10_dogs/bare.jpg", "10_dogs/ü.jpg"]
    first = items["10_dogs/a b.jpg"]
    assert first.caption == 'A dog, "Rex", sits.'
    assert [name for name, _ in first.tags] == ["dog", "grass"]
    assert items["10_dogs/ü.jpg"].caption == "Zwei Zeilen\nTëxt."
    assert items["10_dogs/bare.jpg"].caption is None
    repeats = {item.repeats for item in items.values()}
    assert repeats == ({None} if module is imagefolder else {10})
    assert {(f.kind, f.key) for f in source.findings} == {
        ("missing_file", "10_dogs/gone.jpg"),
        (f"unlisted .{kind}", f"10_dogs/other.{kind}"),
    }


@pytest.mark.parametrize(
    ("name", "data", "kind", "key"),
    [
        ("metadata.parquet", b"PAR1 no", "bad_parquet", "metadata.parquet"),
        ("metadata.csv", b"text\nno names\n", "bad_metadata_line", "metadata.csv:2"),
        ("metadata.csv", b"file_name,text\na.jpg,x,y\n", "bad_metadata_line", "metadata.csv:2"),
        ("metadata.csv", b"", None, None),
    ],
)
def test_a_broken_list_is_named_and_the_images_stay(tmp_path, name, data, kind, key):
    Image.new("RGB", (70, 70)).save(tmp_path / "a.jpg")
    (tmp_path / name).write_bytes(data)
    source = imagefolder.Config(path=tmp_path).build()
    assert [item.key for item in source.iter_samples()] == ["a.jpg"]
    assert [(f.kind, f.key) for f in source.findings] == ([(kind, key)] if kind else [])


def test_the_command_line_takes_it(tmp_path):
    photos = write_folder(tmp_path / "in", "csv")
    table = tmp_path / "t.lance"
    result = CliRunner().invoke(
        app, ["ingest", str(photos), str(table), "--type", "imagefolder", "--json"]
    )
    assert result.exit_code == 0, result.output
    texts = PhotoTable.open(table).read(["text.caption"])["text.caption"].to_pylist()
    assert sorted(filter(None, texts)) == ['A dog, "Rex", sits.', "Zwei Zeilen\nTëxt."]
