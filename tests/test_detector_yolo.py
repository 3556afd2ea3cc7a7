"""Detector yolo: exported graphs end to end, and decoding against a plain recount."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from sdprep.annotate import Sample
from sdprep.cli import app
from sdprep.detectors import _yolo_onnx, _yolo_ultralytics, yolo
from sdprep.errors import DataError, MissingExtraError, RecipeError, UserError
from sdprep.recipe import options
from sdprep.table import PhotoTable

NAMES = "{0: 'red', 1: 'green', 2: 'blue'}"
SIDE, CELL = 64, 8


def write_onnx(path: Path, *, names: str = NAMES, task: str = "detect", batch: int | str = "n"):
    """A detector of the standard export: each cell of 8 x 8 px is a box, scored by its colour."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install '.[test]'")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip '.[detect]'")
    from onnx import TensorProto, helper, numpy_helper

    count = SIDE // CELL
    at = (np.arange(count) + 0.5) * CELL
    x, y = np.meshgrid(at, at)
    cells = np.stack([x.ravel(), y.ravel(), *(np.full(count**2, CELL, float),) * 2])
    constants = {
        "cells": cells[None].astype(np.float32),  # (1, 4, 64) centre x, centre y, width, height
        "zeros": np.zeros((1, 3, 1), np.float32),
        "shape": np.array([-1, 3, count**2], np.int64),
    }
    nodes = [
        helper.make_node(
            "AveragePool", ["images"], ["means"], kernel_shape=[CELL] * 2, strides=[CELL] * 2
        ),
        helper.make_node("Reshape", ["means", "shape"], ["scores"]),
        # So that the boxes have as many images as the scores.
        helper.make_node("ReduceMax", ["scores"], ["one"], axes=[1, 2], keepdims=1),
        helper.make_node("Sub", ["one", "one"], ["zero"]),
        helper.make_node("Add", ["cells", "zero"], ["places"]),
        helper.make_node("Concat", ["places", "scores"], ["output0"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, [batch, 7, count**2])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, {"names": names, "task": task})
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("weights [v1]") / "best of [3].onnx")


def build(path: Path, *settings: str) -> yolo.YoloDetector:
    given = [f"model={json.dumps(str(path))}", 'device="cpu"', *settings]
    return options(yolo.Config, given, type="yolo").build()


def picture(size: tuple[int, int], **squares: tuple[int, int, int, int]) -> Image.Image:
    image = Image.new("RGB", size)
    for colour, (x0, y0, x1, y1) in squares.items():
        fill = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}[colour]
        ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), fill=fill)
    return image


@pytest.mark.parametrize(
    ("size", "square"),
    [
        ((128, 96), (32, 16, 64, 32)),  # landscape: grey above and below
        ((96, 128), (16, 32, 32, 64)),  # portrait: grey left and right
        ((64, 64), (8, 40, 16, 56)),
        ((32, 16), (8, 4, 16, 8)),  # enlarged; the edge of the square is blurred
    ],
)
@pytest.mark.parametrize("batch", ["n", 1, 2])
def test_boxes_lie_where_the_colours_do(tmp_path, size, square, batch):
    detector = build(write_onnx(tmp_path / "m.onnx", batch=batch), "min_score=0.5")
    images = [picture(size, red=square), picture(size), picture(size, blue=square)]
    result = detector.annotate([Sample("id", {}, image) for image in images])
    assert result.schema == detector.columns
    rows = result.to_pylist()
    for row, label in ((rows[0], "red"), (rows[2], "blue")):
        assert {box["label"] for box in row["boxes"]} == {label}
        assert all(0.5 < box["score"] <= 1 for box in row["boxes"])
        edges = [(min if name[1] == "0" else max)(box[name] for box in row["boxes"])
                 for name in ("x0", "y0", "x1", "y1")]  # fmt: skip
        assert np.abs(np.array(edges) * (size * 2) - square).max() < 1
        share = (square[2] - square[0]) * (square[3] - square[1]) / (size[0] * size[1])
        assert row["coverage"] == pytest.approx(share, abs=1e-5)
    assert rows[1] == {"boxes": [], "coverage": 0.0}


