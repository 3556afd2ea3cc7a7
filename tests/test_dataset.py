"""What can be trained on: prepared folders, any Hugging Face data set, the curated table."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdprep.buckets import Bucket
from sdprep.errors import DataError, RecipeError
from sdprep.prompt_policy import PromptPolicy
from sdprep.schema import CORE, FOLDS
from sdprep.table import PhotoTable
from sdprep.table_policy import remember_policy
from sdtrain.buckets import assign, require_enough
from sdtrain.data_fingerprint import fingerprint, of_split
from sdtrain.dataset import TrainingData, open_data, renderer
from sdtrain.pixels import evaluation_view, picture_of, training_view
from sdtrain.recipe import DataSection
from tests.train_data import prepared_row, small_jpeg, write_prepared


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def opened(path: Path, **options: Any) -> TrainingData:
    prompt = PromptPolicy(**options.pop("prompt", {}))
    return open_data(DataSection(path=str(path), **options), prompt)


# --- prepared folders -----------------------------------------------------------------------------


def test_a_prepared_folder_opens_with_both_splits_and_its_policy(prepared_folder: Path) -> None:
    data = opened(prepared_folder)
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (14, 4)
    expected = prepared_row(2)
    assert data.train.ids[2] == expected["id"]
    assert data.train.sizes_hw[2].tolist() == [80, 112]
    assert data.train.records([2])[0]["caption"] == expected["caption"]
    assert data.train.image(2).size == (112, 80)
    assert data.policy.mode == "caption"
    assert data.policy.dropout_p == 0.1


def test_the_recipe_overrides_the_policy_key_by_key(prepared_folder: Path) -> None:
    data = opened(prepared_folder, prompt={"dropout_p": 0.5})
    assert (data.policy.mode, data.policy.dropout_p) == ("caption", 0.5)


@pytest.mark.parametrize("version", [2, "1", None])
def test_an_unknown_schema_version_is_refused_by_name(tmp_path: Path, version: Any) -> None:
    folder = write_prepared(tmp_path / "set", [prepared_row(0)], SCHEMA_VERSION=version)
    with pytest.raises(DataError, match="SCHEMA_VERSION"):
        opened(folder)


def test_an_unknown_policy_key_names_the_file(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", [prepared_row(0)], policy={"mood": "tags"})
    with pytest.raises(RecipeError, match=r"sdprep\.json"):
        opened(folder)


def test_an_image_in_both_splits_of_a_prepared_folder_is_refused(tmp_path: Path) -> None:
    rows = [prepared_row(n) for n in range(3)]
    with pytest.raises(DataError, match="in train and in validation"):
        opened(write_prepared(tmp_path / "set", rows, rows[:1]))


def test_an_id_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="twice"):
        opened(write_prepared(tmp_path / "set", [prepared_row(0), prepared_row(0)]))


def test_rows_that_ask_for_repeats_are_counted(tmp_path: Path) -> None:
    data = opened(write_prepared(tmp_path / "set", [prepared_row(0, repeats=3), prepared_row(1)]))
    assert "1 rows ask for repeats, up to 3: an epoch of 2 rows is 4 samples" in data.notes


def test_what_does_not_exist_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        opened(tmp_path / "nothing here")
    with pytest.raises(DataError, match="no such folder"):
        opened(Path("nobody/nothing"))


def test_a_folder_published_again_is_read_again(tmp_path: Path) -> None:
    for count in (3, 2):
        rows = [prepared_row(10 * count + number) for number in range(count)]
        for folder in (tmp_path / "a" / "same name", tmp_path / "b" / "same name"):
            data = open_data(DataSection(path=str(write_prepared(folder, rows))), PromptPolicy())
            assert data.train.ids == [row["id"] for row in rows]
            rows = [prepared_row(10 * count + number, caption="other") for number in range(1)]


def test_the_fingerprint_sees_texts_and_splits_and_not_the_folder(tmp_path: Path) -> None:
    rows = [prepared_row(n) for n in range(4)]
    first = opened(write_prepared(tmp_path / "a", rows)).fingerprint
    assert opened(write_prepared(tmp_path / "b", rows)).fingerprint == first
    edited = [*rows[:3], {**rows[3], "caption": "another text"}]
    assert opened(write_prepared(tmp_path / "c", edited)).fingerprint != first
    held_out = opened(write_prepared(tmp_path / "d", rows[:3], rows[3:])).fingerprint
    assert held_out != first


def test_rows_travel_to_other_processes(prepared_folder: Path) -> None:
    rows = opened(prepared_folder).train
    again = pickle.loads(pickle.dumps(rows))
    assert again.ids == rows.ids
    assert again.image(3).tobytes() == rows.image(3).tobytes()


def test_a_picture_that_does_not_decode_names_the_row(tmp_path: Path) -> None:
    broken = prepared_row(1, data=small_jpeg(1, (80, 112))[:300])
    rows = opened(write_prepared(tmp_path / "set", [prepared_row(0), broken])).train
    with pytest.raises(DataError, match=rf"row 1 \({broken['id']}\)"):
        rows.image(1)


# --- any Hugging Face data set --------------------------------------------------------------------


def image_folder(root: Path, files: dict[str, bytes], column: str = "text") -> Path:
    """An imagefolder: pictures and metadata.jsonl with one text each."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    lines = [{"file_name": name, column: f"text of {name}"} for name in files]
    text = "\n".join(json.dumps(line) for line in lines)
    (root / "metadata.jsonl").write_text(text, encoding="utf-8")
    return root


