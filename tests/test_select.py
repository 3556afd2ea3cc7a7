"""Selection: three-valued logic, one selection at a time, and errors that help."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from sdprep.errors import UserError
from sdprep.recipe import RecipeError, validate
from sdprep.schema import CORE
from sdprep.select import SelectConfig, select_table
from sdprep.table import PhotoTable

SIZES = [(512, 512), (256, 512), (1024, 1024), (640, 480), (2000, 100)]
SHARPNESS = [50.0, 150.0, None, 900.0, 100.0]


def ids(count: int) -> list[str]:
    return [f"{index:032x}" for index in range(count)]


@pytest.fixture
def table(tmp_path: Path) -> PhotoTable:
    """Five accepted images, one of them without a score, and one rejected at ingest."""
    table = PhotoTable.open(tmp_path / "my photos é.lance", create=True)
    rows = [
        {"id": id_, "width": width, "height": height, "format": "JPEG", "image": b"x"}
        for id_, (width, height) in zip(ids(5), SIZES, strict=True)
    ]
    rows.append({"id": "f" * 32, "reject_ingest": "truncated"})
    scores = [{"score": 5.0, "sharpness": value, "error": None} for value in SHARPNESS]
    with table.writer():
        table.add_images(pa.Table.from_pylist(rows, schema=CORE))
        table.write_fold(ids(5), {"score_technical": pa.array(scores)}, stage="score")
    return table


def reasons(table: PhotoTable) -> list[str | None]:
    return table.read(["reject_select"])["reject_select"].to_pylist()


def test_what_does_not_match_is_rejected_with_the_predicate_as_reason(table: PhotoTable) -> None:
    report = select_table(table, "width * height >= 262144")
    assert (report.kept, report.rejected, report.unknown, report.remaining) == (3, 2, 0, 3)
    why = "not (width * height >= 262144)"
    assert reasons(table) == [None, why, None, None, why, None]
    assert table.kept(["id"])["id"].to_pylist() == [ids(5)[i] for i in (0, 2, 3)]
    assert table.notes("reject_select")["where"] == "width * height >= 262144"


def test_a_missing_value_does_not_match_and_is_counted(
    table: PhotoTable, capsys: pytest.CaptureFixture[str]
) -> None:
    report = select_table(table, "score_technical.sharpness > 100")
    assert (report.kept, report.rejected, report.unknown) == (2, 3, 1)
    assert reasons(table)[2] == "missing value in (score_technical.sharpness > 100)"
    assert "1 images have no value" in capsys.readouterr().err
    allowed = "score_technical.sharpness > 100 OR score_technical.sharpness IS NULL"
    assert select_table(table, allowed).unknown == 0


def test_a_later_selection_replaces_the_earlier_one(table: PhotoTable) -> None:
    select_table(table, "width >= 1000", reason="too_narrow")
    assert reasons(table) == ["too_narrow", "too_narrow", None, "too_narrow", None, None]
    select_table(table, "height >= 200", reason="too_flat")
    assert reasons(table) == [None, None, None, None, "too_flat", None]


def test_the_same_selection_again_writes_nothing(table: PhotoTable) -> None:
    select_table(table, "width >= 1000")
    version = table.version
    select_table(table, "width >= 1000")
    assert table.version == version


def test_reset_takes_back_only_this_stages_rejections(table: PhotoTable) -> None:
    with table.writer():
        by_hand = {"reject_human": pa.array(["ugly"])}
        table.write_fold(ids(1), by_hand, stage="review")
    select_table(table, "width >= 1000")
    report = select_table(table, reset=True)
    assert (report.kept, report.rejected, report.remaining) == (5, 0, 4)
    assert reasons(table) == [None] * 6
    assert table.read(["reject_human"])["reject_human"].to_pylist()[0] == "ugly"
    assert select_table(table, "width >= 1000", reset=True).rejected == 3


def test_rows_that_another_stage_rejected_are_judged_too(table: PhotoTable) -> None:
    with table.writer():
        table.write_fold(ids(5), {"reject_human": pa.array(["ugly"] * 5)}, stage="review")
    report = select_table(table, "width >= 1000")
    assert (report.kept, report.rejected, report.remaining) == (2, 3, 0)


@pytest.mark.parametrize(
    ("where", "column", "near"),
    [
        ("widht > 2", "widht", "width"),
        ("score_technical.sharpnes > 2", "sharpnes", "score_technical.sharpness"),
        ("sharpness > 2", "sharpness", "score_technical.sharpness"),
        ("score_tecnical.sharpness > 2", "score_tecnical", "score_technical"),
    ],
)
def test_an_unknown_column_is_named_with_the_nearest(
    table: PhotoTable, where: str, column: str, near: str
) -> None:
    with pytest.raises(UserError) as error:
        select_table(table, where)
    assert repr(where) in error.value.message
    assert f"no column {column}" in error.value.message
    assert f"Did you mean {near}" in error.value.message
    assert "score_technical.sharpness" in error.value.hint
    assert "width" in error.value.hint
    assert not table.has("reject_select")


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("width >", "not valid SQL: Expected: an expression"),
        ("width > 1) OR (height > 1", "not supported SQL"),
        ("width > 1, height > 1", "not supported SQL"),
        ("width > 1; height > 1", "not valid SQL"),
        ("", "it is empty"),
        ("  ", "it is empty"),
        ("width", "does not return a boolean"),
        ("width > 'wide'", "could not convert to literal of type 'Int32'"),
        ("nosuch(width) > 1", "Invalid function 'nosuch'"),
        ("width / 0 > 1", "Divide by zero"),
    ],
)
def test_a_predicate_that_cannot_be_used_is_explained(
    table: PhotoTable, where: str, says: str
) -> None:
    with pytest.raises(UserError) as error:
        select_table(table, where)
    assert says in error.value.message
    assert ".rs:" not in str(error.value)
    assert str(error.value).count("cannot use") == 1
    assert "Columns: " in error.value.hint


def test_a_comment_at_the_end_is_harmless(table: PhotoTable) -> None:
    assert select_table(table, "width >= 1000 -- wide ones").kept == 2


def test_rejecting_everything_is_refused_and_changes_nothing(table: PhotoTable) -> None:
    select_table(table, "width >= 1000")
    before = reasons(table)
    with pytest.raises(UserError, match="all 5 would be rejected"):
        select_table(table, "width > 1000000")
    with pytest.raises(UserError, match="5 of them because a value is missing"):
        select_table(table, "exif_orientation = 1")
    assert reasons(table) == before


def test_an_empty_table_selects_nothing(tmp_path: Path) -> None:
    table = PhotoTable.open(tmp_path / "empty.lance", create=True)
    report = select_table(table, "width > 1")
    assert (report.kept, report.rejected, report.unknown, report.remaining) == (0, 0, 0, 0)


def test_no_predicate_is_an_error(table: PhotoTable) -> None:
    with pytest.raises(UserError, match="needs a predicate"):
        select_table(table)


def test_the_recipe_section_is_strict() -> None:
    assert validate({"where": "width > 1"}, SelectConfig, "r").reason is None
    with pytest.raises(RecipeError, match="where"):
        validate({"were": "width > 1"}, SelectConfig, "r")


def test_rejecting_what_stands_for_its_duplicates_is_said(
    table: PhotoTable, capsys: pytest.CaptureFixture[str]
) -> None:
    gave_way = pa.array([None, f"duplicate_of:{ids(1)[0]}", None, None, None], pa.string())
    with table.writer():
        table.write_fold(ids(5), {"reject_duplicates": gave_way}, stage="dedup")
    select_table(table, "width > 600")
    assert "1 images were kept for their duplicates" in " ".join(capsys.readouterr().err.split())
    select_table(table, "width >= 512")
    assert "kept for their duplicates" not in capsys.readouterr().err