def test_labels_choose_classes_and_the_fingerprint_knows(exported):
    image = picture((64, 64), red=(0, 0, 32, 32), green=(32, 32, 64, 64))
    both = build(exported, "min_score=0.5")
    green = build(exported, "min_score=0.5", 'labels=["green"]')
    for detector, wanted in ((both, {"red", "green"}), (green, {"green"})):
        (row,) = detector.annotate([Sample("", {}, image)]).to_pylist()
        assert {box["label"] for box in row["boxes"]} == wanted
    assert len({both.fingerprint, green.fingerprint, build(exported).fingerprint}) == 3
    assert build(exported).fingerprint == build(exported, 'device="cpu"').fingerprint
    with pytest.raises(UserError, match=r"no class 'gren'\n.*Did you mean green"):
        build(exported, 'labels=["gren"]')


def test_other_weights_have_another_fingerprint(exported, tmp_path):
    other = write_onnx(tmp_path / exported.name, names="['red', 'green', 'purple']")
    assert build(other).fingerprint != build(exported).fingerprint
    assert build(other).model.label(2) == "purple"
    assert build(tmp_path).fingerprint == build(other).fingerprint, "a folder with one file"
    nameless = build(write_onnx(tmp_path / "nameless.onnx", names=""))
    assert nameless.model.label(1) == "class 1"
    with pytest.raises(UserError, match=r"no single .*: best of \[3\].onnx, nameless.onnx"):
        build(tmp_path)
    assert build(tmp_path, 'file="nameless.onnx"').fingerprint == nameless.fingerprint


def iou(one, other) -> float:
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    area = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return width * height / (sum(area) - width * height)


@pytest.mark.parametrize("more", [0, 32])
@pytest.mark.parametrize("seed", range(3))
def test_decoding_agrees_with_a_plain_recount(seed, more):
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([rng.uniform(20, 60, (2, 200)), rng.uniform(5, 30, (2, 200))])
    output = np.concatenate([boxes, rng.uniform(0, 1, (3, 200)), rng.uniform(2, 9, (more, 200))])
    places, scores, classes = _yolo_onnx.decoded(output.astype(np.float32), 3, 0.6, 0.4)
    wanted: list[tuple] = []
    columns = sorted(output.T.astype(np.float32), key=lambda column: -column[4:7].max())
    for column in columns:
        cx, cy, w, h = column[:4]
        place, kind = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), int(column[4:7].argmax())
        if column[4:7].max() > 0.6 and all(k != kind or iou(place, p) <= 0.4 for p, k in wanted):
            wanted.append((place, kind))
    assert 10 < len(wanted) < 150
    assert np.allclose(places, [place for place, _ in wanted], atol=1e-4)
    assert classes.tolist() == [kind for _, kind in wanted]
    assert (np.diff(scores) <= 0).all()


def test_models_that_suppress_overlaps_themselves_are_read_as_they_are():
    rows = [[1, 2, 30, 40, 0.3, 1], [1, 2, 30, 41, 0.9, 1], [5, 5, 9, 9, 0.2, 0], [0] * 6]
    output = np.array(rows * 3, np.float32)
    places, scores, classes = _yolo_onnx.decoded(output, 2, 0.25, 0.5)
    assert places.tolist() == [rows[1][:4]] * 3 + [rows[0][:4]] * 3
    assert classes.tolist() == [1] * 6
    assert np.allclose(scores, [0.9] * 3 + [0.3] * 3)
    many = np.tile(np.array([[10], [10], [2], [2], [0.9]], np.float32), (1, 900))
    many[0] = np.arange(900) * 5
    assert len(_yolo_onnx.decoded(many, 1, 0.25, 0.7)[0]) == 300
    with pytest.raises(DataError, match="has no 80 scores"):
        _yolo_onnx.decoded(many, 80, 0.25, 0.7)