def jpegs(count: int) -> dict[str, bytes]:
    return {f"{n:02d}.jpg": small_jpeg(n, (90, 100)) for n in range(count)}


def test_an_image_folder_needs_no_preparation(tmp_path: Path) -> None:
    data = opened(image_folder(tmp_path / "photos of mine", jpegs(3)))
    assert data.validation is None
    assert sorted(r["caption"] for r in data.train.records(range(3))) == [
        f"text of 0{n}.jpg" for n in range(3)
    ]
    assert data.train.sizes_hw.tolist() == [[100, 90]] * 3
    assert "pictures are taken from column image, texts from column text" in data.notes


def test_broken_files_are_refused_with_a_count_and_a_fifth_of_them_stops(tmp_path: Path) -> None:
    files = jpegs(10)
    files["03.jpg"] = files["03.jpg"][:400]
    files["07.jpg"] = b"<html>not found</html>"
    data = opened(image_folder(tmp_path / "two", files))
    assignment = assign(data.train, [Bucket(64, 64)], 1.0)
    assert len(assignment.kept) == 8
    assert assignment.reasons() == {"not_an_image": 1, "truncated": 1}
    require_enough(assignment, "train", 10)
    files["08.jpg"] = b""
    data = opened(image_folder(tmp_path / "three", files))
    with pytest.raises(DataError, match="3 of 10 rows are refused"):
        require_enough(assign(data.train, [Bucket(64, 64)], 1.0), "train", 10)


def test_the_same_file_twice_is_two_rows(tmp_path: Path) -> None:
    files = jpegs(2) | {"copy.jpg": small_jpeg(0, (90, 100))}
    data = opened(image_folder(tmp_path / "photos", files))
    assert len(set(data.train.ids)) == 3
    assert len({id_.split("#")[0] for id_ in data.train.ids}) == 2


def test_held_out_copies_of_training_images_are_left_out(tmp_path: Path) -> None:
    image_folder(tmp_path / "set" / "train", jpegs(4))
    image_folder(tmp_path / "set" / "validation", {"x.jpg": small_jpeg(2, (90, 100)), **jpegs(0)})
    data = opened(tmp_path / "set")
    assert data.validation is not None
    assert list(data.validation.refused) == [0]
    assert "1 validation images are also in train and are left out" in data.notes


def hub_set(path: Path, columns: dict[str, Sequence[Any]]) -> Path:
    from datasets import Dataset, DatasetDict, Image

    pictures = [{"bytes": small_jpeg(n, (90, 100)), "path": None} for n in range(2)]
    made = Dataset.from_dict({"photo": pictures, **columns}).cast_column("photo", Image())
    DatasetDict({"train": made}).save_to_disk(str(path))
    return path


