"""Detector yolo with `.pt` weights, where ultralytics is installed (AGPL-3.0, so not for tests)."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from sdprep.annotate import Sample
from sdprep.detectors import _yolo_ultralytics, yolo
from sdprep.errors import DataError
from sdprep.recipe import options


def _nms(boxes: torch.Tensor, scores: torch.Tensor, limit: float) -> torch.Tensor:
    order, kept = scores.argsort(descending=True, stable=True), []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[rest, :2])
        high = torch.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        order = rest[shared / (area[best] + area[rest] - shared) <= limit]
    return torch.stack(kept) if kept else torch.zeros(0, dtype=torch.long)


@pytest.fixture(scope="module")
def ultralytics(tmp_path_factory):
    """The package, imported as the detector does, so that it loads weights and no code."""
    for name in ("ultralytics", "torchvision"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install '.[yolo]'")
    os.environ.setdefault("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("settings")))
    _yolo_ultralytics._imported()
    return sys.modules["ultralytics"]


@pytest.fixture(scope="module", autouse=True)
def operators():
    """A CUDA build of torchvision beside a CPU torch gets its one missing operator."""
    library = None
    is_there = importlib.util.find_spec("torchvision") is not None
    if is_there and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.impl("nms", _nms, "CPU")
        import torchvision.extension as extension

        extension._has_ops = lambda: True
    return library  # its operators live as long as it does


def build(path: Path, *settings: str) -> yolo.YoloDetector:
    given = [f"model={json.dumps(str(path))}", 'device="cpu"', *settings]
    return options(yolo.Config, given, type="yolo").build()


def test_boxes_are_those_of_ultralytics(ultralytics, tmp_path):
    torch.manual_seed(0)
    net = ultralytics.YOLO("yolo11n.yaml")
    with torch.no_grad():
        for branch in net.model.model[-1].cv3:
            branch[-1].bias.normal_(-1, 1)
    net.save(tmp_path / "random.pt")
    image = Image.new("RGB", (200, 120), "white")
    ImageDraw.Draw(image).ellipse((50, 20, 150, 100), fill="red")
    detector = build(tmp_path / "random.pt", "min_score=0.3", "image_size_px=64")
    for picture in (image, image.rotate(90, expand=True)):
        (row,) = detector.annotate([Sample("", {}, picture)]).to_pylist()
        pixels = np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])
        how = {"conf": 0.3, "iou": 0.7, "imgsz": 64, "verbose": False, "device": "cpu"}
        wanted = net.predict(pixels, **how)[0]
        assert len(row["boxes"]) == len(wanted.boxes) > 3
        for box, xyxy in zip(row["boxes"], wanted.boxes.xyxy.tolist(), strict=True):
            corners = np.array([box[name] for name in ("x0", "y0", "x1", "y1")])
            assert np.abs(corners * (picture.size * 2) - xyxy).max() <= 1
        names = [wanted.names[int(index)] for index in wanted.boxes.cls]
        assert [box["label"] for box in row["boxes"]] == names


class Hostile:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


def test_weights_that_bring_code_are_refused_and_it_never_runs(ultralytics, tmp_path):
    torch.save({"model": Hostile(tmp_path / "ran")}, tmp_path / "bad.pt")
    (tmp_path / "junk.pt").write_bytes(b"no weights")
    for name in ("bad.pt", "junk.pt"):
        with pytest.raises(DataError, match=rf"{name} holds no YOLO weights"):
            build(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "it would have run"