def test_a_letterbox_keeps_the_whole_picture_and_leads_back():
    for size in ((640, 480), (333, 500), (50, 20), (1, 1), (3000, 7)):
        box = _yolo_onnx.letterboxed(Image.new("RGB", size, "white"), (320, 320))
        left, top, width, height = _yolo_onnx._placement(size, (320, 320))
        assert (box[top : top + height, left : left + width] == 255).all()
        box[top : top + height, left : left + width] = 114
        assert (box == 114).all()
        corners = np.array([[left, top, left + width, top + height], [-9, -9, 999, 999]])
        assert (_yolo_onnx.unletterboxed(corners, size, (320, 320)) == [0, 0, 1, 1]).all()


def test_the_resize_looks_at_four_pixels_and_no_more():
    """torch's bilinear without antialiasing is what OpenCV's INTER_LINEAR computes."""
    import torch

    pixels = np.random.default_rng(0).integers(0, 256, (90, 71, 3), np.uint8)
    for size in ((32, 40), (300, 200), (90, 17)):
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
        wanted = torch.nn.functional.interpolate(tensor, size, mode="bilinear")[0]
        got = _yolo_onnx._bilinear(pixels, size)
        assert np.abs(got - wanted.permute(1, 2, 0).numpy()).max() <= 0.51


def test_the_command_line_runs_it(exported, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    picture((128, 96), red=(32, 16, 64, 32)).save(photos / "a.png")
    Image.new("RGB", (96, 128)).save(photos / "b.png")

    def sdprep(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    table = str(tmp_path / "a table.lance")
    sdprep("ingest", str(photos), table)
    what = ["--with", "yolo", "--model", str(exported), "--set", "min_score=0.5", "--json"]
    report = json.loads(sdprep("detect", table, *what, "--as", "colours"))
    assert (report["column"], report["done"], report["failed"]) == ("boxes_colours", 2, 0)
    rows = PhotoTable.open(table).read(["boxes_colours.boxes"])["boxes_colours.boxes"].to_pylist()
    assert [len(row) for row in rows] == [2, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["image_size_px=320"], "was exported for 64 x 64 px, image_size_px is 320"),
        (['device="mps"'], "does not run on mps"),
        (['revision="main"'], "is a file"),
    ],
)
def test_options_that_do_not_fit_are_refused(exported, settings, message):
    with pytest.raises(UserError, match=message):
        build(exported, *settings)


def test_files_that_are_no_yolo_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="model .*missing"):
        options(yolo.Config, [], type="yolo")
    with pytest.raises(UserError, match="there is no file"):
        build(tmp_path / "gone.onnx")
    with pytest.raises(UserError, match="which file of someone/model"):
        build(Path("someone/model"))
    (tmp_path / "w.bin").write_bytes(b"x")
    with pytest.raises(DataError, match="no kind of weights"):
        build(tmp_path / "w.bin")
    with pytest.raises(DataError, match="is for the task classify"):
        build(write_onnx(tmp_path / "c.onnx", task="classify"))
    (tmp_path / "broken.onnx").write_bytes(b"broken")
    with pytest.raises(DataError, match="cannot be opened by ONNX Runtime"):
        build(tmp_path / "broken.onnx")


def test_weights_need_ultralytics_and_it_is_told_to_be_careful(tmp_path, monkeypatch):
    (tmp_path / "w.pt").write_bytes(b"x")
    for key in _yolo_ultralytics._SETTINGS:
        monkeypatch.setenv(key, "")
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(MissingExtraError, match=r"detector yolo needs ultralytics.*ultralytics>="):
        build(tmp_path / "w.pt")
    assert os.environ["ULTRALYTICS_SAFE_LOAD"] == "1"
    assert os.environ["YOLO_AUTOINSTALL"] == "false"


def test_a_torchvision_of_another_build_is_explained():
    with (
        pytest.raises(UserError, match=r"built for another PyTorch.*nms does not exist"),
        _yolo_ultralytics._explained(),
    ):
        raise RuntimeError("operator torchvision::nms does not exist")
    with pytest.raises(RuntimeError, match="other"), _yolo_ultralytics._explained():
        raise RuntimeError("other")
