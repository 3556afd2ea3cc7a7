"""The split of a real table, its certificate, and a check that catches every kind of leak."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdprep.assignment import JOINED_VALIDATION, TRAIN, VALIDATION
from sdprep.certificate import restated, verify
from sdprep.errors import DataError, RecipeError, UserError
from sdprep.recipe import validate
from sdprep.schema import CORE
from sdprep.seeding import digest, integer, rng_for
from sdprep.split import SplitConfig, split_table
from sdprep.split_rows import table_rows
from sdprep.strata import StratumColumns
from sdprep.table import PhotoTable

SIZES = [(1024, 1024), (832, 1216), (1216, 832)]
NOTES = {"images": 0, "settings": {"near": True, "stands_alone": 16}, "edges": {"near_close": 3}}


def ids_of(count: int, start: int = 0) -> list[str]:
    return [digest("photo", index) for index in range(start, start + count)]


def add(table: PhotoTable, ids: list[str], source: str = "photos") -> None:
    folders = ("held", "rest", "rest", "rest")
    rows = [
        {
            "id": id_, "image": b"x", "width": SIZES[row % 3][0], "height": SIZES[row % 3][1],
            "format": "JPEG", "text": {"split": "test" if row % 5 == 0 else "train"},
            "sources": [{"source": source, "key": f"{folders[row % 4]}/{id_}.jpg"}],
        }
        for row, id_ in enumerate(ids)
    ]  # fmt: skip
    with table.writer():
        table.add_images(pa.Table.from_pylist(rows, schema=CORE))


def signature(*key: object) -> bytes:
    bits = rng_for("signature", *key).integers(0, 256, 16).astype(np.uint8)
    bits[15] &= 0xFE
    return bits.tobytes()


def group(table: PhotoTable, groups: dict[str, str], same: dict[str, str] | None = None) -> None:
    """Stand in for dedup: group ids, and signatures that `same` makes nearly equal."""
    ids = table.read(["id"], "reject_ingest IS NULL")["id"].to_pylist()
    signs = [bytearray(signature((same or {}).get(id_, id_))) for id_ in ids]
    for id_, sign in zip(ids, signs, strict=True):
        sign[0] ^= integer(id_) & 3  # up to two bits
    values = {
        "group_id": pa.array([groups.get(id_, id_) for id_ in ids]),
        "signature": pa.array(map(bytes, signs), pa.binary(16)),
    }
    with table.writer():
        table.write_fold(ids, values, stage="dedup", notes={"duplicates": json.dumps(NOTES)})


def reject(table: PhotoTable, ids: list[str]) -> None:
    with table.writer():
        values = {"reject_human": pa.array(["ugly"] * len(ids), pa.string())}
        table.write_fold(ids, values, stage="review")


@pytest.fixture
def table(tmp_path: Path) -> PhotoTable:
    """A hundred images in pairs and singles, and one that ingest rejected."""
    table = PhotoTable.open(tmp_path / "photos é.lance", create=True)
    add(table, ids_of(100))
    with table.writer():
        broken = [{"id": "f" * 32, "reject_ingest": "truncated"}]
        table.add_images(pa.Table.from_pylist(broken, schema=CORE))
    group(table, pairs_of(ids_of(100)))
    return table


def pairs_of(ids: list[str]) -> dict[str, str]:
    """Each even row of the first forty is grouped with the next."""
    return {id_: min(ids[row // 2 * 2], ids[row // 2 * 2 + 1]) for row, id_ in enumerate(ids[:40])}


def column(table: PhotoTable, name: str) -> dict[str, Any]:
    rows = table.read(["id", name])
    return dict(zip(rows["id"].to_pylist(), rows[name].to_pylist(), strict=True))


def overwrite(table: PhotoTable, id_: str, name: str, value: Any) -> None:
    with table.writer():
        table.update_rows([id_], {name: pa.array([value])})


# --- the table --------------------------------------------------------------------------------


def test_the_table_is_split_and_certified(table: PhotoTable) -> None:
    report = split_table(table, SplitConfig(seed=5))
    sides = column(table, "split")
    assert sides.pop("f" * 32) is None
    assert report.train + report.validation == 100
    assert list(sides.values()).count(VALIDATION) == report.validation
    assert report.groups == 80
    assert report.certificate["k"] == 8
    assert report.validation <= 8
    assert report.to_json()["certificate"] == json.loads(table.notes("split")["certificate"])
    pairs = pairs_of(ids_of(100))
    assert all(sides[id_] == sides[least] for id_, least in pairs.items())
    found = verify(table)
    assert found.ok, found.problems
    assert (found.train, found.validation, found.groups) == (report.train, report.validation, 80)
    assert found.min_distance == report.certificate["cross_split"]["min_distance"] > 16


def test_the_certificate_says_all_that_is_promised(table: PhotoTable) -> None:
    report = split_table(table, SplitConfig(validation=0.1, seed=5))
    found = report.certificate
    assert (found["seed"], found["mode"], found["v"], found["k"], found["n"]) == (
        5, "proportion", "0.1", 10, 100,
    )  # fmt: skip
    assert found["counts"] == {TRAIN: report.train, VALIDATION: report.validation}
    sizes = found["groups"]["sizes"]
    counted = sum(size * count for side in sizes.values() for size, count in side)
    assert counted == 100
    assert sum(count for side in sizes.values() for _, count in side) == 80
    strata = found["strata"]["counts"]
    assert set(strata) == {f"photos | {w}x{h}" for w, h in SIZES}
    assert sum(side[VALIDATION] for side in strata.values()) == report.validation
    assert found["duplicates"] == NOTES
    assert len(found["digests"]) == 2
    assert found["table_version"] < table.version
    closest = found["cross_split"]["closest"]
    assert len(closest) == 20
    assert [pair["distance"] for pair in closest] == sorted(pair["distance"] for pair in closest)


def test_the_closest_pairs_are_the_closest(table: PhotoTable) -> None:
    closest = split_table(table).certificate["cross_split"]["closest"]
    rows = table_rows(table, None)
    bits = np.unpackbits(rows.signatures, axis=1).astype(int)
    side = np.array(rows.splits)
    held, trained = np.flatnonzero(side == VALIDATION), np.flatnonzero(side == TRAIN)
    distances = (bits[held][:, None] != bits[trained][None]).sum(2)
    assert [pair["distance"] for pair in closest] == sorted(distances.ravel().tolist())[:20]
    first = closest[0]
    where = rows.ids.index(first[VALIDATION]), rows.ids.index(first[TRAIN])
    assert (bits[where[0]] != bits[where[1]]).sum() == first["distance"]


def test_stable_train_is_as_large_as_validation_and_in_train(table: PhotoTable) -> None:
    report = split_table(table)
    sides, stable = column(table, "split"), column(table, "stable_train")
    marked = [id_ for id_, flag in stable.items() if flag]
    assert len(marked) == report.validation
    assert {sides[id_] for id_ in marked} == {TRAIN}
    train = [id_ for id_ in ids_of(100) if sides[id_] == TRAIN]
    lowest = sorted(train, key=lambda id_: integer(0, "stable_train", id_))
    assert set(marked) == set(lowest[: len(marked)])


def test_splitting_again_writes_nothing(table: PhotoTable) -> None:
    first = split_table(table)
    version = table.version
    again = split_table(table)
    assert table.version == version
    assert again.certificate == first.certificate


def test_rejected_images_take_no_place_and_come_back_where_they_were(table: PhotoTable) -> None:
    first = split_table(table, SplitConfig(validation_count=20))
    before = column(table, "split")
    held = [id_ for id_, side in before.items() if side == VALIDATION]
    reject(table, held[:5])
    second = split_table(table, SplitConfig(validation_count=20))
    assert second.certificate["n"] == 95
    assert second.validation == first.validation - 5
    reject(table, [])
    third = split_table(table, SplitConfig(validation_count=20))
    assert column(table, "split") == before
    assert third.certificate["counts"] == first.certificate["counts"]


def test_growth_moves_none_and_rejects_what_a_new_photo_joins(table: PhotoTable) -> None:
    split_table(table, SplitConfig(validation=0.2))
    before = column(table, "split")
    grown = ids_of(160)
    add(table, grown[100:], source="more")
    singles = grown[40:100]
    held = next(id_ for id_ in singles if before[id_] == VALIDATION)
    trained = next(id_ for id_ in singles if before[id_] == TRAIN)
    bridge = grown[100]
    least = min(held, trained, bridge)
    groups = pairs_of(grown) | dict.fromkeys((held, trained, bridge), least)
    group(table, groups, same=dict.fromkeys((held, trained, bridge), "one photo"))
    report = split_table(table, SplitConfig(validation=0.2))
    after = column(table, "split")
    assert {id_: after[id_] for id_ in before} == before
    assert after[bridge] == VALIDATION
    reasons = {id_: why for id_, why in column(table, "reject_split").items() if why}
    assert reasons == {trained: JOINED_VALIDATION}
    assert report.rejected == 1
    assert report.certificate["n"] == 159
    assert report.certificate["conflicts"]["first"][0]["train"] == [trained]
    assert verify(table).ok


def test_another_seed_changes_nothing_until_redo(table: PhotoTable) -> None:
    split_table(table, SplitConfig(seed=1))
    first = column(table, "split")
    split_table(table, SplitConfig(seed=2))
    assert column(table, "split") == first
    split_table(table, SplitConfig(seed=2), redo=True)
    assert column(table, "split") != first
    assert verify(table).ok


def test_without_dedup_every_image_is_its_own_group_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = PhotoTable.open(tmp_path / "plain.lance", create=True)
    add(table, ids_of(20))
    report = split_table(table)
    assert (report.train, report.validation, report.groups) == (17, 3, 20)
    assert "duplicates were never looked for" in capsys.readouterr().err
    assert report.certificate["cross_split"]["min_distance"] is None
    found = verify(table)
    assert found.ok
    assert "no signatures" in found.notes[0]


def test_images_newer_than_dedup_are_warned_of(table: PhotoTable) -> None:
    add(table, ids_of(3, start=500))
    report = split_table(table)
    assert any("3 images came after" in said for said in report.warnings)


def test_an_empty_table_splits_into_nothing(tmp_path: Path) -> None:
    table = PhotoTable.open(tmp_path / "empty.lance", create=True)
    report = split_table(table)
    assert (report.train, report.validation, report.groups) == (0, 0, 0)
    assert any("no image" in said for said in report.warnings)


def test_score_bands_make_strata(table: PhotoTable) -> None:
    ids = ids_of(100)
    scores = [{"score": value, "error": None} for value in [9.0, 2.0, 5.0, float("nan"), None] * 20]
    with table.writer():
        table.write_fold(ids, {"score_technical": pa.array(scores)}, stage="score")
    config = SplitConfig(stratify=("score",))
    counts = split_table(table, config).certificate["strata"]["counts"]
    assert {name: sum(sides.values()) for name, sides in counts.items()} == {
        "high": 20, "low": 20, "middle": 20, "unscored": 40,
    }  # fmt: skip
    plan = StratumColumns.of(table, (), 1024)
    assert plan.names(table.read(["id"])) == ["all"] * 101


def test_leaks_that_dedup_has_not_seen_are_warned_of(table: PhotoTable) -> None:
    """Two images look alike and are in different groups, because dedup did not run again."""
    ids = ids_of(100)
    group(table, {}, same=dict.fromkeys(ids[50:], "one photo"))
    report = split_table(table, SplitConfig(validation=0.5))
    assert any("look like duplicates" in said for said in report.warnings)
    assert not verify(table).ok


# --- by hand ----------------------------------------------------------------------------------


def test_manual_source_split(table: PhotoTable) -> None:
    report = split_table(table, SplitConfig(manual="source"))
    sides, ids = column(table, "split"), ids_of(100)
    pairs = pairs_of(ids)
    tests = {pairs.get(id_, id_) for id_ in ids[::5]}
    assert {id_ for id_ in ids if sides[id_] == VALIDATION} == {
        id_ for id_ in ids if pairs.get(id_, id_) in tests
    }
    assert report.certificate["mode"] == "manual"
    assert report.certificate["conflicts"]["count"] == 8  # of 20 pairs those with a test image
    assert any("test counts as validation" in said for said in report.warnings)
    assert verify(table).ok


def test_manual_ids_and_folder(table: PhotoTable, tmp_path: Path) -> None:
    ids = ids_of(100)
    listed = tmp_path / "held out.txt"
    listed.write_text(f"# mine\n{ids[60]}\n\n{ids[61].upper()}\nnonsense\n", encoding="utf-8-sig")
    report = split_table(table, SplitConfig(manual=f"ids:{listed}"))
    sides = column(table, "split")
    assert sorted(id_ for id_ in ids if sides[id_] == VALIDATION) == sorted(ids[60:62])
    assert any("1 lines" in said and "nonsense" in said for said in report.warnings)
    split_table(table, SplitConfig(manual="folder:held/"), redo=True)
    sides = column(table, "split")
    assert [sides[id_] for id_ in ids[40:48]] == [VALIDATION, TRAIN, TRAIN, TRAIN] * 2


def test_manual_column_of_booleans(table: PhotoTable) -> None:
    flags = pa.array([row in (70, 71) for row in range(100)])
    with table.writer():
        table.write_fold(ids_of(100), {"is_probe": flags}, stage="mine")
    assert split_table(table, SplitConfig(manual="is_probe")).validation == 2


@pytest.mark.parametrize(
    ("manual", "says"),
    [
        ("spilt", "no column spilt"),
        ("split", "what this stage writes"),
        ("width", "needs text or true and false"),
        ("format", r"'jpeg' \(100 images\), which names no side"),
        ("image_uri", "is empty"),
        ("ids:nowhere.txt", "cannot read"),
        ("folder:helt", "did you mean held"),
    ],
)
def test_manual_mistakes_are_explained(table: PhotoTable, manual: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        split_table(table, SplitConfig(manual=manual))
    assert not table.has("split")


# --- the check --------------------------------------------------------------------------------


def move_one(table: PhotoTable) -> None:
    id_ = next(id_ for id_, side in column(table, "split").items() if side == VALIDATION)
    overwrite(table, id_, "split", TRAIN)


def swap_two(table: PhotoTable) -> None:
    """Counts stay as they are."""
    sides = column(table, "split")
    for side, other in ((TRAIN, VALIDATION), (VALIDATION, TRAIN)):
        overwrite(table, next(i for i in ids_of(100)[40:] if sides[i] == side), "split", other)


def tear_a_group(table: PhotoTable) -> None:
    overwrite(table, ids_of(1)[0], "split", VALIDATION)
    overwrite(table, ids_of(2)[1], "split", TRAIN)


def forget_one(table: PhotoTable) -> None:
    overwrite(table, ids_of(1)[0], "split", None)


def regroup_one(table: PhotoTable) -> None:
    overwrite(table, ids_of(100)[99], "group_id", ids_of(100)[98])


def reject_one(table: PhotoTable) -> None:
    reject(table, ids_of(1))


def add_one(table: PhotoTable) -> None:
    add(table, ids_of(1, start=900))


def mark_validation_as_stable(table: PhotoTable) -> None:
    id_ = next(id_ for id_, side in column(table, "split").items() if side == VALIDATION)
    overwrite(table, id_, "stable_train", True)


def resize_one(table: PhotoTable) -> None:
    with table.writer():
        table.update_rows(ids_of(1), {"width": pa.array([4000])})


def make_twins(table: PhotoTable) -> None:
    sides = column(table, "split")
    two = [next(i for i in ids_of(100)[40:] if sides[i] == side) for side in (TRAIN, VALIDATION)]
    for id_ in two:
        overwrite(table, id_, "signature", signature("twins"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (move_one, "holds"),
        (swap_two, "side of an image has changed"),
        (tear_a_group, "duplicate groups are on both sides"),
        (forget_one, "have no side"),
        (regroup_one, "group of an image has changed"),
        (reject_one, "certified are"),
        (add_one, "have no side"),
        (mark_validation_as_stable, "marked stable_train"),
        (resize_one, "images of the strata"),
        (make_twins, "0 bits apart"),
    ],
)
def test_every_kind_of_damage_is_caught(table: PhotoTable, damage: Any, says: str) -> None:
    split_table(table, SplitConfig(validation=0.2))
    assert verify(table).ok
    damage(table)
    found = verify(table)
    assert not found.ok
    assert any(says in problem for problem in found.problems), found.problems
    assert found.to_json()["ok"] is False


def test_a_table_without_a_certificate_cannot_be_checked(table: PhotoTable, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split certificate"):
        verify(table)
    with pytest.raises(DataError, match="no table and no published folder"):
        verify(tmp_path / "nowhere")


def publish(table: PhotoTable, folder: Path, format_: str = "parquet") -> Path:
    """The columns that a published folder must have for the check, without its images."""
    rows = table.kept(["id", "split", "group_id", "signature", "stable_train"])
    (folder / "data").mkdir(parents=True)
    for side in (TRAIN, VALIDATION):
        part = rows.filter(pa.compute.equal(rows["split"], side)).drop_columns("split")
        if format_ == "parquet":
            half = part.num_rows // 2
            pq.write_table(part[:half], folder / "data" / f"{side}-00000.parquet")
            pq.write_table(part[half:], folder / "data" / f"{side}-00001.parquet")
        else:
            import lance

            lance.write_dataset(part, str(folder / f"{side}.lance"))
    said = {"certificate": json.loads(table.notes("split")["certificate"])}
    (folder / "sdprep.json").write_text(json.dumps(said), encoding="utf-8")
    return folder


@pytest.mark.parametrize("format_", ["parquet", "lance"])
def test_a_published_folder_is_checked_alone(
    table: PhotoTable, tmp_path: Path, format_: str
) -> None:
    report = split_table(table)
    folder = publish(table, tmp_path / "out put", format_)
    found = verify(folder)
    assert found.ok, found.problems
    assert (found.train, found.validation, found.groups) == (report.train, report.validation, 80)
    assert found.min_distance == report.certificate["cross_split"]["min_distance"]


def test_an_image_on_both_sides_of_a_published_folder_is_caught(
    table: PhotoTable, tmp_path: Path
) -> None:
    split_table(table)
    folder = publish(table, tmp_path / "out")
    shard = folder / "data" / "train-00000.parquet"
    held = pq.read_table(folder / "data" / "validation-00000.parquet")
    rows = pq.read_table(shard)
    pq.write_table(pa.concat_tables([rows.slice(1), held.slice(0, 1)]), shard)
    problems = verify(folder).problems
    assert any("there twice" in problem for problem in problems)
    assert any("on both sides" in problem for problem in problems)


def test_a_folder_that_left_images_out_gets_a_certificate_of_its_own(
    table: PhotoTable, tmp_path: Path
) -> None:
    report = split_table(table)
    folder = publish(table, tmp_path / "out")
    shard = folder / "data" / "train-00001.parquet"
    pq.write_table(pq.read_table(shard).slice(2), shard)
    assert not verify(folder).ok
    certificate = restated(report.certificate, folder)
    assert certificate["counts"][TRAIN] == report.train - 2
    assert certificate["of_table"]["counts"][TRAIN] == report.train
    (folder / "sdprep.json").write_text(json.dumps({"certificate": certificate}), encoding="utf-8")
    assert verify(folder).ok


def test_a_damaged_folder_is_explained(tmp_path: Path) -> None:
    for text, says in (("{", "cannot read"), ("{}", "no split certificate")):
        (tmp_path / "sdprep.json").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=says):
            verify(tmp_path)


# --- the recipe section -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"validation": 1},
        {"validation": 1.5},
        {"validation": -0.1},
        {"validation": float("nan")},
        {"validation_count": -1},
        {"validation": 0.1, "validation_count": 3},
        {"stratify": ["colour"]},
        {"vaildation": 0.1},
    ],
)
def test_the_recipe_section_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        validate(wrong, SplitConfig, "recipe")


def test_the_recipe_section_accepts() -> None:
    config = validate({"validation": 0.58, "stratify": ["source"]}, SplitConfig, "recipe")
    assert config.wanted.size(25) == 15
    assert validate({"validation": 0}, SplitConfig, "recipe").wanted.mode == "none"
