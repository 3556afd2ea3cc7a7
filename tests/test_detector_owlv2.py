"""Detector owlv2: pixels and boxes against transformers' own classes, padded as published."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sdprep.annotate import Sample
from sdprep.cli import app
from sdprep.detectors import owlv2
from sdprep.detectors._padded_square import pixels_of
from sdprep.errors import DataError, RecipeError, UserError
from sdprep.recipe import options
from sdprep.table import PhotoTable

SIDE = 192
TOKENIZER = {"vocab.json": {}, "merges.txt": {}}


@pytest.fixture(scope="module")
def model(tmp_path_factory, shared_data):
    """A tiny model with weights that make boxes and scores follow the pixels, as published."""
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection

    folder = tmp_path_factory.mktemp("models") / "tiny owlv2"
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2}
    vision = size | {"image_size": SIDE, "patch_size": 16}
    config = Owlv2Config(text_config=size, vision_config=vision, projection_dim=16)
    torch.manual_seed(0)
    net = Owlv2ForObjectDetection(config)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3 if "box_head" in name else 0.12)
    net.save_pretrained(folder)
    clip = shared_data("clip_tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(clip, model_max_length=16)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(shared_data):
    paths = [
        shared_data("overlay") / name for name in ("008_cjk_subtitle.jpg", "016_date_stamp.jpg")
    ]
    images = [Image.open(path).convert("RGB") for path in paths]
    assert images[0].height > images[0].width
    assert images[1].height < images[1].width
    return images


def reference_pixels(image: Image.Image, side: int) -> torch.Tensor:
    """transformers' own resize and normalisation of a square that is padded with 0.5."""
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    values = np.asarray(image).astype(np.float64) / 255
    square = np.full((max(image.size), max(image.size), 3), 0.5)
    square[: image.height, : image.width] = values
    processor = Owlv2ImageProcessorPil(
        size={"height": side, "width": side}, do_rescale=False, do_pad=False
    )
    return processor(images=square, return_tensors="pt", input_data_format="channels_last")[
        "pixel_values"
    ].float()


