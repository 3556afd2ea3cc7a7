"""WD taggers: a real ONNX graph in the published layout, and what may never be mixed up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdprep import devices
from sdprep.annotate import Sample
from sdprep.errors import DataError, MissingExtraError, UserError
from sdprep.images import open_image
from sdprep.recipe import validate
from sdprep.taggers import wd
from sdprep.taggers._wd_backends import OnnxBackend, input_side, normalised
from sdprep.tags import TagsConfig, compose_tags

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SIDE = 16
ROWS = [
    (9999999, "general", 9, 807858),
    (9999998, "sensitive", 9, 3771700),
    (9999997, "questionable", 9, 769899),
    (9999996, "explicit", 9, 560281),
    (470575, "1girl", 0, 4225150),
    (212816, "solo", 0, 3515897),
    (1, ":3", 0, 100),
    (2, "fate/stay_night,_(odd)", 0, 50),
    (3, "hatsune_miku", 4, 71000),
    (4, "saber_(fate)", 4, 20000),
]
NAMES = [row[1] for row in ROWS]
CATEGORY = {9: "rating", 0: "general", 4: "character"}


def write_tags(folder: Path, rows=ROWS, header="tag_id,name,category,count") -> None:
    def quoted(name: str) -> str:
        return f'"{name}"' if "," in name else name

    lines = [f"{a},{quoted(b)},{c},{d}" for a, b, c, d in rows]
    (folder / "selected_tags.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")


def matrix(seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Weights (SIDE * SIDE * 3, N) over pixels as the graph sees them, and biases (N,)."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, 1, (SIDE * SIDE * 3, len(ROWS))) * 0.0005
    return weight.astype(np.float32), rng.normal(0, 0.5, len(ROWS)).astype(np.float32)


def write_onnx(folder: Path, *, batch="batch_size", shape=None, sigmoid=True) -> None:
    """Input (batch, side, side, 3), as published; flatten, multiply, sigmoid."""
    helper, kinds = onnx.helper, onnx.TensorProto
    weight, bias = matrix()
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"]),
    ]
    if sigmoid:
        nodes.append(helper.make_node("Sigmoid", ["logits"], ["output"]))
    shape = shape or [batch, SIDE, SIDE, 3]
    out = "output" if sigmoid else "logits"
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", kinds.FLOAT, shape)],
        [helper.make_tensor_value_info(out, kinds.FLOAT, [batch, len(ROWS)])],
        [
            onnx.numpy_helper.from_array(weight, "weight"),
            onnx.numpy_helper.from_array(bias, "bias"),
        ],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / "model.onnx")


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "wd tagger"
    path.mkdir()
    write_tags(path)
    write_onnx(path)
    return path


@pytest.fixture(scope="module")
def photos(shared_data) -> list[Image.Image]:
    names = ("astronaut.png", "coffee.png", "rocket.jpg", "chelsea.png", "hubble_deep_field.jpg")
    images = [open_image(shared_data("skimage") / name).image for name in names]
    return [*images, images[1].resize((90, 301)), images[2].resize((SIDE, SIDE))]


def tagger_of(folder: Path, **given) -> wd.WdTagger:
    data = {"type": "wd", "model": str(folder), "device": "cpu"} | given
    return validate(data, wd.Config, "the test").build()


def samples(images: list[Image.Image]) -> list[Sample]:
    return [Sample(str(index), {}, image) for index, image in enumerate(images)]


def probabilities(tagger: wd.WdTagger, images: list[Image.Image]) -> np.ndarray:
    batch = tagger.annotate(samples(images))
    assert batch.schema == tagger.columns
    rows = [{tag["name"]: tag["p"] for tag in tags} for tags in batch["tags"].to_pylist()]
    return np.array([[row[name] for name in NAMES] for row in rows], np.float32)


def reference(image: Image.Image, fill=(255, 255, 255), order=(2, 1, 0)) -> np.ndarray:
    """What the authors' scripts do, in numpy."""
    longest = max(image.size)
    canvas = Image.new("RGB", (longest, longest), fill)
    canvas.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    if longest != SIDE:
        canvas = canvas.resize((SIDE, SIDE), Image.BICUBIC)
    pixels = np.asarray(canvas, np.float64)[:, :, list(order)]
    weight, bias = matrix()
    return 1 / (1 + np.exp(-(pixels.reshape(-1) @ weight + bias)))


# --- parity -------------------------------------------------------------------------------------


def test_parity_with_the_reference_on_real_photos(folder, photos):
    found = probabilities(tagger_of(folder, store_above=0.0), photos)
    wanted = np.stack([reference(photo) for photo in photos])
    assert np.abs(found - wanted).max() <= 1e-3
    assert wanted.std(axis=0).max() > 0.02, "the model must tell photos apart"
    for wrong in ({"order": (0, 1, 2)}, {"fill": (0, 0, 0)}, {"fill": (124, 116, 104)}):
        other = np.stack([reference(photo, **wrong) for photo in photos])
        assert np.abs(found - other).max() > 1e-3, wrong


