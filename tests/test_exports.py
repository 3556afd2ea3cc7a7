"""Exports: what other trainers would read of them, and what comes back when they are ingested."""

from __future__ import annotations

import glob
import io
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from sdprep.cli import app
from sdprep.errors import DataError, UserError
from sdprep.export import MANIFEST, export
from sdprep.exports import imagefolder, kohya, webdataset
from sdprep.file_names import Stems, safe_stem
from sdprep.images import open_image
from sdprep.ingest import ingest
from sdprep.sources.folder import Config as Folder
from sdprep.strip import strip_metadata
from sdprep.table import PhotoTable

SECRET = "SECRET-52.3702N"
FORMATS: dict[str, type] = {
    "kohya": kohya.Config,
    "imagefolder": imagefolder.Config,
    "webdataset": webdataset.Config,
}


def picture(number: int, format: str = "JPEG", *, turned: bool = False, private: bool = False):
    """A small photo; clean unless told otherwise."""
    rng = np.random.default_rng(number)
    cells = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    if private:
        exif[0x010E] = SECRET
        exif.get_ifd(0x8825)[29] = SECRET
    file = io.BytesIO()
    cells.resize((96, 72)).save(file, format, **({"exif": exif} if turned or private else {}))
    return file.getvalue()


def write(root: Path, files: dict[str, bytes | str | dict[str, Any]]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps(content)
        data = content if isinstance(content, bytes) else content.encode()
        (root / name).write_bytes(data)
    return root


COMMA_TAGS = [
    {"name": "red, white", "category": "general"},
    {"name": "miku_(vocaloid)", "category": "character"},
    {"name": "rating:safe", "category": "rating"},
]
PHOTOS: dict[str, bytes | str | dict[str, Any]] = {
    "10_sks dog/01.jpg": picture(1),
    "10_sks dog/01.txt": "sks dog, outdoors, long_hair",
    "10_sks dog/01.caption": "a dog\nin two lines",
    "10_sks dog/02.png": picture(2, "PNG"),
    "10_sks dog/02.txt": "sks dog",
    "3_teapot/01.webp": picture(3, "WEBP"),
    "3_teapot/01.caption": "ein Teekännchen 茶壶",
    "loose/gps.jpg": picture(4, private=True, turned=True),
    "loose/gps.txt": "beach",
    "loose/scan.tif": picture(5, "TIFF"),
    "loose/scan.caption": "a scan",
    "loose/plain.jpg": picture(6),
    "loose/PLAIN.v2.jpg": picture(7),
    "loose/PLAIN.v2.json": {"tags": COMMA_TAGS, "caption": "commas", "rating": "s", "license": "x"},
    "loose/plain_v2.jpg": picture(8),
    "loose/plain_v2.txt": "eighth",
}
CLEAN = [name for name in PHOTOS if name.endswith((".png", ".webp", ".jpg")) and "gps" not in name]


def id_of(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def ingested(root: Path, table: Path) -> PhotoTable:
    made = PhotoTable.open(table, create=True)
    ingest(made, Folder(path=root).build())
    return made


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> PhotoTable:
    """Eight photos, two of them (the one with commas, and one without text) in validation."""
    root = tmp_path_factory.mktemp("photos")
    made = ingested(write(root, PHOTOS), tmp_path_factory.mktemp("table") / "my photos.lance")
    held_out = {id_of(PHOTOS["loose/PLAIN.v2.jpg"]), id_of(PHOTOS["loose/plain.jpg"])}  # type: ignore[arg-type]
    ids = made.read(["id"])["id"].to_pylist()
    with made.writer():
        sides = pa.array(["validation" if id_ in held_out else "train" for id_ in ids])
        made.write_fold(ids, {"split": sides}, stage="split")
    return made


@pytest.fixture(scope="module")
def exported(table: PhotoTable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One export of each format; never change them."""
    home = tmp_path_factory.mktemp("exports of a test")
    for name, config in FORMATS.items():
        report = export(table, home / name, config())
        assert (report.train, report.validation, report.without_text) == (6, 2, 1)
        assert report.repacked == (2 if name == "kohya" else 0)
    return {name: home / name for name in FORMATS}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# --- kohya, read the way others read it -----------------------------------------------------------

SD_SCRIPTS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def dreambooth(folder: Path, extension: str) -> list[tuple[int, str, str]]:
    """(repeats, caption, file) as sd-scripts' DreamBooth data set takes them."""
    found = []
    for sub in sorted(path for path in folder.iterdir() if path.is_dir()):
        number, *words = sub.name.split("_")
        for path in sorted(sub.iterdir()):
            if path.suffix.lower() in SD_SCRIPTS:
                text = path.with_suffix(extension)
                lines = text.read_text("utf-8").splitlines() if text.exists() else ["_".join(words)]
                found.append((int(number), lines[0].strip(), path.name))
    return found


def finetune(folder: Path) -> list[tuple[str, str]]:
    """(caption, file) as its fine-tuning data set does; it refuses entries without any text."""
    found = []
    for key, entry in json.loads((folder / "meta_cap_dd.json").read_text("utf-8")).items():
        paths = [p for ext in SD_SCRIPTS for p in glob.glob(glob.escape(f"{folder / key}{ext}"))]
        caption, tags = entry.get("caption"), entry.get("tags")
        caption = tags if caption is None else f"{caption}, {tags}" if tags else caption
        assert len(paths) == 1, key
        assert caption, key
        found.append((caption, Path(paths[0]).name))
    return found


def everydream(folder: Path) -> dict[str, str]:
    """File to caption: `.txt`, else `.caption`, else the name up to the first underscore."""
    found = {}
    for path in folder.rglob("*"):
        if path.suffix in (".jpg", ".jpeg", ".png", ".webp", ".bmp"):
            texts = [t for t in (path.with_suffix(".txt"), path.with_suffix(".caption"))]
            text = next((t.read_text("utf-8") for t in texts if t.exists()), None)
            found[path.name] = path.stem.split("_")[0] if text is None else text
    return found


def test_sd_scripts_finds_every_image_with_repeats_and_text(exported: dict[str, Path]) -> None:
    tags = dreambooth(exported["kohya"] / "train", ".txt")
    assert sorted(entry[:2] for entry in tags) == [
        (1, "beach"), (1, "eighth"), (1, "image"),
        (3, "teapot"), (10, "sks dog"), (10, "sks dog, outdoors, long_hair"),
    ]  # fmt: skip
    captions = dreambooth(exported["kohya"] / "train", ".caption")
    assert (10, "a dog in two lines") in [entry[:2] for entry in captions]
    assert (3, "ein Teekännchen 茶壶") in [entry[:2] for entry in captions]
    held_out = dreambooth(exported["kohya"] / "validation", ".txt")
    assert sorted(entry[:2] for entry in held_out) == [
        (1, "image"),
        (1, "red white, miku_(vocaloid)"),
    ]


def test_the_finetuning_metadata_names_every_image_with_text(exported: dict[str, Path]) -> None:
    found = dict(finetune(exported["kohya"] / "train"))
    assert len(found) == 6
    assert "a dog in two lines, sks dog, outdoors, long_hair" in found
    assert "ein Teekännchen 茶壶" in found
    held_out = dict(finetune(exported["kohya"] / "validation"))
    assert list(held_out) == ["commas, red white, miku_(vocaloid)"]


def test_everydream_reads_the_same_folder(exported: dict[str, Path]) -> None:
    found = everydream(exported["kohya"])
    assert len(found) == 8
    assert {"sks dog", "a scan", "beach", "ein Teekännchen 茶壶"} <= set(found.values())


def test_what_sd_scripts_cannot_read_or_turn_becomes_an_upright_png(
    exported: dict[str, Path],
) -> None:
    checked = 0
    for name in ("loose/gps.jpg", "loose/scan.tif"):
        data = PHOTOS[name]
        assert isinstance(data, bytes)
        path = exported["kohya"] / "train" / "1_image" / f"{id_of(data)}.png"
        with Image.open(path) as image:
            assert not image.getexif()
            expected = np.asarray(open_image(data).image)
            assert np.array_equal(np.asarray(image), expected)
        checked += 1
    assert checked == 2


def test_tags_are_written_in_the_style_asked_for(table: PhotoTable, tmp_path: Path) -> None:
    for style, expected in (
        ("spaces", "sks dog, outdoors, long hair"),
        ("underscores", "sks_dog, outdoors, long_hair"),
    ):
        export(table, tmp_path / style, kohya.Config(tag_style=style))
        assert expected in {text for _, text, _ in dreambooth(tmp_path / style / "train", ".txt")}


# --- imagefolder and webdataset -------------------------------------------------------------------


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()
    cache = str(tmp_path / "cache")
    return lambda kind, folder: datasets.load_dataset(kind, data_dir=str(folder), cache_dir=cache)


def test_datasets_opens_an_imagefolder(exported: dict[str, Path], load: Callable[..., Any]) -> None:
    found = load("imagefolder", exported["imagefolder"])
    assert {split: len(rows) for split, rows in found.items()} == {"train": 6, "validation": 2}
    by_id = {row["id"]: row for rows in found.values() for row in rows}
    gps = by_id[id_of(PHOTOS["loose/gps.jpg"])]  # type: ignore[arg-type]
    assert gps["image"].size == (gps["width"], gps["height"]) == (72, 96)  # upright
    assert (gps["text"], gps["caption"], gps["tags"]) == ("beach", "", "beach")
    nulls = [key for row in by_id.values() for key, value in row.items() if value is None]
    assert nulls == []  # a column of NULL in one split only would not load
    dog = by_id[id_of(PHOTOS["10_sks dog/01.jpg"])]  # type: ignore[arg-type]
    assert dog["caption"] == "a dog\nin two lines"
    assert dog["text"] == "a dog in two lines"
    assert (dog["repeats"], dog["class_name"], dog["score"]) == (10, "sks dog", 0)


def test_datasets_opens_shards(exported: dict[str, Path], load: Callable[..., Any]) -> None:
    found = load("webdataset", exported["webdataset"])
    assert {split: len(rows) for split, rows in found.items()} == {"train": 6, "validation": 2}
    assert {row["json"]["id"] for row in found["validation"]} == {
        row["__key__"] for row in found["validation"]
    }


def samples_of(shard: Path) -> dict[str, dict[str, bytes]]:
    """Members grouped by name up to the first dot, which must stand together."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            facts = (member.mtime, member.uid, member.gid, member.uname, member.gname)
            assert facts == (0, 0, 0, "", "")
            assert member.isfile()
            name, _, kind = member.name.partition(".")
            assert name not in list(samples)[:-1]
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(name, {})[kind] = file.read()
    return samples


def test_shards_hold_image_json_and_text(exported: dict[str, Path]) -> None:
    samples = samples_of(exported["webdataset"] / "train" / "00000.tar")
    assert len(samples) == 6
    for name, sample in samples.items():
        (kind,) = sample.keys() - {"json", "txt"}
        assert kind in ("jpg", "png", "webp", "tif")
        record = json.loads(sample["json"])
        assert record["id"] == name
        assert sample["txt"].decode() == record["text"]
        with Image.open(io.BytesIO(sample[kind])) as image:
            image.load()


def test_shards_close_before_they_grow_too_large(table: PhotoTable, tmp_path: Path) -> None:
    writer = webdataset.WebDatasetExport(30_000)
    config = webdataset.Config()
    object.__setattr__(config, "build", lambda: writer)
    export(table, tmp_path / "shards", config)
    shards = sorted((tmp_path / "shards" / "train").glob("*.tar"))
    assert [shard.name for shard in shards] == [f"{n:05d}.tar" for n in range(len(shards))]
    assert len(shards) > 1
    assert sum(len(samples_of(shard)) for shard in shards) == 6


# --- privacy, sameness, safety --------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_private_leaves(name: str, exported: dict[str, Path], table: PhotoTable) -> None:
    assert SECRET.encode() in PHOTOS["loose/gps.jpg"]  # type: ignore[operator]
    files = contents(exported[name])
    assert len(files) >= 3
    for file, data in files.items():
        assert SECRET.encode() not in data, file
        assert str(table.path.parent).encode() not in data, file
        assert b"pickle" not in file.encode()


def test_a_clean_file_leaves_as_it_came(exported: dict[str, Path]) -> None:
    checked = 0
    for name in CLEAN:
        data = PHOTOS[name]
        assert isinstance(data, bytes)
        kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[name.rpartition(".")[2]]
        assert strip_metadata(data, kind) == data
        for layout in ("kohya", "imagefolder"):
            (path,) = exported[layout].rglob(f"{id_of(data)}.{name.rpartition('.')[2]}")
            assert path.read_bytes() == data
        checked += 1
    assert checked == 6


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_table_gives_the_same_bytes_and_keeps_what_is_not_ours(
    name: str, table: PhotoTable, exported: dict[str, Path], tmp_path: Path
) -> None:
    to = tmp_path / "again"
    export(table, to, FORMATS["imagefolder"](tag_style="spaces"))  # another format gives way
    (to / "train" / "cache.npz").write_bytes(b"latents")
    export(table, to, FORMATS[name]())
    files = contents(to)
    assert files.pop("train/cache.npz") == b"latents"
    assert files == contents(exported[name])
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_folders_that_are_not_an_export_are_left_alone(table: PhotoTable, tmp_path: Path) -> None:
    write(tmp_path, {"mine/holiday.jpg": picture(1), "file": "text", "half/a": "a"})
    (tmp_path / "half" / MANIFEST).write_text("{")
    for name, said in {
        "mine": "no data set of ours",
        "file": "is a file",
        "half": "damaged",
    }.items():
        with pytest.raises(DataError, match=said):
            export(table, tmp_path / name, kohya.Config())
    with pytest.raises(DataError, match="inside the other"):
        export(table, table.path / "out", kohya.Config())
    assert contents(tmp_path / "mine").keys() == {"holiday.jpg"}


def test_a_failure_leaves_the_old_export(
    table: PhotoTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(table, tmp_path / "out", kohya.Config())
    before = contents(tmp_path / "out")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(kohya.KohyaWriter, "add", fail)
    with pytest.raises(OSError, match="disk full"):
        export(table, tmp_path / "out", kohya.Config(tag_style="spaces"))
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_rank_zero_stays_home_and_is_counted(table: PhotoTable, tmp_path: Path) -> None:
    made = ingested(write(tmp_path / "in", dict(PHOTOS)), tmp_path / "t.lance")
    ids = made.read(["id"])["id"].to_pylist()
    type_ = pa.struct({"score": pa.int8(), "error": pa.string()})
    with made.writer():
        made.add_columns([pa.field("score_preference", type_)])
        ranks = [{"score": rank} for rank in range(len(ids))]
        made.replace(pa.array(ids), {"score_preference": pa.array(ranks, type_)})
    report = export(made, tmp_path / "out", webdataset.Config()).to_json()
    assert report["left_out"] == {"score_zero": 1}
    assert (report["written"], report["train"], report["validation"]) == (7, 7, 0)
    assert not (tmp_path / "out" / "validation").exists()  # there is no split
    samples = samples_of(tmp_path / "out" / "train" / "00000.tar")
    assert [json.loads(s["json"])["score"] for s in samples.values()] == [1, 2, 3, 4, 5, 6, 7]


def test_a_table_that_keeps_nothing_is_refused(tmp_path: Path) -> None:
    made = PhotoTable.open(tmp_path / "t.lance", create=True)
    with pytest.raises(DataError, match="no image"):
        export(made, tmp_path / "out", kohya.Config())
    assert not (tmp_path / "out").exists()


# --- and back -------------------------------------------------------------------------------------


def texts(table: PhotoTable) -> dict[str, tuple[Any, ...]]:
    """Id to caption, tags with categories, rating and licence."""
    found = {}
    for row in table.read(["id", "text"]).to_pylist():
        text = row["text"] or {}
        tags = [(tag["name"], tag["category"]) for tag in text.get("tags") or []]
        found[row["id"]] = (text.get("caption"), tags, text.get("rating"), text.get("license"))
    return found


@pytest.mark.parametrize("name", ["kohya", "imagefolder"])
def test_an_export_that_is_ingested_again_says_the_same(
    name: str, table: PhotoTable, exported: dict[str, Path], tmp_path: Path
) -> None:
    back = ingested(exported[name], tmp_path / "back.lance")
    before, after = texts(table), texts(back)
    assert sorted(map(repr, after.values())) == sorted(map(repr, before.values()))
    clean = {id_of(PHOTOS[photo]) for photo in CLEAN}  # type: ignore[arg-type]
    assert {id_: after[id_] for id_ in clean} == {id_: before[id_] for id_ in clean}
    assert len(after) == 8
    commas = before[id_of(PHOTOS["loose/PLAIN.v2.jpg"])]  # type: ignore[arg-type]
    assert commas[1] == [(tag["name"], tag["category"]) for tag in COMMA_TAGS]
    sides = {row["id"]: row["text"]["split"] for row in back.read(["id", "text"]).to_pylist()}
    assert sorted(sides.values()) == ["train"] * 6 + ["validation"] * 2
    # What was stripped once needs no stripping: from here on no id changes any more.
    export(back, tmp_path / "second", FORMATS[name]())
    third = ingested(tmp_path / "second", tmp_path / "third.lance")
    assert texts(third) == after


def test_text_that_was_edited_in_an_export_counts(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    files = contents(exported["kohya"] / "validation" / "1_image")
    name = next(name for name in files if name.endswith(".txt"))
    files[name] = b"my, own, tags"
    back = ingested(write(tmp_path / "edited", dict(files)), tmp_path / "t.lance")
    found = texts(back)[name.removesuffix(".txt")]
    assert found == ("commas", [("my", None), ("own", None), ("tags", None)], "sensitive", "x")


def test_the_folder_source_reads_an_imagefolder(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    root = shared_data("layouts") / "hf_imagefolder"
    checked = 0
    found = {item.key: item.text for item in Folder(path=root).build().iter_samples()}
    for split in ("train", "validation"):
        lines = (root / split / "metadata.jsonl").read_text("utf-8").splitlines()
        for record in map(json.loads, lines):
            text = found[f"{split}/{record['file_name']}"]
            assert text.caption == record["text"]
            assert ", ".join(name for name, _ in text.tags) == record["tags"]
            checked += 1
    assert checked == len(found) == 16


def test_bad_lines_of_an_imagefolder_are_listed_and_the_rest_counts(tmp_path: Path) -> None:
    lines = [
        '{"file_name": "a.jpg", "text": "an a"}', "no json", "[1]", '{"text": "whose?"}', "",
        '{"file_name": "gone.jpg", "text": "gone"}', '{"file_name": "../../etc/passwd"}',
        '{"file_name": "b.jpg", "tags": 5, "tags_json": "{"}',
    ]  # fmt: skip
    jsonl = "\ufeff" + "\r\n".join(lines)
    files = {"x/a.jpg": picture(1), "x/b.jpg": picture(2), "x/metadata.jsonl": jsonl}
    source = Folder(path=write(tmp_path, files)).build()
    captions = {item.key: item.text.caption for item in source.iter_samples()}
    assert captions == {"x/a.jpg": "an a", "x/b.jpg": None}
    assert [(f.level, f.kind, f.key) for f in source.findings] == [
        ("missing", "bad_metadata_line", "x/metadata.jsonl:2"),
        ("missing", "bad_metadata_line", "x/metadata.jsonl:3"),
        ("missing", "bad_metadata_line", "x/metadata.jsonl:4"),
        ("missing", "missing_file", "x/gone.jpg"),
        ("missing", "outside_root", "x/../../etc/passwd"),
        ("warning", "bad_tags", "x/b.jpg"),
        ("warning", "bad_tags_json", "x/b.jpg"),
    ]


# --- names ----------------------------------------------------------------------------------------


def test_files_may_keep_their_names(table: PhotoTable, tmp_path: Path) -> None:
    export(table, tmp_path / "out", imagefolder.Config(names="key"))
    lines = [
        json.loads(line)
        for split in ("train", "validation")
        for line in (tmp_path / "out" / split / "metadata.jsonl").read_text("utf-8").splitlines()
    ]
    # Two files are called 01; of plain_v2 and PLAIN.v2 some systems would keep only one.
    assert sorted(record["file_name"].lower() for record in lines) == sorted(
        [
            "01.jpg", f"01-{id_of(PHOTOS['3_teapot/01.webp'])[:8]}.webp",  # type: ignore[arg-type]
            "02.png", "gps.jpg", "scan.tif", "plain.jpg", "plain_v2.jpg",
            f"plain_v2-{id_of(PHOTOS['loose/plain_v2.jpg'])[:8]}.jpg",  # type: ignore[arg-type]
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "stem"),
    [
        ("../../etc/passwd", "______etc_passwd"), ("CON", "CON_"), ("lpt1", "lpt1_"), ("...", ""),
        ("", ""), ("a\0b\n", "a_b_"), (" x. ", "x_"), ("-rf", "rf"), ("multiply", "multiply_"),
        ("cafe\u0301 (1)", "café (1)"), ("हिन्दी", "हिन्दी"), ("a:b*c?", "a_b_c_"),
    ],
)  # fmt: skip
def test_names_are_safe(text: str, stem: str) -> None:
    assert safe_stem(text) == stem


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=300), min_size=1, max_size=8))
def test_any_keys_give_names_that_differ_and_stay_in_their_folder(keys: list[str]) -> None:
    stems = Stems(by_key=True)
    names = [stems.take(id_of(str(n).encode()), key) for n, key in enumerate(keys)]
    assert len({name.casefold() for name in names}) == len(names)
    for name in names:
        assert os.path.basename(name) == name
        assert not set(name) & set('<>:"/\\|?*\0\n.')
        assert name.strip(" ") == name != ""
        assert 0 < len(f"{name}.caption".encode()) < 200


# --- the command ----------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote(table: PhotoTable, tmp_path: Path) -> None:
    run = CliRunner()
    arguments = ["export", str(table.path), "--to", str(tmp_path / "out"), "--json"]
    done = run.invoke(app, [*arguments, "--format", "kohya", "--set", "class_name=photo"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["written"], found["train"], found["validation"]) == (8, 6, 2)
    assert (found["left_out"], found["format"]) == ({}, "kohya")
    assert (tmp_path / "out" / "train" / "1_photo").is_dir()
    counts: dict[str, int] = defaultdict(int)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text("utf-8"))
    for name in manifest["files"]:
        counts[name.split("/")[0]] += 1
    assert set(counts) == {"train", "validation"}
    typo = run.invoke(app, [*arguments, "--format", "koyha"])
    assert isinstance(typo.exception, UserError)
    assert "did you mean kohya" in str(typo.exception)