def test_a_saved_data_set_with_several_captions_each(tmp_path: Path) -> None:
    path = hub_set(tmp_path / "saved", {"captions": [["a", "b"], ["c", ""]]})
    records = opened(path).train.records([0, 1])
    assert [c["text"] for c in records[0]["captions"]] == ["a", "b"]
    assert [c["text"] for c in records[1]["captions"]] == ["c"]


def test_columns_that_cannot_be_told_apart_must_be_named(tmp_path: Path) -> None:
    path = hub_set(tmp_path / "saved", {"left": ["a", "b"], "right": ["c", "d"], "n": [1, 2]})
    with pytest.raises(DataError, match=r"cannot tell .* holds the text.*left \(string\)"):
        opened(path)
    data = opened(path, caption_column="right")
    assert data.train.records([1])[0]["caption"] == "d"
    with pytest.raises(DataError, match="no column"):
        opened(path, caption_column="rigth")
    with pytest.raises(DataError, match="holds no text"):
        opened(path, caption_column="n")
    with pytest.raises(DataError, match="holds no pictures"):
        opened(path, image_column="left", caption_column="left")


@pytest.mark.parametrize("shape", ["bytes", "struct"])
def test_pictures_that_are_not_marked_as_such_are_opened(shape: str, tmp_path: Path) -> None:
    """As pandas or pyarrow write them: the bytes of the files, alone or with a path."""
    files = [small_jpeg(n, (90, 100)) for n in range(2)]
    cells = files if shape == "bytes" else [{"bytes": data, "path": None} for data in files]
    table = pa.table({"image": cells, "text": ["a", "b"]})
    (tmp_path / "plain").mkdir()
    pq.write_table(table, tmp_path / "plain" / "train.parquet")
    for named in ({}, {"image_column": "image"}):
        rows = opened(tmp_path / "plain", **named).train
        assert rows.sizes_hw.tolist() == [[100, 90]] * 2
        assert rows.image(1).size == (90, 100)
        assert rows.records([1])[0]["caption"] == "b"


def test_a_column_that_no_name_can_mend_is_not_asked_for(tmp_path: Path) -> None:
    path = hub_set(tmp_path / "saved", {"label": [1, 2]})
    with pytest.raises(DataError, match="cannot tell") as caught:
        opened(path)
    assert caught.value.hint.startswith("No column has strings or lists of strings")


def test_what_is_said_of_columns_and_revisions_to_no_effect_is_noted(
    tmp_path: Path, prepared_folder: Path
) -> None:
    notes = opened(prepared_folder, caption_column="text", image_column="png").notes
    assert [note for note in notes if "is not used" in note] == [
        "image_column = 'png' is not used: columns of a prepared set are known",
        "caption_column = 'text' is not used: columns of a prepared set are known",
    ]
    for path in (prepared_folder, hub_set(tmp_path / "saved", {"text": ["a", "b"]})):
        data = opened(path, revision="v1")
        assert f"revision = 'v1' is not used: {path} is on this disk" in data.notes
        assert data.provenance["revision"] is None
        assert not any("is not used" in note for note in opened(path).notes)


def test_rows_without_text_are_counted(tmp_path: Path) -> None:
    data = opened(hub_set(tmp_path / "saved", {"text": ["a", None]}))
    assert "1 of 2 rows of train have no text: empty prompt" in data.notes


# --- the curated table ----------------------------------------------------------------------------


def core_row(number: int, **changed: Any) -> dict[str, Any]:
    row = prepared_row(number)
    text = {"caption": f"sidecar {number}", "tags": [{"name": "cat", "category": "general"}]}
    return {
        **{key: row[key] for key in ("id", "width", "height")},
        "image": row["image"]["bytes"],
        "format": "JPEG",
        "mode": "RGB",
        "frames": 1,
        "exif_orientation": 1,
        "has_alpha": False,
        "sources": [{"source": "photos", "key": f"{number}.jpg"}],
        "text": text,
        **changed,
    }