def test_batch_size_changes_nothing_even_where_the_graph_fixes_one(folder, photos):
    tagger = tagger_of(folder, store_above=0.0)
    together = probabilities(tagger, photos)
    alone = np.concatenate([probabilities(tagger, [photo]) for photo in photos])
    np.testing.assert_array_equal(alone, together)  # to the last bit, on a CPU
    for batch in (1, 4):  # 7 photos: the last call of four is filled up
        write_onnx(folder, batch=batch)
        fixed = probabilities(tagger_of(folder, store_above=0.0), photos)
        np.testing.assert_allclose(fixed, together, atol=1e-6)
    assert tagger.annotate([]).num_rows == 0


def test_too_little_memory_halves_the_batch(folder, photos, monkeypatch, capsys):
    tagger = tagger_of(folder, store_above=0.0)
    right = probabilities(tagger, photos)
    run, sizes = OnnxBackend.probabilities, []

    def with_little_memory(self, bgr):
        sizes.append(len(bgr))
        if len(bgr) > 2:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 4")
        return run(self, bgr)

    monkeypatch.setattr(OnnxBackend, "probabilities", with_little_memory)
    np.testing.assert_allclose(probabilities(tagger, photos), right, atol=1e-6)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert "out of memory with 7 images, goes on with 3" in capsys.readouterr().err
    assert probabilities(tagger, photos[:2]).shape == (2, len(ROWS))
    assert sizes[9:] == [1, 1], "what fits is remembered"


def test_a_single_image_that_does_not_fit_stops_with_a_reason():
    def never(part):
        raise MemoryError

    with pytest.raises(UserError, match="out of memory with a single image"):
        devices.FittingBatches("tagger wd").run(never, [1, 2, 3])
    with pytest.raises(RuntimeError, match="other"):
        devices.FittingBatches("tagger wd").run(lambda _: _fail(), [1])


def _fail():
    raise RuntimeError("some other trouble")


# --- the other form: safetensors for timm ---------------------------------------------------------

TIMM = {
    "architecture": "vit_base_patch16_224",
    "num_classes": len(ROWS),
    "model_args": {"img_size": 448},
    "pretrained_cfg": {
        "input_size": [3, 448, 448],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
    },
}


def write_timm(folder: Path, **changes) -> None:
    (folder / "config.json").write_text(json.dumps(TIMM | changes), encoding="utf-8")
    save_file({"head.weight": torch.zeros(2, 2)}, folder / "model.safetensors")


def test_timm_sees_bgr_first_from_minus_one_to_one():
    bgr = np.zeros((1, 2, 2, 3), np.uint8)
    bgr[..., 0], bgr[..., 2] = 255, 51
    pixels = normalised(bgr)
    assert pixels.shape == (1, 3, 2, 2)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels[0, :, 0, 0].numpy(), [1.0, -1.0, -0.6], atol=1e-6)


def test_timm_configuration_is_read_or_refused():
    trained = TIMM["pretrained_cfg"]
    assert input_side(TIMM, "config.json") == 448
    for changes, message in (
        ({"mean": [0.485, 0.456, 0.406]}, "mean is"),
        ({"std": [0.2, 0.2, 0.2]}, "std is"),
        ({"input_size": [3, 448, 224]}, "input_size is"),
        ({"input_size": None}, "input_size is None"),
    ):
        with pytest.raises(DataError, match=message):
            input_side(TIMM | {"pretrained_cfg": {**trained, **changes}}, "config.json")
    with pytest.raises(DataError, match="no pretrained_cfg"):
        input_side({"architecture": "vit"}, "config.json")


def test_what_the_folder_holds_is_what_runs(folder, monkeypatch):
    write_timm(folder)
    assert json.loads(tagger_of(folder).fingerprint)["backend"] == "onnx"
    (folder / "model.onnx").unlink()
    hide(monkeypatch, "timm")
    with pytest.raises(MissingExtraError, match="model.safetensors .* needs timm") as caught:
        tagger_of(folder)
    assert "[timm]" in str(caught.value)


def test_the_package_that_is_missing_is_named(folder, monkeypatch):
    hide(monkeypatch, "onnxruntime")
    with pytest.raises(MissingExtraError, match="model.onnx needs onnxruntime.*pip install") as hit:
        tagger_of(folder)
    assert "[tag]" in str(hit.value)


def hide(monkeypatch, package: str) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )


# --- what is stored, and what comes of it ---------------------------------------------------------


def test_categories_ratings_and_the_storing_threshold(folder, photos):
    everything = probabilities(tagger_of(folder, store_above=0.0), photos)
    rows = tagger_of(folder, store_above=0.6).annotate(samples(photos))["tags"].to_pylist()
    for row, all_p in zip(rows, everything, strict=True):
        best = int(np.argmax(all_p[:4]))
        kept = {name for name, p in zip(NAMES, all_p, strict=True) if p >= 0.6} | {NAMES[best]}
        assert {tag["name"] for tag in row} == kept
        for tag in row:
            assert tag["category"] == CATEGORY[ROWS[NAMES.index(tag["name"])][2]]
        ratings = [tag["name"] for tag in row if tag["category"] == "rating"]
        assert ratings[0] == NAMES[best]
    rows = tagger_of(folder, store_above=1.0).annotate(samples(photos))["tags"].to_pylist()
    for row, all_p in zip(rows, everything, strict=True):
        assert [tag["name"] for tag in row] == [NAMES[int(np.argmax(all_p[:4]))]]


