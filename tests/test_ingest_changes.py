"""Ingest over time: edited text, linked files, other sources, too many bad files, kills."""

from __future__ import annotations

import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from sdprep import ingest as ingest_module
from sdprep.errors import DataError
from sdprep.ingest import ingest
from sdprep.ingest_report import IngestReport, TooManyRejected
from sdprep.origins import name_for
from sdprep.seeding import rng_for
from sdprep.source_item import Finding, ItemText, Limits, SourceItem
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


# --- text ---------------------------------------------------------------------------------------


def test_an_edited_sidecar_updates_its_row_only(table, photos):
    (photos / "1.txt").write_text("a, b")
    (photos / "2.txt").write_text("c")
    run(table, photos)
    one, two = id_of(photos / "1.png"), id_of(photos / "2.png")
    with table.writer():
        fields = pa.schema([pa.field("tags", pa.string())])
        table.ensure_annotator("tags_sidecar", fields, "v1")
        done = pa.array([{"tags": "x", "error": None}] * 2, table.schema.field("tags_sidecar").type)
        table.update_rows([one, two], {"tags_sidecar": done})
    (photos / "1.txt").write_text("a, changed")
    report = run(table, photos)
    assert (report.updated, report.added) == (1, 0)
    names = [tag["name"] for tag in rows(table)[one]["text"]["tags"]]
    assert names == ["a", "changed"]
    kept = table.read(["id", "tags_sidecar"]).to_pylist()
    assert {row["id"] for row in kept if row["tags_sidecar"] is not None} == {two}
    version = table.version
    assert run(table, photos).updated == 0
    assert table.version == version


def test_sidecars_that_come_and_go(table, photos):
    run(table, photos)
    one = id_of(photos / "1.png")
    (photos / "1.caption").write_text("new")
    assert run(table, photos).updated == 1
    assert rows(table)[one]["text"]["caption"] == "new"
    (photos / "1.caption").unlink()
    assert run(table, photos).updated == 1
    assert rows(table)[one]["text"] is None
    version = table.version
    assert run(table, photos).updated == 0
    assert table.version == version


def test_another_source_never_takes_a_text_away(table, photos, tmp_path):
    (photos / "1.txt").write_text("mine")
    run(table, photos)
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.png").write_bytes((photos / "1.png").read_bytes())
    assert run(table, other).updated == 0
    (other / "x.txt").write_text("yours")
    report = run(table, other)
    assert report.warnings == {"text_conflict": ["x.png"]}
    assert rows(table)[id_of(photos / "1.png")]["text"]["tags"][0]["name"] == "mine"


# --- linked images ------------------------------------------------------------------------------


def test_linked_images_are_read_from_their_files(table, photos):
    report = run(table, photos, storage="link")
    assert report.storage == "link"
    one = id_of(photos / "1.png")
    assert table.count("image IS NOT NULL") == 0
    assert rows(table)[one]["image_uri"] == str(photos / "1.png")
    assert table.image_bytes([one])[one] == (photos / "1.png").read_bytes()
    assert run(table, photos).storage == "link"  # auto goes on as the table does


def test_linked_files_that_change_vanish_or_move(table, photos):
    (photos / "copy.png").write_bytes((photos / "4.png").read_bytes())
    run(table, photos, storage="link")
    ids = {number: id_of(photos / f"{number}.png") for number in range(6)}
    picture(photos / "1.png", 91)
    (photos / "2.png").unlink()
    (photos / "sub").mkdir()
    (photos / "3.png").rename(photos / "sub" / "moved.png")
    (photos / "4.png").unlink()
    report = run(table, photos)
    assert (report.superseded, report.gone) == (1, 3)
    found = rows(table)
    assert found[ids[1]]["reject_ingest"] == "source_changed"
    assert found[ids[2]]["reject_ingest"] == "missing_file"
    assert found[ids[3]]["image_uri"] == str(photos / "sub" / "moved.png")
    assert found[ids[4]]["image_uri"] == str(photos / "copy.png")
    good = [id_ for id_, row in found.items() if row["reject_ingest"] is None]
    assert len(table.image_bytes(good)) == len(good) == 5
    version = table.version
    run(table, photos)
    assert table.version == version
    picture(photos / "2.png", 2)  # it comes back
    assert run(table, photos).already_present == 6
    assert rows(table)[ids[2]]["reject_ingest"] is None


def test_auto_links_what_is_too_large_to_copy(table, photos, monkeypatch, capsys):
    monkeypatch.setattr(ingest_module, "EMBED_LIMIT_BYTES", 1000)
    assert run(table, photos).storage == "link"
    assert "storage=link" in capsys.readouterr().err


