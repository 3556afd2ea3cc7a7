"""Shards on the Hub: words without pictures, pictures one by one, and what of them stays here."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdprep.errors import DataError
from sdtrain import hub_shards
from sdtrain.data_section import DataSection
from sdtrain.hub_files import list_files, pinned
from sdtrain.hub_shards import HubShard, clear
from sdtrain.parquet_pages import footer_bytes, read_footer, read_pages
from sdtrain.parquet_pictures import chunk_span, picture_of_page
from tests.hub_server import HubServer
from tests.hub_sets import REPO, num_fetched, put, streaming_hub, write_noise

SECTION = DataSection(path=REPO, streaming=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise(tmp_path_factory.mktemp("sets") / "noise")


@pytest.fixture
def hub(folder: Path, tmp_path: Path) -> Iterator[HubServer]:
    with streaming_hub(tmp_path) as server:
        put(server, folder)
        yield server


def shard_of(place: Path, keep_bytes: int = 0, number: int = 0) -> HubShard:
    file = list_files(pinned(SECTION), "data")[number]
    return HubShard(file, place / file.oid, keep_bytes)


def places(shard: HubShard) -> list[tuple[int, int]]:
    """Row group and row of all pictures, in order."""
    about = pq.ParquetFile(shard.words()).metadata
    rows = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
    return [(group, row) for group, count in enumerate(rows) for row in range(count)]


def picture(shard: HubShard, group: int, row: int) -> bytes | None:
    return shard.picture(group, row, shard.read(shard.page(group, row)))


# --- the page index -------------------------------------------------------------------------------


def test_the_page_index_says_where_pages_begin(folder: Path) -> None:
    file = folder / "data" / "train-00000.parquet"
    data, parquet = file.read_bytes(), pq.ParquetFile(file)
    num_rows, spans = read_footer(data[-footer_bytes(data) :])
    assert (num_rows, len(spans)) == (parquet.metadata.num_rows, parquet.num_row_groups)
    pages = read_pages([data[offset : offset + size] for offset, size in spans])
    assert len(pages) > len(spans) > 1
    found: list[bytes | None] = []
    for group in range(len(spans)):
        about = parquet.metadata.row_group(group)
        offset, length = chunk_span(about, 1)
        own = pages[pages[:, 0] == group]
        ends = own[:, 2] + own[:, 3]
        assert own[:, 2].tolist() == [offset, *ends[:-1].tolist()]
        assert ends[-1] == offset + length
        firsts = [*own[:, 1].tolist(), about.num_rows]
        for (_, first, at, size), end in zip(own.tolist(), firsts[1:], strict=True):
            page = data[at : at + size]
            found += [picture_of_page(page, row) for row in range(end - first)]
            assert picture_of_page(page[:-1], 0) is None
    cells = pq.read_table(file, columns=["image"])["image"].to_pylist()
    assert found == [cell["bytes"] for cell in cells]


# --- words and pictures ---------------------------------------------------------------------------


def test_words_are_read_without_pictures(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    shard = shard_of(tmp_path)
    columns = ["id", "width", "captions.list.element.text", "stable_train"]
    read = pq.ParquetFile(shard.words()).read(columns=columns)
    whole = folder / "data" / shard.name
    assert read.equals(pq.ParquetFile(whole).read(columns=columns))
    assert shard.num_rows == read.num_rows
    assert num_fetched(hub) < whole.stat().st_size / 8
    before = num_fetched(hub)
    assert pq.ParquetFile(shard.words()).read().equals(pq.read_table(whole))  # also with them
    assert num_fetched(hub) > before + whole.stat().st_size / 2


def test_a_picture_is_one_read_of_its_page(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    shard = shard_of(tmp_path)
    cells = pq.read_table(folder / "data" / shard.name, columns=["image"])["image"].to_pylist()
    wanted = places(shard)
    assert len(wanted) == len(cells) > 5
    again = pickle.loads(pickle.dumps(shard))
    hub.ranges.clear()
    for (group, row), cell in reversed(list(zip(wanted, cells, strict=True))):
        assert picture(again, group, row) == cell["bytes"]
    assert len(hub.ranges) == len(cells)


def test_a_long_footer_is_read_whole(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = shard_of(tmp_path / "a")._plan[1].tolist()
    for guess in (8, 100, 12_000):
        monkeypatch.setattr(hub_shards, "_END_BYTES_GUESSED", guess)
        assert shard_of(tmp_path / str(guess))._plan[1].tolist() == pages


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compression": "snappy", "write_page_index": True}, "compressed"),
        ({"compression": "none", "use_dictionary": False}, "no page index"),
        ({"compression": "none", "write_page_index": True}, "compressed"),  # a dictionary
        ({}, "no Parquet file"),
    ],
)
def test_shards_of_another_make_are_refused(
    hub: HubServer, folder: Path, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    other = tmp_path / "other"
    (other / "data").mkdir(parents=True)
    file = other / "data" / "train-00000.parquet"
    table = pq.read_table(folder / "data" / "train-00000.parquet")
    if options:
        pq.write_table(table, file, **options)
    else:
        file.write_bytes(b"<html>not found</html>")
    put(hub, other, "another make")
    with pytest.raises(DataError, match=words) as found:
        _ = shard_of(tmp_path / "cache").num_rows
    assert "train-00000.parquet of user/photos at" in str(found.value)


def test_a_row_without_a_picture_is_none(hub: HubServer, tmp_path: Path) -> None:
    type_ = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = pa.array([{"bytes": b"one", "path": None}, None], type_)
    (tmp_path / "set" / "data").mkdir(parents=True)
    options = {"compression": "none", "use_dictionary": False, "write_page_index": True}
    pq.write_table(pa.table({"image": cells}), tmp_path / "set/data/train-00000.parquet", **options)
    put(hub, tmp_path / "set", "holes")
    shard = shard_of(tmp_path / "cache")
    assert [picture(shard, 0, row) for row in (0, 1)] == [None, None]


# --- what stays here ------------------------------------------------------------------------------


def test_pages_stay_up_to_a_limit_and_are_not_asked_again(hub: HubServer, tmp_path: Path) -> None:
    size = shard_of(tmp_path).file.size
    wanted = places(shard_of(tmp_path))
    for keep_bytes in (0, size // 2, size):
        place = tmp_path / str(keep_bytes)
        asked = []
        for _ in range(2):
            shard = shard_of(place, keep_bytes)
            _ = shard.num_rows
            before = len(hub.ranges)
            pictures = [picture(shard, group, row) for group, row in wanted]
            asked.append(len(hub.ranges) - before)
        assert None not in pictures
        kept = [file for file in shard.folder.iterdir() if file.name != "pages.npz"]
        held = sum(file.stat().st_size for file in kept)
        assert held <= keep_bytes + 16 * len(kept)
        offsets = [str(shard.page(group, row).offset) for group, row in wanted]
        not_kept = sum(offset not in {file.name for file in kept} for offset in offsets)
        assert asked == [len(kept) + not_kept, not_kept]
        if keep_bytes:
            assert held > keep_bytes / 2
    assert asked[1] == 0


def test_damage_on_this_disk_is_noticed(hub: HubServer, tmp_path: Path) -> None:
    shard = shard_of(tmp_path, 10**9)
    page = shard.page(0, 0)
    data = shard.read(page)
    file = shard.folder / str(page.offset)
    for damaged in (b"", file.read_bytes()[:-1], bytes(len(data) + 16)):
        file.write_bytes(damaged)
        assert shard.read(page) == data
        hub.ranges.clear()
        assert shard.read(page) == data
        assert not hub.ranges
    (shard.folder / "pages.npz").write_bytes(b"PK half")
    assert shard_of(tmp_path).page(0, 0) == page


def test_without_room_nothing_stays_and_nothing_fails(
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shard = shard_of(tmp_path, 10**9)
    wanted = places(shard)
    monkeypatch.setattr(hub_shards, "LEAVE_FREE_BYTES", 10**18)
    assert None not in [picture(shard, group, row) for group, row in wanted]
    assert sorted(file.name for file in shard.folder.iterdir()) == ["pages.npz", "words"]
    assert capsys.readouterr().err.count("almost full") == 1


def test_a_lower_limit_deletes_what_is_beyond(hub: HubServer, tmp_path: Path) -> None:
    shard = shard_of(tmp_path, 10**9)
    for group, row in places(shard):
        picture(shard, group, row)
    before = sorted(int(file.name) for file in shard.folder.glob("[0-9]*"))
    clear(tmp_path, [shard_of(tmp_path, before[3])])
    assert sorted(int(file.name) for file in shard.folder.glob("[0-9]*")) == before[:3]
    clear(tmp_path, [shard_of(tmp_path)])
    assert sorted(file.name for file in shard.folder.iterdir()) == ["pages.npz", "words"]


def test_shards_that_are_no_more_are_cleared(hub: HubServer, tmp_path: Path) -> None:
    shards = [shard_of(tmp_path, 10**9, number) for number in (0, 1)]
    for shard in shards:
        shard.read(shard.page(0, 0))
    clear(tmp_path, shards[:1])
    assert shards[0].folder.is_dir()
    assert not shards[1].folder.exists()
    assert np.load(shards[0].folder / "pages.npz")["rows"] == shards[0].num_rows