def test_thresholds_move_without_running_again(tmp_path, folder, shared_data, monkeypatch):
    from sdprep.annotate import annotate
    from sdprep.ingest import ingest
    from sdprep.sources.folder import Config as Folder
    from sdprep.table import PhotoTable

    (tmp_path / "photos").mkdir()
    for name in ("astronaut.png", "coffee.png", "rocket.jpg"):
        (tmp_path / "photos" / name).write_bytes((shared_data("skimage") / name).read_bytes())
    table = PhotoTable.open(tmp_path / "t.lance", create=True)
    ingest(table, Folder(type="folder", path=tmp_path / "photos").build())
    tagger = tagger_of(folder)
    (report,) = annotate(table, {"tags_anime": tagger})
    assert (report.done, report.failed) == (3, 0)
    monkeypatch.setattr(tagger, "annotate", None)
    stored = table.read(["tags_anime.tags"])[0].to_pylist()

    def check(limits: dict[str, float], labels: dict[str, float], config: TagsConfig) -> None:
        compose_tags(table, config)
        for row, raw in zip(table.read(["tags"])["tags"].to_pylist(), stored, strict=True):
            assert {tag["source"] for tag in row} == {"anime"}
            best = max((tag for tag in raw if tag["category"] == "rating"), key=lambda t: t["p"])
            wanted = {best["name"]} | {
                tag["name"]
                for tag in raw
                if tag["category"] != "rating"
                and tag["p"] >= labels.get(tag["name"], limits[tag["category"]])
            }
            assert {tag["name"] for tag in row} == wanted

    check({"general": 0.35, "character": 0.85}, {}, TagsConfig())  # a name of one's own, still WD
    low = {"general": 0.1, "character": 0.2}
    check(low, {}, TagsConfig(thresholds={"anime": low}))
    one = {"solo": 1.0, "hatsune_miku": 0.0}
    check(low, one, TagsConfig(thresholds={"anime": low}, label_thresholds={"anime": one}))
    assert len(stored[0]) > 4


def test_fingerprint_names_weights_tags_and_options(folder, tmp_path):
    first = tagger_of(folder).fingerprint
    assert tagger_of(folder, batch_size=3).fingerprint == first
    assert tagger_of(folder, store_above=0.2).fingerprint != first
    write_tags(folder, [*ROWS[:-1], (4, "another", 4, 20000)])
    assert tagger_of(folder).fingerprint != first


# --- what cannot be used --------------------------------------------------------------------------


def test_files_that_are_missing_are_named(folder):
    (folder / "selected_tags.csv").rename(folder / "tags.csv")
    with pytest.raises(
        DataError, match=r"has no selected_tags\.csv; found: model\.onnx, tags\.csv"
    ):
        tagger_of(folder)


def test_pickled_weights_are_refused(folder):
    (folder / "model.onnx").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pytorch_model\.bin and no model\.safetensors"):
        tagger_of(folder)
    with pytest.raises(DataError, match=r"has no model\.onnx"):
        tagger_of(folder, backend="onnx")


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (ROWS, "id,tag,kind", "begins with 'id,tag,kind'"),
        ([*ROWS, (5, "x", 7, 1)], None, "line 12: '5,x,7,1' is no tag"),
        ([*ROWS, (5, "", 0, 1)], None, "line 12"),
        ([], None, "lists no tags"),
    ],
)
def test_a_list_of_tags_of_another_kind(folder, rows, header, message):
    write_tags(folder, rows, header or "tag_id,name,category,count")
    with pytest.raises(DataError, match=message):
        tagger_of(folder)


def test_another_graph_is_one_clear_error(folder, photos):
    def message(tagger) -> str:
        with pytest.raises(DataError) as caught:
            tagger.annotate(samples(photos[:1]))
        return str(caught.value)

    write_onnx(folder, shape=["batch_size", 3, SIDE, SIDE])
    assert "expected one input (images, side, side, 3)" in message(tagger_of(folder))
    write_onnx(folder, sigmoid=False)
    assert "expected probabilities" in message(tagger_of(folder))
    write_onnx(folder)
    write_tags(folder, ROWS[:-1])
    assert "gives 10 values, selected_tags.csv lists 9" in message(tagger_of(folder))
    (folder / "model.onnx").write_bytes(b"not a graph")
    assert "cannot be opened by ONNX Runtime" in message(tagger_of(folder))


def test_a_device_that_is_not_there_is_not_replaced(folder, photos, capsys):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=f"device {device} is not there"):
            tagger_of(folder, device=device).annotate(samples(photos[:1]))
    with pytest.raises(UserError, match="does not run on mps"):
        tagger_of(folder, device="mps").annotate(samples(photos[:1]))
    tagger_of(folder, device="auto").annotate(samples(photos[:1]))
    assert "tagger wd runs on cpu" in capsys.readouterr().err