@pytest.fixture
def table(tmp_path: Path) -> PhotoTable:
    made = PhotoTable.open(tmp_path / "photos.lance", create=True)
    rows = [core_row(n) for n in range(6)]
    rows[5] |= {"image": None, "reject_ingest": "animated"}
    with made.writer():
        made.add_images(pa.Table.from_pylist(rows, schema=CORE))
    return made


def test_a_table_is_trained_on_as_it_stands(table: PhotoTable) -> None:
    ids = [prepared_row(n)["id"] for n in range(5)]
    with table.writer():
        sides = pa.array(["train", "train", "validation", "train", None])
        captions = pa.array(["composed", None, None, None, None], pa.string())
        table.write_fold(ids, {"split": sides, "caption": captions}, stage="split")
    data = opened(table.path)
    assert data.validation is not None
    assert data.train.ids == [ids[0], ids[1], ids[3], ids[4]]
    assert data.validation.ids == [ids[2]]
    records = data.train.records([0, 1])
    assert [record["caption"] for record in records] == ["composed", "sidecar 1"]
    assert records[0]["tags"][0]["name"] == "cat"
    assert data.train.image(1).size == (80, 112)
    assert "no_split" in data.train.refused[3]
    again = pickle.loads(pickle.dumps(data.train))
    assert again.image(2).tobytes() == data.train.image(2).tobytes()


def test_a_table_without_a_split_is_refused_unless_all_of_it_is_meant(table: PhotoTable) -> None:
    with pytest.raises(DataError, match="has no split") as refused:
        opened(table.path)
    assert "sdprep split" in refused.value.hint
    data = opened(table.path, splits="all")
    assert data.validation is None
    assert len(data.train) == 5
    assert any("no split" in note for note in data.notes)
    prior = open_data(DataSection(path=str(table.path)), PromptPolicy(), needs_split=False)
    assert len(prior.train) == 5


def test_every_kind_of_data_says_whose_policy_is_in_force(
    table: PhotoTable, prepared_folder: Path, tmp_path: Path
) -> None:
    assert opened(prepared_folder).policy_origin.startswith("published with the data set")
    changed = opened(prepared_folder, prompt={"dropout_p": 0.5, "score": {"position": "none"}})
    assert changed.policy_origin.endswith("the recipe's [prompt] sets dropout_p, score")
    bare = write_prepared(tmp_path / "bare", [prepared_row(0)], policy={})
    assert opened(bare).policy_origin.startswith("the defaults: the data set has none")
    plain = opened(table.path, splits="all")
    assert plain.policy == PromptPolicy()
    assert plain.policy_origin.startswith("the defaults: the table keeps none")


def test_a_table_is_trained_on_under_the_policy_that_it_keeps(
    table: PhotoTable, tmp_path: Path
) -> None:
    """The very policy that publishing writes, other names of tags included."""
    from sdprep.prompt_rows import spellings
    from sdprep.publish import publish

    aliases = tmp_path / "aliases.csv"
    aliases.write_text("cat,0,90,kitty\ndog,0,80,hound\nhorse,0,70,pony\n", encoding="utf-8")
    some = [[{"name": "dog", "category": "general"}], None, None, None, None]
    tags = pa.array(some, FOLDS["tags"])  # the others keep what came with them: cat
    notes = {"tags_config": json.dumps({"aliases": str(aliases)})}
    with table.writer():
        ids = [prepared_row(n)["id"] for n in range(5)]
        table.write_fold(ids, {"tags": tags}, stage="tags", notes=notes)
    policy = PromptPolicy(mode="concat", dropout_p=0.25)
    remember_policy(table, policy)
    data = opened(table.path, splits="all", prompt={"max_chunks": 2})
    assert data.policy_origin.startswith("kept in the table by the last sdprep run")
    assert data.policy.aliases == {"cat": ("kitty",), "dog": ("hound",)}
    published = publish(table, tmp_path / "out", policy=policy, spellings=spellings(table))
    card = opened(published.path, prompt={"max_chunks": 2})
    assert card.policy == data.policy
    assert (data.policy.mode, data.policy.dropout_p, data.policy.max_chunks) == ("concat", 0.25, 2)


