"""The table keeps every row, commits once, survives conflicts, takes back one column at a time."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from sdprep.annotate import ColumnReport, PixelNeeds, Sample, annotate
from sdprep.commits import commit_updates
from sdprep.errors import DataError, UserError
from sdprep.history import history, stage, undo
from sdprep.schema import CORE, TAG
from sdprep.table import PhotoTable


def image_id(number: int) -> str:
    return f"{number:032x}"


def png(number: int, side: int = 8) -> bytes:
    pixels = np.full((side, side, 3), (number * 37 % 256, number * 11 % 256, 7), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def rows(numbers: range, reject: dict[int, str] | None = None) -> pa.Table:
    reject = reject or {}
    records = [
        {
            "id": image_id(n),
            "image": None if n in reject else png(n),
            "width": 8,
            "height": 8,
            "format": "PNG",
            "mode": "RGB",
            "frames": 1,
            "exif_orientation": 1,
            "has_alpha": False,
            "sources": [{"source": "folder", "key": f"{n}.png", "num_bytes": 1, "mtime_ns": 1}],
            "reject_ingest": reject.get(n),
        }
        for n in numbers
    ]
    return pa.Table.from_pylist(records, schema=CORE)


@pytest.fixture
def table(tmp_path: Path) -> PhotoTable:
    table = PhotoTable.open(tmp_path / "photos.lance", create=True)
    with stage(table, "ingest", "ingest photos"):
        table.add_images(rows(range(10), {0: "truncated"}))
        table.add_images(rows(range(10, 15)))
    return table


class Brightness:
    """A small real annotator: mean of the pixels."""

    columns = pa.schema([("mean", pa.float32()), ("width", pa.int32())])
    pixels = PixelNeeds()
    fingerprint = "brightness 1"
    batch_size = 4
    is_thread_safe = True

    def __init__(self, fail: set[str] | None = None, fingerprint: str = "brightness 1") -> None:
        self.fail = fail or set()
        self.seen: list[str] = []
        self.fingerprint = fingerprint
        self.guard = threading.Lock()

    def annotate(self, batch: list[Sample]) -> pa.RecordBatch:
        values = []
        for sample in batch:
            if sample.id in self.fail:
                raise ValueError("no such luck")
            with self.guard:
                self.seen.append(sample.id)
            assert sample.image is not None
            values.append({"mean": float(np.asarray(sample.image).mean()), "width": 8})
        return pa.RecordBatch.from_pylist(values, schema=self.columns)


def expected_mean(number: int) -> float:
    return (number * 37 % 256 + number * 11 % 256 + 7) / 3


def test_rows_come_back_in_order_of_arrival_and_rejected_ones_stay(table: PhotoTable) -> None:
    found = table.read(["id", "reject_ingest"])
    assert found["id"].to_pylist() == [image_id(n) for n in range(15)]
    assert found["reject_ingest"].to_pylist() == ["truncated"] + [None] * 14
    assert table.kept(["id"]).num_rows == 14
    assert table.count("reject_ingest = 'truncated'") == 1


def test_load_dataset_opens_the_table_even_when_its_first_row_is_rejected(
    table: PhotoTable, tmp_path: Path
) -> None:
    import datasets

    data = datasets.load_dataset(str(table.path), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(data) == 15
    pictures = {row["id"]: row["image"] for row in data}
    assert pictures[image_id(0)] is None
    assert pictures[image_id(3)].size == (8, 8)


def test_annotators_fill_only_what_is_null(table: PhotoTable) -> None:
    first = Brightness()
    assert _counts(annotate(table, {"score_mean": first})) == [("score_mean", 14, 0, 0)]
    again = Brightness()
    assert _counts(annotate(table, {"score_mean": again})) == [("score_mean", 0, 14, 0)]
    assert again.seen == []
    with table.writer():
        table.add_images(rows(range(15, 18)))
    more = Brightness()
    assert _counts(annotate(table, {"score_mean": more})) == [("score_mean", 3, 14, 0)]
    assert sorted(more.seen) == [image_id(n) for n in range(15, 18)]
    values = table.read(["score_mean.mean"])["score_mean.mean"].to_pylist()
    assert values[0] is None
    assert values[1:] == pytest.approx([expected_mean(n) for n in range(1, 18)], abs=1e-4)


def _counts(reports: list[ColumnReport]) -> list[tuple[str, int, int, int]]:
    return [(r.column, r.done, r.skipped, r.failed) for r in reports]


def test_a_failing_sample_keeps_its_error_and_does_not_fail_its_batch(table: PhotoTable) -> None:
    report = annotate(table, {"score_mean": Brightness(fail={image_id(5)})})[0]
    assert (report.done, report.failed) == (13, 1)
    row = table.read(["id", "score_mean"], f"id = '{image_id(5)}'").to_pylist()[0]
    assert row["score_mean"] == {"mean": None, "width": None, "error": "ValueError: no such luck"}
    assert annotate(table, {"score_mean": Brightness()})[0].skipped == 14
    healed = Brightness()
    assert annotate(table, {"score_mean": healed}, retry_failed=True)[0].done == 1
    assert healed.seen == [image_id(5)]


def test_two_annotators_with_different_gaps_share_one_pass(table: PhotoTable) -> None:
    annotate(table, {"score_a": Brightness()}, where="ordinal < 6")
    a, b = Brightness(), Brightness()
    annotate(table, {"score_a": a, "score_b": b})
    assert sorted(a.seen) == [image_id(n) for n in range(6, 15)]
    assert sorted(b.seen) == [image_id(n) for n in range(1, 15)]
    found = table.read(["score_a.mean", "score_b.mean"])
    assert found["score_a.mean"].to_pylist() == found["score_b.mean"].to_pylist()


def test_too_many_failures_stop_the_run_and_keep_what_is_done(tmp_path: Path) -> None:
    table = PhotoTable.open(tmp_path / "t.lance", create=True)
    with table.writer():
        table.add_images(rows(range(60)))
    bad = {image_id(n) for n in range(30)}
    with pytest.raises(UserError, match="images failed.*no such luck"):
        annotate(table, {"score_mean": Brightness(fail=bad)})
    assert table.count("score_mean.error IS NOT NULL") > 20


def test_other_options_are_refused_and_redo_replaces(table: PhotoTable) -> None:
    annotate(table, {"score_mean": Brightness()})
    with pytest.raises(UserError, match="made with other options: brightness 1") as caught:
        annotate(table, {"score_mean": Brightness(fingerprint="brightness 2")})
    assert "--redo" in caught.value.hint
    assert "--as" in caught.value.hint
    renewed = Brightness(fingerprint="brightness 2")
    annotate(table, {"score_mean": renewed}, redo=True)
    assert len(renewed.seen) == 14
    assert table.notes("score_mean") == {"fingerprint": "brightness 2"}


def test_a_fold_writes_nothing_when_nothing_changes(table: PhotoTable) -> None:
    ids = [image_id(n) for n in range(1, 15)]
    tags = [[{"name": "cat", "category": "general", "score": 1.0, "source": "sidecar"}]] * 14
    values = {
        "split": pa.array(["train"] * 14),
        "tags": pa.array(tags, pa.list_(TAG)),
    }
    with table.writer():
        table.write_fold(ids, values, stage="split", notes={"certificate": "{}"})
        version = table.version
        table.write_fold(list(reversed(ids)), values, stage="split", notes={"certificate": "{}"})
        assert table.version == version
        table.write_fold(ids[1:], {"split": pa.array(["train"] * 13)}, stage="split")
    found = table.read(["split", "tags"]).to_pylist()
    assert [row["split"] for row in found] == [None, None] + ["train"] * 13
    assert found[2]["tags"] == tags[0]
    assert table.notes("split") == {"stage": "split"}


def test_undo_takes_back_one_column_and_leaves_later_work_in_others(table: PhotoTable) -> None:
    ids = [image_id(n) for n in range(15)]
    for stage_name, column, value in (
        ("split", "split", "train"),
        ("select", "reject_select", "dull"),
        ("split", "split", "validation"),
    ):
        with stage(table, stage_name, f"{stage_name} {value}"):
            table.write_fold(ids, {column: pa.array([value] * 15)}, stage=stage_name)
    with table.writer():
        table.add_images(rows(range(15, 17)))
    assert [s.name for s in history(table)] == ["ingest", "split", "select", "split"]
    undo(table, "split")
    assert table.read(["split"])["split"].to_pylist() == ["train"] * 15 + [None] * 2
    assert table.read(["reject_select"])["reject_select"].to_pylist()[:15] == ["dull"] * 15
    undo(table, "split")
    assert not table.has("split")
    assert table.has("reject_select")
    with pytest.raises(UserError, match="no stage changed split"):
        undo(table, "split")
    assert undo(table).name == "select"
    assert not table.has("reject_select")


def test_undo_of_an_ingest_removes_the_rows_it_added(table: PhotoTable) -> None:
    with stage(table, "ingest", "ingest more"):
        table.add_images(rows(range(15, 20)))
    undo(table)
    assert table.read(["id"])["id"].to_pylist() == [image_id(n) for n in range(15)]
    with table.writer():
        table.add_images(rows(range(20, 21)))
    assert table.read(["ordinal"])["ordinal"].to_pylist() == list(range(16))


def test_a_conflicting_commit_is_applied_again_and_loses_nothing(table: PhotoTable) -> None:
    ids = pa.array([image_id(n) for n in range(10)])
    with table.writer():
        table.add_columns([pa.field("mine", pa.string()), pa.field("theirs", pa.string())])
        stale = table.dataset
        table.commit({0: pa.table({"id": ids, "theirs": pa.array(["t"] * 10)})})
        first_two = pa.table({"id": ids[:2], "mine": pa.array(["other"] * 2)})
        table.commit({0: first_two})
    mine = pa.table({"id": ids, "mine": pa.array(["m"] * 10)})
    commit_updates(stale, {0: mine}, only_open=True)
    table.refresh()
    found = table.read(["mine", "theirs"], "ordinal < 10")
    assert found["mine"].to_pylist() == ["other"] * 2 + ["m"] * 8
    assert found["theirs"].to_pylist() == ["t"] * 10


def test_a_table_whose_making_was_killed_can_be_made_again(tmp_path: Path) -> None:
    path = tmp_path / "photos.lance"
    (path / "_versions").mkdir(parents=True)
    (path / "_versions/.tmp4mTo7e").write_bytes(b"half a manifest")
    with pytest.raises(DataError, match="there is no table"):
        PhotoTable.open(path)
    assert PhotoTable.open(path, create=True).count() == 0
    (tmp_path / "other.lance").mkdir()
    (tmp_path / "other.lance/keep.txt").write_text("mine")
    with pytest.raises(DataError, match="is no table"):
        PhotoTable.open(tmp_path / "other.lance", create=True)


def test_a_second_writer_is_told_who_holds_the_table(table: PhotoTable) -> None:
    script = (
        "import sys; from sdprep.table import PhotoTable\n"
        "t = PhotoTable.open(sys.argv[1])\n"
        "with t.writer(): print('ready', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(table.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    with pytest.raises(DataError, match=f"process {holder.pid}"), table.writer():
        pass
    holder.kill()
    holder.wait()
    with table.writer():
        pass


def test_bad_predicates_and_names_are_explained(table: PhotoTable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="widht"):
        table.count("widht > 5")
    with pytest.raises(DataError) as caught:
        table.read(["widht"])
    assert "width" in caught.value.hint
    with pytest.raises(DataError, match="there is no table"):
        PhotoTable.open(tmp_path / "none.lance")
    with pytest.raises(DataError, match="no table name"):
        PhotoTable.open(tmp_path / "none", create=True)


def test_the_journal_survives_a_torn_line_and_undoes(table: PhotoTable) -> None:
    journal = table.journal()
    first = journal.append({"action": "add_tag", "id": image_id(1), "tag": "cat"})
    second = journal.append({"action": "add_tag", "id": image_id(1), "tag": "dog"})
    taken_back = journal.undo(first)
    assert [action["tag"] for action in journal.fold()] == ["dog"]
    journal.undo(taken_back)
    assert [action["tag"] for action in journal.fold()] == ["cat", "dog"]
    with journal.path.open("ab") as file:
        file.write(b'{"action": "add_t')
    journal.append({"action": "reject", "id": image_id(2)})
    assert [action["action"] for action in journal.fold()] == ["add_tag", "add_tag", "reject"]
    assert second == 1
    with pytest.raises(DataError):
        journal.undo(99)
    assert all(json.loads(line) for line in journal.path.read_text().splitlines()[:4])