def reference_boxes(model, image: Image.Image, queries: list[str], threshold: float) -> list[dict]:
    """Published post-processing: pixels of the padded square, then cut to the picture."""
    from transformers import AutoTokenizer, Owlv2ForObjectDetection

    net = Owlv2ForObjectDetection.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer(queries, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        out = net(pixel_values=reference_pixels(image, SIDE), **text)
    scores, labels = out.logits[0].max(-1)
    found = []
    for (cx, cy, w, h), score, label in zip(
        out.pred_boxes[0], scores.sigmoid(), labels, strict=True
    ):
        side = max(image.size)
        if score > threshold and cx * side <= image.width and cy * side <= image.height:
            x = [float((cx - w / 2) * side), float((cx + w / 2) * side)]
            y = [float((cy - h / 2) * side), float((cy + h / 2) * side)]
            x = [min(max(value, 0), image.width) for value in x]
            y = [min(max(value, 0), image.height) for value in y]
            found.append({"box": (x[0], y[0], x[1], y[1]), "label": queries[label]})
    return found


def build(model, *settings: str) -> owlv2.Owlv2Detector:
    given = [f'model="{model}"', 'device="cpu"', *settings]
    return options(owlv2.Config, given, type="owlv2").build()


@pytest.mark.parametrize("side", [SIDE, 960])
def test_pixels_are_those_of_the_authors(photos, side):
    small = photos[0].resize((150, 90))  # enlarged, in place of reduced
    for image in [photos[1], small, Image.new("RGB", (1, 1), "red")]:
        got = pixels_of(image, side)
        assert got.dtype == np.float32
        assert np.abs(got - reference_pixels(image, side)[0].numpy()).max() < 2e-5


def test_boxes_agree_within_a_pixel_in_portrait_and_landscape(model, photos):
    queries = ["a watermark", "a clock"]
    detector = build(model, f"queries={json.dumps(queries)}", "min_score=0.1")
    batch = detector.annotate([Sample("id", {}, image) for image in photos])
    assert batch.schema == detector.columns
    for image, row in zip(photos, batch.to_pylist(), strict=True):
        wanted = reference_boxes(model, image, queries, 0.1)
        assert len(row["boxes"]) == len(wanted) > 20
        assert len(wanted) < (SIDE // 16) ** 2, "some are dropped"
        for box, want in zip(row["boxes"], wanted, strict=True):
            corners = np.array([box[name] for name in ("x0", "y0", "x1", "y1")])
            assert np.abs(corners * (image.size * 2) - want["box"]).max() <= 1
            assert box["label"] == want["label"]
            assert (corners >= 0).all()
            assert (corners <= 1).all()
        assert 0 < row["coverage"] <= 1
    first, second = (np.array([b["x0"] for b in row["boxes"]][:20]) for row in batch.to_pylist())
    assert np.abs(first - second).max() > 0.05, "boxes follow the pixels"


def test_batch_mates_change_nothing(model, photos):
    detector = build(model, "min_score=0.45")
    together = detector.annotate([Sample("", {}, image) for image in photos]).to_pylist()
    alone = [detector.annotate([Sample("", {}, image)]).to_pylist()[0] for image in photos]
    for one, other in zip(together, alone, strict=True):
        assert [box["label"] for box in one["boxes"]] == [box["label"] for box in other["boxes"]]
        assert one["coverage"] == pytest.approx(other["coverage"], abs=1e-5)


def test_a_box_that_is_centred_in_the_padding_is_dropped():
    places = np.array([[0.5, 0.2, 0.2, 0.2], [0.5, 0.6, 0.4, 0.4], [0.9, 0.45, 0.4, 0.3]])
    inside, corners = owlv2.unpadded(places, (800, 400))
    assert inside.tolist() == [True, False, True]
    assert corners[0] == pytest.approx([0.4, 0.2, 0.6, 0.6])
    assert corners[2] == pytest.approx([0.7, 0.6, 1.0, 1.0])
    inside, corners = owlv2.unpadded(places[:, [1, 0, 3, 2]], (400, 800))
    assert inside.tolist() == [True, False, True]
    assert corners[0] == pytest.approx([0.2, 0.4, 0.6, 0.6])


def test_the_command_line_runs_it_and_tags_follow(model, shared_data, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("008_cjk_subtitle.jpg", "neg_001.jpg"):
        shutil.copy(shared_data("overlay") / name, photos)
    table = str(tmp_path / "a table.lance")

    def sdprep(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    sdprep("ingest", str(photos), table)
    what = ["--with", "owlv2", "--model", str(model), "--device", "cpu", "--json"]
    report = json.loads(sdprep("detect", table, *what))
    assert report["column"] == "boxes_owlv2"
    assert (report["done"], report["failed"]) == (2, 0)
    assert json.loads(sdprep("detect", table, *what))["done"] == 0
    sdprep("tag", table)
    rows = PhotoTable.open(table).read(["tags", "boxes_owlv2.boxes"]).to_pylist()
    assert all(row["boxes_owlv2.boxes"] for row in rows)
    assert [row["tags"][0]["name"] for row in rows] == ["watermark"] * 2
    assert rows[0]["tags"][0]["source"] == "owlv2"


def test_what_is_no_owlv2_is_refused(model, tmp_path):
    with pytest.raises(UserError, match=r"query 'a a .* tokens, the model takes 16"):
        build(model, f'queries=["{"a " * 30}"]')
    with pytest.raises(RecipeError, match="occur once"):
        build(model, 'queries=["x", "x"]')
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    with pytest.raises(DataError, match="model_type 'clip'"):
        build(other)


def test_a_model_that_lacks_weights_is_refused_not_made_up(model, tmp_path, photos):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["box_head.dense0.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"lack 1 tensors, such as box_head\.dense0\.weight"):
        build(broken).annotate([Sample("", {}, photos[0])])