# --- too much is unusable -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("good", "bad", "stops"),
    [(4, 1, False), (3, 1, False), (8, 2, False), (7, 2, True), (0, 1, True), (1, 2, True)],
)
def test_a_fifth_of_bad_files_stops_but_one_never_does(table, tmp_path, good, bad, stops):
    folder = tmp_path / "mixed"
    for number in range(good):
        picture(folder / f"{number}.png", number)
    folder.mkdir(exist_ok=True)
    for number in range(bad):
        (folder / f"bad{number}.png").write_bytes(b"junk %d" % number)
    if not stops:
        assert run(table, folder).rejected == bad
        return
    for _ in range(2):  # a second run comes to the same verdict
        with pytest.raises(TooManyRejected, match="not_an_image: bad0.png") as caught:
            run(table, folder)
        report = caught.value.report
        assert (report.rejected, report.found) == (bad, good + bad)
    assert table.count("reject_ingest IS NULL") == good  # nothing of the rest is lost
    assert run(table, folder, max_rejected_share=1.0).rejected == bad


# --- sources of other kinds ---------------------------------------------------------------------


class Stream:
    """A source without files or totals, as a tar or a Hub data set is."""

    name, place, name_is_chosen = "stream", "hf://user/stream", False
    limits = Limits()

    def __init__(self, items: list[SourceItem]) -> None:
        self.items = items
        self.findings = [Finding("missing", "bad_metadata_line", "meta.jsonl:3")]

    def totals(self) -> None:
        return None

    def iter_samples(self):
        return iter(self.items)


def test_a_stream_of_bytes_is_ingested(table, photos):
    def item(number: int) -> SourceItem:
        data = (photos / f"{number}.png").read_bytes()
        return SourceItem(f"part/{number}", load=lambda: data, text=ItemText(caption=str(number)))

    report = ingest(table, Stream([item(n) for n in range(6)]), storage="link")
    assert (report.found, report.added, report.rejected) == (7, 6, 1)
    assert table.count("image IS NOT NULL") == 6  # there is no file to link
    again = ingest(table, Stream([item(n) for n in range(6)]))
    assert (again.added, again.already_present) == (0, 6)
    assert [row["text"]["caption"] for row in rows(table).values()] == list("012345")


def test_sources_of_one_name_are_told_apart(table, tmp_path):
    for number, folder in enumerate(("a/img", "b/img")):
        picture(tmp_path / folder / "0.png", number)
    assert run(table, tmp_path / "a/img").source == "img"
    assert run(table, tmp_path / "b/img").source == "img-2"
    assert run(table, tmp_path / "a/img").source == "img"
    assert table.count("reject_ingest IS NULL") == 2
    (tmp_path / "a").rename(tmp_path / "moved")
    report = run(table, tmp_path / "moved/img")
    assert (report.source, report.added, report.already_present) == ("img", 0, 1)


def test_names_of_sources(tmp_path):
    table = tmp_path / "t.lance"
    assert name_for(table, "x", "hf://a/x") == "x"
    assert name_for(table, "x", "hf://b/x") == "x-2"
    assert name_for(table, "x", "hf://b/x") == "x-2"
    assert name_for(table, "x", "hf://c/x", is_chosen=True) == "x"
    (tmp_path / "t.sources.json").write_text("[]")
    with pytest.raises(DataError, match="damaged"):
        name_for(table, "x", "hf://a/x")


# --- stopping in the middle ---------------------------------------------------------------------


def test_an_interrupt_keeps_what_is_done(table, photos, monkeypatch):
    source = Config(path=photos).build()
    original = source.iter_samples

    def interrupted():
        for number, item in enumerate(original()):
            if number == 4:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(source, "iter_samples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ingest(table, source, num_threads=1)
    kept = table.count()
    assert 0 < kept <= 4
    assert run(table, photos).added == 6 - kept


_KILLED = """
import os, sys
from pathlib import Path
from sdprep import ingest_rows
from sdprep.ingest import ingest
from sdprep.sources.folder import Config
from sdprep.table import PhotoTable
ingest_rows._FLUSH_BYTES = 60_000
flush, count = ingest_rows.RowBook.flush, 0
def counted(book):
    global count
    flush(book)
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
ingest_rows.RowBook.flush = counted
ingest(PhotoTable.open(sys.argv[2], create=True), Config(path=Path(sys.argv[1])).build())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_a_killed_run_goes_on_where_it_was(tmp_path, photos):
    for number in range(10, 30):
        picture(photos / f"{number}.png", number)
    path = tmp_path / "k.lance"
    for kills in (1, 2):
        command = [sys.executable, "-c", _KILLED, str(photos), str(path), str(kills)]
        assert subprocess.run(command, check=False).returncode == -9
    table = PhotoTable.open(path)
    before = table.count()
    assert 0 < before < 26
    report = run(table, photos)
    assert (report.added, report.already_present) == (26 - before, before)
    order = [row["sources"][0]["key"] for row in table.read(["sources"]).to_pylist()]
    assert order == sorted(order)
