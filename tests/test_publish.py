"""Publishing: what `load_dataset` gives back, byte for byte the same, and nothing private in it."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import sdprep.prepared_files
from sdprep.errors import DataError, RecipeError, UserError
from sdprep.images import open_image
from sdprep.prepared_files import ShardWriter
from sdprep.prepared_rows import source_name
from sdprep.prompt_policy import PromptPolicy
from sdprep.publish import PublishConfig, publish
from sdprep.recipe import validate
from sdprep.schema import CORE, PREPARED, SCHEMA_VERSION, read_manifest
from sdprep.table import PhotoTable

SECRET = "SECRET-52.3702N"


def picture(number: int, format: str, size: tuple[int, int] = (96, 72)) -> bytes:
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize(size)
    exif = Image.Exif()
    exif[0x010E] = SECRET
    exif[0x0112] = 6 if number % 3 == 0 else 1
    exif.get_ifd(0x8825)[2] = (52.0, 22.0, 12.7)
    exif.get_ifd(0x8825)[29] = SECRET
    buffer = io.BytesIO()
    image.save(buffer, format, exif=exif)
    return buffer.getvalue()


def core_row(data: bytes, **changes: Any) -> dict[str, Any]:
    info = open_image(data, first_frame=True).info
    made = {
        "id": blake2b(data, digest_size=16).hexdigest(),
        "image": data,
        "width": info.width,
        "height": info.height,
        "format": info.format,
        "mode": info.mode,
        "frames": info.frames,
        "exif_orientation": info.exif_orientation,
        "has_alpha": info.has_alpha,
        "num_bytes": len(data),
        "sources": [{"source": "photos", "key": "a/b.jpg", "num_bytes": len(data)}],
    }
    return made | changes


FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")


def photos(numbers: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for number in numbers:
        text = {
            "caption": f"photo {number}",
            "tags": [{"name": "cat", "category": "general"}],
            "rating": "general",
            "license": "cc0-1.0",
        }
        rows.append(core_row(picture(number, FORMATS[number % 4]), text=text))
    return rows


def add(table: PhotoTable, rows: list[dict[str, Any]]) -> None:
    with table.writer():
        table.add_images(pa.Table.from_pylist(rows, schema=CORE))


def split_by_number(table: PhotoTable) -> None:
    """Every fifth image is validation, whatever else is there."""
    ordered = table.read(["id", "ordinal"])
    ids, ordinals = ordered["id"].to_pylist(), ordered["ordinal"].to_pylist()
    sides = ["validation" if number % 5 == 4 else "train" for number in ordinals]
    stable = [
        side == "train" and number % 2 == 0 for number, side in zip(ordinals, sides, strict=True)
    ]
    with table.writer():
        values = {
            "split": pa.array(sides),
            "stable_train": pa.array(stable),
            "group_id": pa.array(ids),
            "signature": pa.array([bytes.fromhex(id_) for id_ in ids], pa.binary(16)),
        }
        table.write_fold(ids, values, stage="split")


def annotate(
    table: PhotoTable, column: str, rows: list[dict[str, Any] | None], type_: pa.StructType
):
    with table.writer():
        table.add_columns(
            [pa.field(column, type_, metadata={"fingerprint": f"{column} 1 /home/ann/m"})]
        )
        table.replace(table.read(["id"])["id"], {column: pa.array(rows, type_)})


@pytest.fixture
def table(tmp_path: Path) -> PhotoTable:
    made = PhotoTable.open(tmp_path / "my photos.lance", create=True)
    add(made, photos(range(20)))
    split_by_number(made)
    return made


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)

    def loaded(folder: Path, **options: Any) -> Any:
        cache = tmp_path / f"cache-{len(list(tmp_path.iterdir()))}"
        return datasets.load_dataset(str(folder), cache_dir=str(cache), **options)

    return loaded


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def upright(data: bytes) -> np.ndarray:
    return np.asarray(open_image(data, first_frame=True).image)


# --- what is loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["parquet", "lance"])
@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset_gives_both_splits_as_they_were(
    table: PhotoTable, tmp_path: Path, load: Callable[..., Any], format: str, streaming: bool
) -> None:
    report = publish(table, tmp_path / "out", config=PublishConfig(format=format))
    assert (report.train, report.validation, report.left_out) == (16, 4, {})
    loaded = load(tmp_path / "out", streaming=streaming)
    assert list(loaded) == ["train", "validation"]
    originals = table.image_bytes(table.read(["id"])["id"].to_pylist())
    order = {id_: number for number, id_ in enumerate(table.read(["id"])["id"].to_pylist())}
    for split, num_rows in (("train", 16), ("validation", 4)):
        rows = list(loaded[split])
        assert len(rows) == num_rows
        assert [order[row["id"]] for row in rows] == sorted(order[row["id"]] for row in rows)
        assert loaded[split].features.arrow_schema.remove_metadata() == PREPARED
        for row in rows:
            assert isinstance(row["image"], Image.Image)
            np.testing.assert_array_equal(np.asarray(row["image"]), upright(originals[row["id"]]))
            assert row["caption"].startswith("photo ")
            assert row["tags"][0]["name"] == "cat"
            assert row["validation_prompt"] == "cat"
            assert row["repeats"] == 1
            assert row["score"] is None


def test_pixels_and_orientation_are_the_originals(table: PhotoTable, tmp_path: Path) -> None:
    publish(table, tmp_path / "out")
    originals = table.image_bytes(table.read(["id"])["id"].to_pylist())
    checked = 0
    for path in (tmp_path / "out/data").glob("*.parquet"):
        for row in pq.read_table(path, columns=["id", "image"]).to_pylist():
            stored = row["image"]["bytes"]
            np.testing.assert_array_equal(upright(stored), upright(originals[row["id"]]))
            assert row["image"]["path"].rpartition(".")[0] == row["id"]
            with Image.open(io.BytesIO(stored)) as image:
                assert set(image.getexif()) <= {0x0112} or image.format == "TIFF"
                assert not image.getexif().get_ifd(0x8825)
            checked += 1
    assert checked == 20


def test_nothing_private_is_in_any_file(table: PhotoTable, tmp_path: Path) -> None:
    struct = pa.struct({"score": pa.float32(), "error": pa.string()})
    annotate(table, "score_technical", [{"score": 5.0}] * 20, struct)
    recipe = 'table = "/home/ann/x.lance"\n'
    publish(table, tmp_path / "out", recipe_text=recipe)
    originals = b"".join(table.image_bytes(table.read(["id"])["id"].to_pylist()).values())
    assert SECRET.encode() in originals
    for name, data in contents(tmp_path / "out").items():
        for word in (SECRET, "/home/ann", str(tmp_path), "a/b.jpg"):
            assert word.encode() not in data, name


def test_columns_are_filled_from_every_stage(table: PhotoTable, tmp_path: Path) -> None:
    raw = pa.struct({"score": pa.float32(), "score_raw": pa.float32(), "error": pa.string()})
    values = [0.2, 8.5, 9.0, float("nan"), 4.49] * 4
    annotate(table, "score_technical", [{"score": v, "score_raw": v / 10} for v in values], raw)
    boxes = CORE_BOXES
    found = {"boxes": [{"label": "a", "score": 0.5, "x0": 0, "y0": 0, "x1": 1, "y1": 0.5}]}
    annotate(table, "boxes_owlv2", [found, None] * 10, boxes)
    annotate(table, "boxes_yolo", [found] * 20, boxes)
    ids = table.read(["id"])["id"].to_pylist()
    tag = {"name": "dog", "category": "general", "score": 0.9, "source": "wd"}
    rated = {"name": "sensitive", "category": "rating", "score": 0.9, "source": "wd"}
    with table.writer():
        tags = pa.array([[tag, rated]] * 20, PREPARED.field("tags").type)
        captions = pa.array(
            [[{"text": "x", "source": "vlm"}]] * 20, PREPARED.field("captions").type
        )
        table.write_fold(ids, {"tags": tags, "captions": captions}, stage="tags")
    publish(table, tmp_path / "out")
    parts = sorted((tmp_path / "out/data").glob("*.parquet"))
    rows = {row["id"]: row for part in parts for row in pq.read_table(part).to_pylist()}
    ordered = [rows[id_] for id_ in ids]
    assert [row["score"] for row in ordered[:5]] == [1, 9, 9, None, 4]
    assert ordered[1]["score_raw"] == pytest.approx(0.85)
    assert ordered[3]["score_raw"] is None
    assert [len(row["boxes"]) for row in ordered[:2]] == [2, 1]
    assert ordered[0]["tags"] == [pytest.approx(tag), pytest.approx(rated)]
    assert ordered[0]["captions"] == [{"text": "x", "source": "vlm"}]
    assert ordered[0]["rating"] == "general"  # what came with the image wins over a guess
    assert ordered[0]["source"] == "photos"
    assert ordered[0]["license"] == "cc0-1.0"
    assert ordered[0]["signature"] == bytes.fromhex(ids[0])
    assert ordered[0]["stable_train"] is True
    assert read_manifest(tmp_path / "out")["score"] == "score_technical"


CORE_BOXES = pa.struct({"boxes": PREPARED.field("boxes").type, "error": pa.string()})


def test_the_score_named_wins_and_a_missing_one_is_said(table: PhotoTable, tmp_path: Path) -> None:
    struct = pa.struct({"score": pa.int8(), "error": pa.string()})
    annotate(table, "score_technical", [{"score": 3}] * 20, struct)
    annotate(table, "score_preference", [{"score": 7}] * 20, struct)
    for name, expected in ((None, 7), ("technical", 3), ("score_technical", 3)):
        publish(table, tmp_path / "out", config=PublishConfig(score=name))
        part = pq.read_table(tmp_path / "out/data/train-00000.parquet")
        assert set(part["score"].to_pylist()) == {expected}
    with pytest.raises(UserError, match="no column score_beauty"):
        publish(table, tmp_path / "out", config=PublishConfig(score="beauty"))


def test_rank_zero_stays_home(table: PhotoTable, tmp_path: Path) -> None:
    struct = pa.struct({"score": pa.int8(), "error": pa.string()})
    annotate(table, "score_preference", [{"score": n % 4} for n in range(20)], struct)
    report = publish(table, tmp_path / "out")
    assert report.left_out == {"score_zero": 5}
    assert report.train + report.validation == 15


def test_rejected_images_stay_home(table: PhotoTable, tmp_path: Path) -> None:
    ids = table.read(["id"])["id"].to_pylist()
    with table.writer():
        reasons = pa.array(["too dull"] * 3)
        table.write_fold(ids[:3], {"reject_human": reasons}, stage="review")
    report = publish(table, tmp_path / "out")
    assert report.train + report.validation == 17
    published = pq.read_table(tmp_path / "out/data/train-00000.parquet")["id"].to_pylist()
    assert not set(ids[:3]) & set(published)


# --- same bytes, growth ---------------------------------------------------------------------------


def test_publishing_twice_gives_the_same_bytes(table: PhotoTable, tmp_path: Path) -> None:
    publish(table, tmp_path / "one")
    publish(table, tmp_path / "two", config=PublishConfig(title="one"))
    first = contents(tmp_path / "one")
    assert first == contents(tmp_path / "two")
    assert {"README.md", "sdprep.json", "data/train-00000.parquet"} <= set(first)
    publish(table, tmp_path / "one")
    assert contents(tmp_path / "one") == first


def test_growth_leaves_full_shards_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdprep.prepared_files._Buffered, "group_rows", 3)
    monkeypatch.setattr(sdprep.prepared_files, "MEGABYTE", 150_000)
    table = PhotoTable.open(tmp_path / "grow.lance", create=True)
    config = PublishConfig(shard_megabytes=1, title="grow")
    before: dict[str, bytes] = {}
    for start in range(0, 40, 10):
        add(table, photos(range(start, start + 10)))
        split_by_number(table)
        publish(table, tmp_path / "out", config=config)
        after = {n: d for n, d in contents(tmp_path / "out").items() if n.startswith("data/train")}
        assert all(len(data) <= 150_000 for data in after.values())
        for name in sorted(before)[:-1]:  # the last one had room
            assert after[name] == before[name]
        before = after
    assert len(before) >= 3
    rows = [pq.read_table(tmp_path / "out" / name, columns=["id"]).num_rows for name in before]
    assert sum(rows) == 32
    groups = pq.ParquetFile(tmp_path / "out/data/train-00000.parquet").metadata
    assert groups.row_group(0).num_rows == 3


def test_shards_are_full_and_never_over_their_limit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    writer = ShardWriter(tmp_path, "train", 1)
    for number in range(150):
        image = {"bytes": rng.bytes(20_000), "path": "x.jpg"}
        empty: dict[str, Any] = dict.fromkeys(PREPARED.names)
        writer.add(empty | {"id": f"{number:032x}", "image": image})
    writer.close()
    sizes = [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert max(sizes) <= 1_000_000
    assert min(sizes[:-1]) > 700_000


def test_pictures_are_chunked_by_content_and_stored_plain(
    table: PhotoTable, tmp_path: Path
) -> None:
    publish(table, tmp_path / "out")
    meta = pq.ParquetFile(tmp_path / "out/data/train-00000.parquet").metadata
    columns = {
        meta.row_group(0).column(i).path_in_schema: meta.row_group(0).column(i)
        for i in range(meta.num_columns)
    }
    assert columns["image.bytes"].compression == "UNCOMPRESSED"
    assert not columns["image.bytes"].is_stats_set
    assert columns["caption"].compression == "SNAPPY"
    assert columns["id"].is_stats_set


# --- the folder -----------------------------------------------------------------------------------


def test_a_folder_that_is_not_ours_is_left_alone(table: PhotoTable, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not empty"):
        publish(table, target)
    assert contents(target) == {"thesis.txt": b"years of work"}
    with pytest.raises(DataError, match="it is a file"):
        publish(table, target / "thesis.txt")
    for inside in (table.path, table.path / "out", table.path.parent):
        with pytest.raises(DataError, match="inside the other"):
            publish(table, inside)


def test_an_empty_folder_and_missing_parents_are_fine(table: PhotoTable, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    publish(table, tmp_path / "empty")
    publish(table, tmp_path / "new" / "deep er" / "Bilder-日本")
    assert (tmp_path / "new" / "deep er" / "Bilder-日本" / "sdprep.json").is_file()


def test_files_of_others_in_our_folder_are_kept(table: PhotoTable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(table, out)
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref")
    (out / "NOTES.md").write_text("mine")
    stale = out / "data" / "train-00009.parquet"
    manifest = json.loads((out / "sdprep.json").read_text(encoding="utf-8"))
    manifest["files"].append("data/train-00009.parquet")
    (out / "sdprep.json").write_text(json.dumps(manifest), encoding="utf-8")
    stale.write_bytes(b"an older, longer data set")
    publish(table, out)
    assert (out / ".git" / "HEAD").read_text() == "ref"
    assert (out / "NOTES.md").read_text() == "mine"
    assert not stale.exists()


def test_formats_replace_each_other(
    table: PhotoTable, tmp_path: Path, load: Callable[..., Any]
) -> None:
    for format, there, gone in (
        ("lance", "train.lance", "data"),
        ("parquet", "data", "train.lance"),
    ):
        publish(table, tmp_path / "out", config=PublishConfig(format=format))
        assert (tmp_path / "out" / there).is_dir()
        assert not (tmp_path / "out" / gone).exists()
    assert len(load(tmp_path / "out")["validation"]) == 4


def test_a_failure_leaves_the_old_data_set(
    table: PhotoTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(table, tmp_path / "out")
    before = contents(tmp_path / "out")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdprep.publish.write_card", fail)
    with pytest.raises(OSError, match="No space"):
        publish(table, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert not [path for path in tmp_path.iterdir() if "sdprep-" in path.name]


def test_a_kill_between_the_renames_is_mended(table: PhotoTable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(table, out)
    (out / "NOTES.md").write_text("mine")
    os.replace(out, tmp_path / ".out.sdprep-old")
    (tmp_path / ".out.sdprep-new" / "data").mkdir(parents=True)
    publish(table, out)
    assert (out / "NOTES.md").read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if "sdprep-" in path.name]


def test_a_full_disk_is_said_before_anything_is_written(
    table: PhotoTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="GB free"):
        publish(table, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- splits and linked files ----------------------------------------------------------------------


def test_without_a_split_all_is_train_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], load: Callable[..., Any]
) -> None:
    table = PhotoTable.open(tmp_path / "x.lance", create=True)
    add(table, photos([1]))
    report = publish(table, tmp_path / "out")
    assert (report.train, report.validation) == (1, 0)
    assert "no split" in capsys.readouterr().err
    assert list(load(tmp_path / "out")) == ["train"]


def test_images_that_came_after_the_split_stop_it(table: PhotoTable, tmp_path: Path) -> None:
    add(table, photos([90, 91]))
    with pytest.raises(DataError, match="2 kept images .* have no split yet"):
        publish(table, tmp_path / "out")


def test_nothing_to_publish_is_said(tmp_path: Path) -> None:
    table = PhotoTable.open(tmp_path / "x.lance", create=True)
    with pytest.raises(DataError, match="no image to publish"):
        publish(table, tmp_path / "out")
    with pytest.raises(UserError, match="publish.to is missing"):
        publish(table)


def test_linked_files_that_are_gone_or_changed_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for row in photos(range(6)):
        path = tmp_path / f"{row['id']}.img"
        path.write_bytes(row.pop("image"))
        stat = path.stat()
        source = {
            "source": "p",
            "key": "k",
            "num_bytes": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
        }
        rows.append(row | {"image_uri": str(path), "sources": [source]})
    table = PhotoTable.open(tmp_path / "x.lance", create=True)
    add(table, rows)
    Path(rows[1]["image_uri"]).unlink()
    Path(rows[2]["image_uri"]).write_bytes(b"other")
    report = publish(table, tmp_path / "out")
    assert (report.train, report.left_out) == (4, {"source_changed": 2})
    assert "2 source_changed" in capsys.readouterr().err
    assert "source&#95;changed" in (tmp_path / "out/README.md").read_text() or (
        "2 images were left out: source_changed" in (tmp_path / "out/README.md").read_text()
    )
    for row in rows:
        Path(row["image_uri"]).unlink(missing_ok=True)
    with pytest.raises(DataError, match="nothing of .* can be published"):
        publish(table, tmp_path / "out")
    assert (tmp_path / "out/sdprep.json").is_file()


# --- manifest, config -----------------------------------------------------------------------------


def test_manifest_carries_policy_and_refuses_other_versions(
    table: PhotoTable, tmp_path: Path
) -> None:
    policy = PromptPolicy()
    publish(table, tmp_path / "out", policy=policy)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["SCHEMA_VERSION"] == SCHEMA_VERSION == 1
    assert PromptPolicy.model_validate_json(json.dumps(manifest["policy"])) == policy
    assert manifest["rows"] == {"train": 16, "validation": 4}
    assert set(manifest["files"]) == set(contents(tmp_path / "out")) - {"sdprep.json"}
    file = tmp_path / "out" / "sdprep.json"
    file.write_text(
        file.read_text(encoding="utf-8").replace('SION": 1', 'SION": 2'), encoding="utf-8"
    )
    with pytest.raises(DataError, match="SCHEMA_VERSION 2, this release reads 1"):
        read_manifest(tmp_path / "out")
    with pytest.raises(DataError, match="SCHEMA_VERSION 2"):
        publish(table, tmp_path / "out")
    file.write_text("[]")
    with pytest.raises(DataError, match="SCHEMA_VERSION None"):
        read_manifest(file)
    file.write_text("{")
    with pytest.raises(DataError, match="no JSON"):
        read_manifest(file)
    with pytest.raises(DataError, match="No such file"):
        read_manifest(tmp_path / "nowhere")


def test_options_are_checked() -> None:
    assert validate({"to": "a/b"}, PublishConfig, "x").to == Path("a/b")
    with pytest.raises(RecipeError, match="did you mean parquet"):
        validate({"format": "parket"}, PublishConfig, "x")
    with pytest.raises(RecipeError, match=r"shard_megabytes = 0 +must be >= 1"):
        validate({"shard_megabytes": 0}, PublishConfig, "x")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("danbooru", "danbooru"),
        ("user/set", "user/set"),
        ("/home/ann/cats", "cats"),
        ("../ann/cats/", "cats"),
        ("~/cats", "cats"),
        ("C:\\Users\\ann\\cats", "cats"),
        (None, None),
    ],
)
def test_sources_tell_no_private_path(given: str | None, shown: str | None) -> None:
    assert source_name([{"source": given}]) == shown


# --- the split's certificate ----------------------------------------------------------------------


def test_a_published_split_can_be_verified(tmp_path: Path) -> None:
    from sdprep.certificate import verify
    from sdprep.split import split_table

    table = PhotoTable.open(tmp_path / "x.lance", create=True)
    add(table, photos(range(16)))
    split_table(table)
    first = publish(table, tmp_path / "out")
    certificate = read_manifest(tmp_path / "out")["certificate"]
    assert certificate == json.loads(table.notes("split")["certificate"])
    assert certificate["counts"] == {"train": first.train, "validation": first.validation}
    assert verify(tmp_path / "out").ok
    assert f"counts&#58; train | {first.train} |" in (tmp_path / "out/README.md").read_text("utf-8")

    rows = table.read(["id", "split"]).to_pylist()
    out = next(row["id"] for row in rows if row["split"] == "train")
    with table.writer():
        table.write_fold([out], {"reject_human": pa.array(["dull"])}, stage="review")
    assert publish(table, tmp_path / "out").train == first.train - 1
    restated = read_manifest(tmp_path / "out")["certificate"]
    assert restated["counts"]["train"] == first.train - 1
    assert verify(tmp_path / "out").ok
    part = tmp_path / "out/data/validation-00000.parquet"
    pq.write_table(pq.read_table(part).slice(1), part)
    assert not verify(tmp_path / "out").ok


def test_other_names_of_tags_that_occur_travel_in_the_policy(
    table: PhotoTable, tmp_path: Path
) -> None:
    spellings = {"cat": ["kitty", "feline"], "dragon": ["wyrm"]}
    publish(table, tmp_path / "out", spellings=spellings)
    assert read_manifest(tmp_path / "out")["policy"]["aliases"] == {"cat": ["feline", "kitty"]}
    assert "kitty" not in (tmp_path / "out/README.md").read_text(encoding="utf-8")