# --- rows to texts and pixels ---------------------------------------------------------------------


def test_texts_are_keyed_by_seed_id_and_visit(prepared_folder: Path) -> None:
    data = opened(prepared_folder, prompt={"dropout_p": 0.3})
    render = renderer(data.train, data.policy, 5, lambda prompt: 1 + len(prompt) // 300)
    texts = render([3, 0, 5], [2, 2, 2])
    assert render([0], [2]) == [texts[1]]
    many = [text for visit in range(30) for text in render(range(14), [visit] * 14)]
    dropped = [text for text in many if text.is_dropped]
    assert 0.2 < len(dropped) / len(many) < 0.4
    assert {text.prompt for text in dropped} == {""}
    assert {text.num_chunks for text in many} == {1, 3}


def gradient(width: int, height: int) -> Image.Image:
    across = np.tile(np.arange(width, dtype=np.uint8), (height, 1))
    down = np.tile(np.arange(height, dtype=np.uint8)[:, None], (1, width))
    return Image.fromarray(np.stack([across, down, across // 2], 2))


def test_the_crop_is_where_the_micro_conditioning_says() -> None:
    image, bucket = gradient(200, 90), Bucket(width=96, height=64)
    pixels, micro = training_view(image, bucket, (1, "id", 0))
    assert micro.time_ids()[:2] == [90, 200]
    assert micro.target_size_hw == (64, 96)
    resized = image.resize((142, 64), Image.Resampling.LANCZOS)
    top, left = micro.crop_top_left
    assert top == 0
    assert 0 <= left <= 142 - 96
    expected = resized.crop((left, top, left + 96, top + 64))
    assert picture_of(pixels).tobytes() == expected.tobytes()
    assert tuple(pixels.shape) == (3, 64, 96)


def test_random_crops_reach_both_ends_and_repeat_for_the_same_key() -> None:
    image, bucket = gradient(68, 64), Bucket(64, 64)
    lefts = [
        training_view(image, bucket, (1, "id", visit))[1].crop_top_left[1] for visit in range(80)
    ]
    assert set(lefts) == {0, 1, 2, 3, 4}
    again = training_view(image, bucket, (1, "id", 7))[1].crop_top_left[1]
    assert again == lefts[7]


def test_a_flip_mirrors_pixels_and_moves_the_crop() -> None:
    image, bucket = gradient(70, 64), Bucket(64, 64)
    plain, where = training_view(image, bucket, (1, "id", 3), flip_prob=0.0)
    flipped, mirrored = training_view(image, bucket, (1, "id", 3), flip_prob=1.0)
    assert flipped.flip(2).equal(plain)
    assert mirrored.crop_top_left[1] == 70 - where.crop_top_left[1] - 64
    flips = [
        training_view(image, bucket, (1, str(n), 0), flip_prob=0.5)[0].flip(2).diff().mean() > 0
        for n in range(100)
    ]
    assert 30 < sum(flips) < 70


def test_evaluation_takes_the_centre() -> None:
    _, micro = evaluation_view(gradient(75, 64), Bucket(64, 64))
    assert micro.crop_top_left == (0, 5)


def test_fingerprint_of_one_split_is_not_that_of_another(prepared_folder: Path) -> None:
    data = opened(prepared_folder)
    train, held_out = of_split(data.train), of_split(data.validation)
    assert data.fingerprint == fingerprint(train, held_out)
    assert fingerprint(train, of_split(None)) != data.fingerprint


def test_orientation_and_transparency_are_seen_to(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (100, 80), (200, 0, 0)).save(file, "JPEG", exif=exif)
    ghost = io.BytesIO()
    Image.new("RGBA", (80, 90), (0, 0, 0, 0)).save(ghost, "PNG")
    folder = image_folder(tmp_path / "f", {"a.jpg": file.getvalue(), "b.png": ghost.getvalue()})
    rows = opened(folder).train
    assert rows.sizes_hw.tolist() == [[100, 80], [90, 80]]
    assert rows.image(0).size == (80, 100)
    assert rows.image(1).getpixel((5, 5)) == (255, 255, 255)
