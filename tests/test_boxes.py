"""Boxes: suppression against a plain recount, and what `sdprep show --to` draws of them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from sdprep import boxes
from sdprep.annotate import PixelNeeds, annotate
from sdprep.box_drawing import boxes_of, colours, draw_boxes
from sdprep.cli import app
from sdprep.schema import BOX
from sdprep.table import PhotoTable


def box(label: str, score: float, *corners: float) -> dict:
    return {"label": label, "score": score} | dict(
        zip(("x0", "y0", "x1", "y1"), corners, strict=True)
    )


def iou(one, other) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    both = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)) - shared
    return shared / both if both else 0.0


corner = st.integers(0, 6)
places = st.lists(
    st.tuples(corner, corner, st.integers(1, 4), st.integers(1, 4), st.integers(0, 5)), max_size=12
)


@settings(max_examples=80, deadline=None)
@given(places, st.sampled_from([0.2, 0.5, 0.7]))
def test_suppression_keeps_the_best_of_what_overlaps(found, limit):
    rects = np.array([[x, y, x + w, y + h] for x, y, w, h, _ in found], float).reshape(-1, 4)
    scores = np.array([entry[4] for entry in found], float)
    kept = boxes.not_overlapping(rects, scores, limit).tolist()
    assert scores[kept].tolist() == sorted(scores[kept], reverse=True)
    for position, index in enumerate(kept):
        assert all(iou(rects[index], rects[other]) <= limit for other in kept[:position])
    for index in set(range(len(found))) - set(kept):
        better = [other for other in kept if scores[other] >= scores[index]]
        assert any(iou(rects[index], rects[other]) > limit for other in better)


def test_a_column_holds_clipped_boxes_and_their_union():
    row = boxes.found(["a", "b"], [0.5, 0.25], np.array([[-0.5, 0, 0.5, 1], [0.25, 0, 0.75, 2]]))
    assert row["boxes"] == [box("a", 0.5, 0, 0, 0.5, 1), box("b", 0.25, 0.25, 0, 0.75, 1)]
    assert row["coverage"] == pytest.approx(0.75)
    assert boxes.found([], [], np.zeros((0, 4))) == {"boxes": [], "coverage": 0.0}
    batch = pa.RecordBatch.from_pylist([row], schema=boxes.COLUMNS)
    assert batch.schema.field("boxes").type == pa.list_(BOX)


def test_labels_do_not_suppress_each_other_and_neither_do_detectors():
    same = (0.1, 0.1, 0.5, 0.5)
    row = {
        "boxes_one": {"boxes": [box("a", 0.5, *same), box("b", 0.4, *same), box("a", 0.9, *same)]},
        "boxes_two": {"boxes": [box("a", 0.3, *same)]},
        "boxes_failed": {"boxes": None},
        "boxes_open": None,
        "id": "boxes_",
    }
    assert [(each["label"], each["score"]) for each in boxes_of(row)] == [
        ("a", 0.9),
        ("b", 0.4),
        ("a", 0.3),
    ]


def test_every_label_has_a_colour_of_its_own():
    labels = [f"label {index}" for index in range(10)]
    assert len(set(colours(labels).values())) == 10
    assert colours(["text"]) == colours(["text", "text"])
    assert len(colours([str(index) for index in range(30)])) == 30


@pytest.mark.parametrize("size", [(1, 1), (640, 20), (30, 900)])
def test_boxes_at_the_edge_of_small_pictures_draw(size):
    image = Image.new("RGB", size, "white")
    draw_boxes(image, [box("見本 watermark", 1.0, 0, 0, 1, 1), box("", 0.0, 1, 1, 1, 1)])
    assert image.size == size
    assert image.getpixel((0, 0)) != (255, 255, 255)


class Planted:
    """Two boxes on every picture, one of them found twice."""

    columns = boxes.COLUMNS
    pixels = PixelNeeds(pixels=False)
    fingerprint = "planted"
    batch_size = 4
    is_thread_safe = True

    def annotate(self, batch) -> pa.RecordBatch:
        corners = np.array([[0.25, 0.5, 0.75, 0.75], [0.26, 0.5, 0.76, 0.76], [0.8, 0.1, 1, 0.3]])
        row = boxes.found(["text", "text", "face"], [0.9, 0.5, 0.7], corners)
        return pa.RecordBatch.from_pylist([row] * len(batch), schema=boxes.COLUMNS)


@pytest.mark.parametrize("size", [(400, 800), (800, 400)])
def test_show_draws_the_boxes(tmp_path, size):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", size, "white").save(photos / "a.png")

    def sdprep(*arguments: str) -> None:
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output

    path = str(tmp_path / "t.lance")
    sdprep("ingest", str(photos), path)
    to = tmp_path / "out" / "drawn.png"
    sdprep("show", path, "a.png", "--to", str(to))
    assert Image.open(to).getcolors() == [(400 * 800, (255, 255, 255))], "no boxes yet"
    annotate(PhotoTable.open(path), {"boxes_planted": Planted()})
    sdprep("show", path, "a.png", "--to", str(to))
    drawn = Image.open(to).convert("RGB")
    assert drawn.size == size
    by_label = colours(["face", "text"])

    def colour_at(x: float, y: float) -> str:
        pixel = drawn.getpixel((round(x * (size[0] - 1)), round(y * (size[1] - 1))))
        return "#{:02x}{:02x}{:02x}".format(*pixel)

    for x, y in ((0.25, 0.6), (0.75, 0.6), (0.5, 0.75)):
        assert colour_at(x, y) == by_label["text"]
    assert colour_at(0.8, 0.2) == colour_at(1, 0.2) == by_label["face"]
    assert colour_at(0.5, 0.6) == "#ffffff", "the inside stays as it is"
    assert colour_at(0.76, 0.6) == "#ffffff", "the second box of one text is not drawn"
    top = drawn.crop((size[0] // 4, size[1] // 2 - 12, size[0] // 2, size[1] // 2))
    assert by_label["text"] in {"#{:02x}{:02x}{:02x}".format(*c) for _, c in top.getcolors(9999)}
