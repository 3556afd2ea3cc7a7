"""Published folders read where they lie: ids, digests, pictures out of Parquet, the index."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from threading import Event
from time import sleep
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from sdprep.errors import DataError
from sdprep.prepared_files import ShardWriter, prepared_schema
from sdprep.prompt_policy import PromptPolicy
from sdprep.seeding import integer
from sdtrain import prepared_copying
from sdtrain.dataset import TrainingData, open_data
from sdtrain.ids import Ids
from sdtrain.parquet_pictures import Place, _walk, chunk_span, read_picture
from sdtrain.prepared_data import PreparedRows
from sdtrain.recipe import DataSection
from sdtrain.text_columns import RECORD_COLUMNS, SCHEMA, canonical, digest_sum, records, total
from tests.train_data import prepared_row, write_prepared

SCHEMA_OF_RECORDS = pa.schema([SCHEMA.field(n) for n in ("width", "height", *RECORD_COLUMNS)])
NAMES = st.text(st.sampled_from("ab\0é#界"), max_size=12)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache of ours")


def opened(path: Path, *, with_boxes: bool = False) -> TrainingData:
    return open_data(DataSection(path=str(path)), PromptPolicy(), with_boxes=with_boxes)


# --- ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [["aaaaaaaa2", "aaaaaaaa1", "b2345678é", "aaaaaaaa1"], ["b", "a"]]
)
def test_ids_of_one_length_sort_as_strings_do(names: list[str]) -> None:
    ids = Ids.of(names)
    assert [names[row] for row in ids.order] == sorted(names)
    assert ids.first_twice() == (None if len(names) == 2 else "aaaaaaaa1")
    assert Ids([pa.array(["x", *names])[1:]]).prefixes.tolist() == ids.prefixes.tolist()


@settings(max_examples=80, deadline=None)
@given(st.lists(NAMES, max_size=30), st.lists(NAMES, max_size=10), st.integers(0, 30))
def test_ids_are_a_sequence_of_strings_that_sorts_and_finds(
    names: list[str], others: list[str], cut: int
) -> None:
    chunks = [pa.array(part, pa.string()) for part in (names[:cut], names[cut:])]
    ids = Ids(chunks)
    assert (len(ids), list(ids), ids[:]) == (len(names), names, names)
    assert [ids[at] for at in range(-len(names), len(names))] == names * 2
    in_order = [names[row] for row in ids.order]
    assert in_order == sorted(names)
    twice = [a for a, b in zip(in_order, in_order[1:], strict=False) if a == b]
    assert ids.first_twice() == (twice[0] if twice else None)
    assert ids.rows_in(Ids.of(others)) == [r for r, name in enumerate(names) if name in others]
    assert set(ids.rows_of(others)) == set(names) & set(others)
    assert ids.ranks(7, "probe", "x").tolist() == [integer(7, "probe", "x", n) for n in names]


# --- the digest -----------------------------------------------------------------------------------


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    kept = [f for f in prepared_schema() if f.name in ("id", "caption", "captions", "tags")]
    return pa.Table.from_pylist(rows, schema=pa.schema(kept))


def test_the_digest_of_rows_adds_up_and_sees_every_change() -> None:
    tags = [{"name": "cat", "category": "general"}, {"name": "dog", "category": "general"}]
    rows: list[dict[str, Any]] = [
        {"id": "a", "caption": "one", "captions": [{"text": "x", "source": "human"}], "tags": tags},
        {"id": "b", "caption": None, "captions": None, "tags": []},
        {"id": "c", "caption": "", "captions": [], "tags": tags[:1]},
    ]
    whole = digest_sum(table_of(rows)).tolist()
    assert digest_sum(table_of(rows[::-1])).tolist() == whole
    assert total(digest_sum(table_of([row])) for row in rows).tolist() == whole
    sliced = table_of([*rows, *rows]).slice(2, 3)
    assert digest_sum(sliced).tolist() == whole
    changes: list[dict[str, Any]] = [
        {"id": "d"},
        {"caption": "two"},
        {"caption": None},
        {"captions": [{"text": "x", "source": "other"}]},
        {"tags": tags[::-1]},
        {"tags": [{"name": "catdog", "category": "general"}]},
    ]
    seen = {tuple(digest_sum(table_of([{**rows[0], **c}, *rows[1:]]))) for c in changes}
    assert len(seen | {tuple(whole)}) == len(changes) + 1


# --- pictures -------------------------------------------------------------------------------------


def published(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    """A folder whose shards `sdprep publish` writes, in groups of a few rows."""
    write_prepared(folder, [], **options)
    writer = ShardWriter(folder / "data", "train", 1)
    writer.group_rows = 7
    for row in rows:
        writer.add(row)
    writer.close()
    return folder


def test_pictures_of_published_shards_are_found_by_walking_pages(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    sizes = [0, 1, 5, 300_000, 2_000, 1_300_000, 4, 70_000, 900_000, 12]
    rows = [prepared_row(n) for n in range(len(sizes))]
    for row, size in zip(rows, sizes, strict=True):
        row["image"] = {"bytes": rng.bytes(size), "path": "x.png"}
    folder = published(tmp_path / "a set", rows)
    found = PreparedRows(opened(folder).train._parts)  # type: ignore[attr-defined]
    files = set()
    for at, row in enumerate(rows):
        place = found._place(at)
        files.add(place.file)
        with place.file.open("rb") as file:
            assert _walk(file, place) == row["image"]["bytes"]
    assert len(files) > 1


def test_other_parquet_is_read_by_the_row_group(tmp_path: Path) -> None:
    cells = [{"bytes": b"one", "path": None}, None, {"bytes": b"three", "path": "p"}]
    table = pa.table({"image": pa.array(cells, prepared_schema().field("image").type)})
    plain = {"compression": "none", "use_dictionary": False}
    for name, options in (("usual", {}), ("plain", plain)):
        file = tmp_path / f"{name}.parquet"
        pq.write_table(table, file, **options)
        group = pq.ParquetFile(file).metadata.row_group(0)
        places = [Place(file, 0, row, *chunk_span(group, 0)) for row in range(3)]
        assert [read_picture(place) for place in places] == [b"one", None, b"three"]


# --- the index ------------------------------------------------------------------------------------


def test_rows_of_many_shards_come_back_in_any_order(tmp_path: Path) -> None:
    rows = [prepared_row(n, caption=f"caption {n} é", source=f"s{n % 3}") for n in range(23)]
    data = opened(published(tmp_path / "set", rows)).train
    wanted = [22, 3, 3, 0, 14, 9]
    assert [record["caption"] for record in data.records(wanted)] == [
        rows[n]["caption"] for n in wanted
    ]
    again = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 2_000
    assert again.records(wanted) == data.records(wanted)
    assert again.sizes_hw.tolist() == [[row["height"], row["width"]] for row in rows]
    assert data.sources(wanted) == [rows[n].get("source") for n in wanted]
    assert again.image(14).tobytes() == data.image(14).tobytes()


def test_records_are_what_arrow_says(tmp_path: Path) -> None:
    tags = [{"name": "cat", "category": "general"}, {"name": "dog", "category": "artist"}]
    rows = [prepared_row(0, tags=tags), prepared_row(1, tags=None, captions=[]), prepared_row(2)]
    table = pa.Table.from_pylist(rows, schema=prepared_schema())
    batch = canonical(table).cast(SCHEMA_OF_RECORDS).to_batches()[0]
    expected = batch.to_pylist()
    expected[1]["tags"] = []
    assert records(batch) == expected
    assert expected[0]["tags"] == tags
    data = opened(write_prepared(tmp_path / "set", rows)).train
    sizes = [{"width": row["width"], "height": row["height"]} for row in rows]
    assert [{**r, **s} for r, s in zip(data.records([0, 1, 2]), sizes, strict=True)] == expected


def test_growth_reads_only_the_new_shards(tmp_path: Path) -> None:
    rows = [prepared_row(n) for n in range(6)]
    folder = write_prepared(tmp_path / "set", rows[:3])
    before = {part.rows for part in opened(folder).train._parts}  # type: ignore[attr-defined]
    more = pa.Table.from_pylist(rows[3:], schema=prepared_schema())
    pq.write_table(more, folder / "data" / "train-00001.parquet")
    data = opened(folder)
    after = {part.rows for part in data.train._parts}  # type: ignore[attr-defined]
    assert len(after) == 2
    assert before < after
    assert data.train.ids == [row["id"] for row in rows]


def test_an_edited_shard_is_read_again_and_its_old_index_is_deleted(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", [prepared_row(0, caption="before")])
    first = opened(folder)
    assert first.train.records([0])[0]["caption"] == "before"
    part = first.train._parts[0]  # type: ignore[attr-defined]
    old = [part.rows, part.groups, part.facts, part.copy("texts")]
    assert all(file.is_file() for file in old)
    data = opened(write_prepared(folder, [prepared_row(0, caption="behind")]))
    assert data.train.records([0])[0]["caption"] == "behind"
    assert data.fingerprint != first.fingerprint
    assert not any(file.exists() for file in old)


def test_boxes_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", [prepared_row(0), prepared_row(1, boxes=[BOX])])
    assert opened(folder).train.boxes([1, 0]) == [[], []]
    assert opened(folder, with_boxes=True).train.boxes([1, 0]) == [[BOX], []]


def test_a_half_written_index_is_made_again(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", [prepared_row(0)])
    part = opened(folder).train._parts[0]  # type: ignore[attr-defined]
    part.facts.unlink()
    part.rows.write_bytes(b"half")
    assert opened(folder).train.records([0])[0]["id"] == prepared_row(0)["id"]
    assert json.loads(part.facts.read_text(encoding="utf-8"))["rows"] == 1


# --- the fingerprint ------------------------------------------------------------------------------


def test_the_fingerprint_does_not_depend_on_which_file_holds_which_group(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([prepared_row(n) for n in range(6)], schema=prepared_schema())
    one, two = write_prepared(tmp_path / "one", []), write_prepared(tmp_path / "elsewhere/two", [])
    pq.write_table(table, one / "data" / "train-00000.parquet", row_group_size=3)
    pq.write_table(table.slice(3), two / "data" / "train-00000.parquet")
    pq.write_table(table.slice(0, 3), two / "data" / "train-00001.parquet")
    assert opened(one).fingerprint == opened(two).fingerprint


TAG = {"name": "cat", "category": "general", "score": 0.5, "source": "wd"}
BOX = {"label": "watermark", "score": 0.5, "x0": 0.0, "y0": 0.0, "x1": 0.5, "y1": 0.25}


@pytest.mark.parametrize(
    ("changed", "is_seen"),
    [
        ({"id": "another"}, True),
        ({"width": 81}, True),
        ({"height": 113}, True),
        ({"caption": "photo number 1 of a cat"}, True),
        ({"caption": None}, True),
        ({"captions": [{"text": "photo number 1 of a dog", "source": "humans"}]}, True),
        ({"tags": [{**TAG, "name": "cow"}]}, True),
        ({"tags": [{**TAG, "category": "artist"}]}, True),
        ({"score": 9}, True),
        ({"group_id": "group9"}, True),
        ({"repeats": 2}, True),
        ({"tags": [{**TAG, "score": 0.25}]}, False),
        ({"source": "elsewhere", "license": "CC0"}, False),
        ({"boxes": [BOX]}, False),
    ],
)
def test_the_fingerprint_sees_what_training_reads(
    tmp_path: Path, changed: dict[str, Any], is_seen: bool
) -> None:
    rows = [prepared_row(0), prepared_row(1, tags=[TAG])]
    first = opened(published(tmp_path / "a", rows)).fingerprint
    edited = opened(published(tmp_path / "b", [rows[0], {**rows[1], **changed}])).fingerprint
    assert (edited != first) == is_seen


# --- texts that are not copied yet ----------------------------------------------------------------


def large(folder: Path, num_rows: int = 23) -> tuple[Path, list[dict[str, Any]]]:
    """A set of several shards with several groups each."""
    rows = [
        prepared_row(n, caption=f"caption {n} é", source=f"s{n % 3}", tags=[TAG] * (n % 3))
        for n in range(num_rows)
    ]
    write_prepared(folder, [])
    table = pa.Table.from_pylist(rows, schema=prepared_schema())
    for shard, start in enumerate(range(0, num_rows, 10)):
        file = folder / "data" / f"train-{shard:05d}.parquet"
        pq.write_table(table.slice(start, 10), file, row_group_size=3)
    return folder, rows


def copies(data: TrainingData) -> list[bool]:
    return [part.copy("texts").is_file() for part in data.train._parts]  # type: ignore[attr-defined]


@pytest.fixture
def _all_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_copying, "AT_ONCE_ROWS", 0)


@pytest.mark.usefixtures("_all_is_large")
def test_texts_read_from_shards_are_those_of_the_copy(tmp_path: Path) -> None:
    data = opened(large(tmp_path / "set")[0])
    wanted = [22, 3, 3, 0, 14, 9, 10, 1, 20]
    assert not any(copies(data))
    direct, sources = data.train.records(wanted), data.train.sources(wanted)
    data.train.copying.wait()  # type: ignore[attr-defined]
    assert copies(data) == [True] * 3
    again = opened(tmp_path / "set").train
    assert (again.records(wanted), again.sources(wanted)) == (direct, sources)
    assert [record["caption"] for record in direct] == [f"caption {n} é" for n in wanted]
    assert sources == [f"s{n % 3}" for n in wanted]
    data.train._parts[1].copy("texts").unlink()  # type: ignore[attr-defined]
    mixed = opened(tmp_path / "set").train
    assert (mixed.records(wanted), mixed.sources(wanted)) == (direct, sources)


@pytest.mark.usefixtures("_all_is_large")
def test_a_start_and_other_processes_copy_nothing(tmp_path: Path) -> None:
    data = opened(large(tmp_path / "set")[0])
    sent = pickle.loads(pickle.dumps(data.train))
    assert sent.records([4, 2])[1]["caption"] == "caption 2 é"
    assert sent.copying is None
    assert not any(copies(data))


def test_a_small_set_is_copied_before_its_first_text_is_handed_out(tmp_path: Path) -> None:
    data = opened(large(tmp_path / "set")[0])
    assert not any(copies(data))
    data.train.records([4])
    assert copies(data) == [True] * 3


@pytest.mark.usefixtures("_all_is_large")
def test_copying_that_is_stopped_leaves_whole_parts_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = large(tmp_path / "set")
    data = opened(folder)
    copying, columns = data.train.copying, data.train.texts  # type: ignore[attr-defined]
    batches, begun = columns._batches, Event()

    def slow(part: Any) -> Any:
        for batch in batches(part):
            if part is columns.parts[1]:
                begun.set()
                copying._is_over.wait()
            yield batch

    monkeypatch.setattr(prepared_copying, "_MOST_THREADS", 1)
    monkeypatch.setattr(columns, "_batches", slow)
    data.train.records([0])
    assert begun.wait(120)
    copying.stop()
    cache = columns.parts[0].stem.parent
    assert copies(data) == [True, False, False]
    assert list(cache.glob(".*.texts")) == []
    left = cache / f".{columns.parts[1].stem.name}-1.texts"
    left.write_bytes(b"of a process that was killed")
    again = opened(folder)
    again.train.records([0])
    again.train.copying.wait()  # type: ignore[attr-defined]
    assert copies(again) == [True] * 3
    assert not left.exists()


@pytest.mark.usefixtures("_all_is_large")
def test_one_process_copies_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_copying, "_AGAIN_S", 0.01)
    data = opened(large(tmp_path / "set")[0])
    cache = data.train._parts[0].stem.parent  # type: ignore[attr-defined]
    with FileLock(cache / "copying.lock"):
        assert data.train.records([22])[0]["caption"] == "caption 22 é"
        sleep(0.1)
        assert not any(copies(data))
    data.train.copying.wait()  # type: ignore[attr-defined]
    assert copies(data) == [True] * 3


@pytest.mark.usefixtures("_all_is_large")
def test_a_text_that_cannot_be_read_stops_the_run_when_copying_finds_it(tmp_path: Path) -> None:
    folder, rows = large(tmp_path / "set")
    file = folder / "data" / "train-00002.parquet"
    table = pq.read_table(file)
    captions = pa.array([b"fine", b"\xff no text", b"fine"], pa.binary())
    at = table.column_names.index("caption")
    pq.write_table(table.set_column(at, "caption", captions), file)
    data = opened(folder)
    assert data.train.records([0])[0]["id"] == rows[0]["id"]
    data.train.copying.wait()  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"train-00002\.parquet: column caption is binary"):
        data.train.records([0])


@pytest.mark.usefixtures("_all_is_large")
def test_without_room_for_a_copy_texts_are_read_from_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(part: Any, is_over: Any) -> bool:
        raise OSError(28, "No space left on device")

    data = opened(large(tmp_path / "set")[0])
    monkeypatch.setattr(data.train.texts, "write", full)  # type: ignore[attr-defined]
    for _ in range(2):
        assert data.train.records([22])[0]["caption"] == "caption 22 é"
        data.train.copying.wait()  # type: ignore[attr-defined]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("No space left on device") == 1
    assert "read out of the shards" in said


# --- what cannot be trained on --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("repeats", pa.array([1.0, 2.5]), "row 1: image .* repeats = 2.5"),
        ("repeats", pa.array([1, 0]), "row 1: image .* repeats = 0"),
        ("repeats", pa.array([1, -3]), "repeats = -3"),
        ("repeats", pa.array([1, 10**9]), "repeats = 1000000000"),
        ("repeats", pa.array([1.0, float("nan")]), "repeats = nan"),
        ("repeats", pa.array(["1", "many"]), "repeats = '"),
        ("repeats", pa.array([True, False]), "repeats = True"),
        ("score", pa.array([1.0, 2.5]), "column score"),
        ("tags", pa.array([1, 2]), "column tags"),
        ("id", pa.array(["a", None]), "row 1 has no id"),
        ("width", pa.array([None, 3]), "row 0 has no width"),
        ("height", pa.array([3, None]), "row 1 has no height"),
        ("width", pa.array([3, -3]), "row 1 has width = -3"),
    ],
)
def test_rows_that_make_no_sense_are_refused_by_name(
    tmp_path: Path, column: str, values: Any, words: str
) -> None:
    folder = write_prepared(tmp_path / "set", [prepared_row(0), prepared_row(1)])
    file = folder / "data" / "train-00000.parquet"
    table = pq.read_table(file)
    at = table.column_names.index(column)
    pq.write_table(table.set_column(at, column, values), file)
    with pytest.raises(DataError, match=words) as found:
        opened(folder)
    assert "train-00000.parquet" in str(found.value)


def test_repeats_may_be_missing_or_whole_numbers_of_any_type(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", [prepared_row(n) for n in range(3)])
    file = folder / "data" / "train-00000.parquet"
    table = pq.read_table(file)
    at = table.column_names.index("repeats")
    pq.write_table(table.set_column(at, "repeats", pa.array([None, 3.0, 1.0])), file)
    assert opened(folder).train.repeats.tolist() == [1, 3, 1]
    pq.write_table(table.drop_columns(["repeats"]), file)
    assert opened(folder).train.repeats.tolist() == [1, 1, 1]


def test_files_that_are_no_parquet_are_named(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", [prepared_row(0)])
    (folder / "data" / "train-00001.parquet").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"train-00001\.parquet is no Parquet file"):
        opened(folder)
