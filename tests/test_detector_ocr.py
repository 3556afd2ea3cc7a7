"""Detector ocr: what it finds on real photos with text drawn on them, and where."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from sdprep.annotate import Sample
from sdprep.detectors import ocr
from sdprep.errors import MissingExtraError
from sdprep.images import open_image
from sdprep.masks import corners, coverage
from sdprep.recipe import options


@pytest.fixture(scope="module")
def detector() -> ocr.OcrDetector:
    pytest.importorskip("rapidocr", reason="rapidocr is not installed: pip install '.[detect]'")
    return ocr.Config().build()


def row_of(detector: ocr.OcrDetector, image: Image.Image) -> dict:
    batch = detector.annotate([Sample("id", {}, image)])
    assert batch.schema == detector.columns
    return batch.to_pylist()[0]


def picture_with(text: str, size: tuple[int, int], at: tuple[int, int]) -> tuple[Image.Image, list]:
    image = Image.new("RGB", size, "#d8d0c0")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(40)
    draw.text(at, text, fill="black", font=font)
    ink = draw.textbbox(at, text, font=font)
    return image, [side / total for side, total in zip(ink, size * 2, strict=True)]


@pytest.mark.parametrize("size", [(420, 640), (640, 420)])
def test_a_line_is_read_where_it_stands(detector, size):
    image, ink = picture_with("Sample text", size, (90, 330))
    row = row_of(detector, image)
    (line,), (box,) = row["lines"], row["boxes"]
    assert line["text"].replace(" ", "") == "Sampletext"
    assert box["label"] == "text"
    assert box["score"] == line["score"] > 0.9
    slack = np.array([15 / side for side in size * 2])
    assert (np.abs(corners([box])[0] - ink) < slack).all()
    polygon = np.array(line["polygon"]).reshape(4, 2)
    assert np.allclose(polygon.min(0), corners([box])[0, :2], atol=1e-6)
    assert row["coverage"] == pytest.approx(coverage(corners([box])), abs=1e-6)
    assert 0.6 * row["coverage"] < row["text_fraction"] <= row["coverage"] + 1e-6


def test_drawn_text_is_found_and_clean_photos_are_left_alone(detector, shared_data):
    folder = shared_data("overlay")
    pictures = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
    by_kind = {picture["kind"]: picture for picture in pictures if picture["boxes"]}
    clean = [picture for picture in pictures if picture["kind"] == "clean"]
    assert len(by_kind) == 5
    drawn = [by_kind[kind] for kind in ("corner_signature", "cjk_subtitle")]
    for picture in [*drawn, clean[2]]:
        row = row_of(detector, open_image(folder / picture["file"]).image)
        assert bool(row["boxes"]) == bool(picture["boxes"]), picture["file"]
        assert (row["text_fraction"] > 0) == bool(picture["boxes"])
        assert all(line["score"] >= 0.5 for line in row["lines"])
    # Noise is kept among the lines, so that other limits can be judged later.
    assert [len(line["text"]) for line in row["lines"]] == [1]


def test_limits_decide_what_becomes_a_box(detector):
    image, _ = picture_with("AB", (400, 300), (150, 120))
    assert len(row_of(detector, image)["boxes"]) == 1
    strict = options(ocr.Config, ["min_characters=3"], type="ocr").build()
    row = row_of(strict, image)
    assert row["boxes"] == []
    assert row["coverage"] == row["text_fraction"] == 0
    assert len(row["lines"]) == 1
    assert strict.fingerprint != detector.fingerprint
    assert not strict._is_text("-.1,2!", 1.0)
    assert strict._is_text("1 2 3", 0.7)
    assert not strict._is_text("1 2 3", 0.69)


@pytest.mark.parametrize("size", [(1, 1), (1, 400)])
def test_a_strip_takes_no_memory_and_makes_no_box(detector, size):
    assert ocr._widened(Image.new("RGB", size)).shape[0] >= size[0] / 8
    row = row_of(detector, Image.new("RGB", size, "white"))
    assert row["boxes"] == []
    assert row["lines"] == []


def test_text_fraction_is_the_area_of_the_union():
    pytest.importorskip("shapely", reason="shapely comes with rapidocr: pip install '.[detect]'")
    diamond = np.array([[0.5, 0.0], [1.0, 0.5], [0.5, 1.0], [0.0, 0.5]])
    assert ocr.text_fraction(diamond[None]) == pytest.approx(0.5)
    left = np.array([[0.0, 0.0], [0.5, 0.0], [0.5, 1.0], [0.0, 1.0]])
    assert ocr.text_fraction(np.stack([diamond, left, left])) == pytest.approx(0.75)
    assert ocr.text_fraction(np.stack([left - 0.25])) == pytest.approx(0.25 * 0.75)
    assert ocr.text_fraction(np.zeros((0, 4, 2))) == 0
    crossed = left[[0, 2, 1, 3]]
    assert ocr.text_fraction(crossed[None]) == pytest.approx(0.5)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(MissingExtraError, match=r"detector ocr needs rapidocr.*rapidocr>="):
        ocr.Config().build()
