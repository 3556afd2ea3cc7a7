"""Published folders read where they lie: ids, digests, pictures out of Parquet, the index."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdprep.errors import DataError
from sdprep.prepared_files import ShardWriter, prepared_schema
from sdprep.prompt_policy import PromptPolicy
from sdprep.seeding import integer
from sdtrain.dataset import TrainingData, open_data
from sdtrain.ids import Ids
from sdtrain.parquet_pictures import Place, _walk, chunk_span, read_picture
from sdtrain.prepared_data import PreparedRows
from sdtrain.recipe import DataSection
from sdtrain.text_columns import SCHEMA, digest_sum, records, total
from tests.train_data import prepared_row, write_prepared

NAMES = st.text(st.sampled_from("ab\0é#界"), max_size=12)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache of ours")


def opened(path: Path, *, with_boxes: bool = False) -> TrainingData:
    return open_data(DataSection(path=str(path)), PromptPolicy(), with_boxes=with_boxes)


# --- ids ------------------------------------------------------------------------------------------


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
    (part,) = opened(write_prepared(tmp_path / "set", rows)).train._parts  # type: ignore[attr-defined]
    batch = pa.ipc.open_file(str(part.texts)).get_batch(0).select(SCHEMA.names)
    expected = batch.to_pylist()
    expected[1]["tags"] = []
    assert records(batch) == expected
    assert expected[0]["tags"] == tags


def test_growth_reads_only_the_new_shards(tmp_path: Path) -> None:
    rows = [prepared_row(n) for n in range(6)]
    folder = write_prepared(tmp_path / "set", rows[:3])
    before = {part.texts for part in opened(folder).train._parts}  # type: ignore[attr-defined]
    more = pa.Table.from_pylist(rows[3:], schema=prepared_schema())
    pq.write_table(more, folder / "data" / "train-00001.parquet")
    data = opened(folder)
    after = {part.texts for part in data.train._parts}  # type: ignore[attr-defined]
    assert len(after) == 2
    assert before < after
    assert data.fingerprint == opened(write_prepared(tmp_path / "other", rows)).fingerprint


def test_an_edited_shard_is_read_again_and_its_old_index_is_deleted(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", [prepared_row(0, caption="before")])
    first = opened(folder)
    old = first.train._parts[0].texts  # type: ignore[attr-defined]
    data = opened(write_prepared(folder, [prepared_row(0, caption="behind")]))
    assert data.train.records([0])[0]["caption"] == "behind"
    assert data.fingerprint != first.fingerprint
    assert not old.exists()


def test_boxes_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    box = {"label": "watermark", "score": 0.5, "x0": 0.0, "y0": 0.0, "x1": 0.5, "y1": 0.25}
    folder = write_prepared(tmp_path / "set", [prepared_row(0), prepared_row(1, boxes=[box])])
    assert opened(folder).train.boxes([1, 0]) == [[], []]
    assert opened(folder, with_boxes=True).train.boxes([1, 0]) == [[box], []]


def test_a_half_written_index_is_made_again(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", [prepared_row(0)])
    part = opened(folder).train._parts[0]  # type: ignore[attr-defined]
    part.facts.unlink()
    part.texts.write_bytes(b"half")
    assert opened(folder).train.records([0])[0]["id"] == prepared_row(0)["id"]
    assert json.loads(part.facts.read_text(encoding="utf-8"))["rows"] == 1


# --- what cannot be trained on --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("repeats", pa.array([1.0, 2.5]), "repeats = 2.5"),
        ("repeats", pa.array([1, 0]), "repeats = 0"),
        ("repeats", pa.array([1, -3]), "repeats = -3"),
        ("repeats", pa.array([1, 10**9]), "repeats = 1000000000"),
        ("repeats", pa.array([1.0, float("nan")]), "repeats = nan"),
        ("repeats", pa.array(["1", "many"]), "repeats = '"),
        ("repeats", pa.array([True, False]), "repeats = True"),
        ("score", pa.array([1.0, 2.5]), "column score"),
        ("tags", pa.array([1, 2]), "column tags"),
        ("id", pa.array(["a", None]), "no id"),
        ("width", pa.array([None, 3]), "no width"),
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
