"""Captions against their pictures: cosines, what is flagged, and what is out of date."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from sdprep.annotate import PixelNeeds, Sample, annotate
from sdprep.caption_check import COLUMN, caption_counts, check_captions
from sdprep.caption_similarity import least_usual
from sdprep.cli import main
from sdprep.images import open_image
from sdprep.recipe import validate
from sdprep.scorers import clip_similarity
from sdprep.seeding import rng_for
from sdprep.stages import annotate_stage, ingest_stage, source_from
from sdprep.table import PhotoTable
from tests.caption_table import caption_table
from tests.tiny_contrastive import save_tiny_contrastive

torch.set_num_threads(1)
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 190, 40),
    "blue": (40, 60, 220),
    "yellow": (230, 220, 40),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models of ours")
    return {kind: save_tiny_contrastive(root / kind, kind) for kind in ("clip", "siglip")}


def scorer_of(folder: Path, **given: Any):
    data = {"type": "clip_similarity", "model": str(folder), "device": "cpu", **given}
    return validate(data, clip_similarity.Config, "the test").build()


def sample(name: str, image: Image.Image, **row: Any) -> Sample:
    return Sample(name, row, image)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_cosines_are_those_of_plain_transformers(folders, kind, shared_data):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    names = ("astronaut.png", "coffee.png", "rocket.jpg")
    photos = [open_image(shared_data("skimage") / name).image for name in names]
    long = "a very long caption of many words, " * 30
    texts = ["an astronaut in front of a flag", long, "a rocket, 火箭 🚀 at night"]
    scorer = scorer_of(folders[kind])
    batch = [
        sample(str(n), photo, text={"caption": text}, caption_x={"text": texts[0]})
        for n, (photo, text) in enumerate(zip(photos, texts, strict=True))
    ]
    found = scorer.annotate(batch)
    assert found.schema == scorer.columns
    rows = found.to_pylist()

    model = AutoModel.from_pretrained(folders[kind]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    images = AutoImageProcessor.from_pretrained(folders[kind])
    length = {"clip": 77, "siglip": 64}[kind]
    for row, photo, text in zip(rows, photos, texts, strict=True):
        for entry, caption in zip(row["captions"], (text, texts[0]), strict=True):
            ids = tokenizer([caption.strip()])["input_ids"][0]
            if len(ids) > length:
                ids = [*ids[: length - 1], ids[-1]]  # its end mark stays
            if kind == "siglip":
                ids = [*ids, *[tokenizer.pad_token_id] * (length - len(ids))]
            with torch.no_grad():
                pixels = images(photo, return_tensors="pt")["pixel_values"]
                out = model(input_ids=torch.tensor([ids]), pixel_values=pixels)
            cosine = torch.nn.functional.cosine_similarity(out.text_embeds, out.image_embeds)
            assert entry["cosine"] == pytest.approx(float(cosine), abs=1e-5)
            assert entry["is_cut"] == (caption == long)
        assert [entry["column"] for entry in row["captions"]] == ["text", "caption_x"]
        assert row["score"] == min(entry["cosine"] for entry in row["captions"])


def test_batches_change_nothing_and_no_caption_is_no_error(folders, capsys):
    image = Image.new("RGB", (40, 30), "teal")
    captions = [None, "a dog", "  ", "two cats on a very long wall", None]
    batch = [sample(str(n), image, text={"caption": c}) for n, c in enumerate(captions)]
    scorer = scorer_of(folders["clip"])
    together = scorer.annotate(batch).to_pylist()
    alone = [row for one in batch for row in scorer.annotate([one]).to_pylist()]
    assert together == alone
    empty = {"score": None, "captions": []}
    assert [row == empty for row in together] == [True, False, True, False, True]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("there are images without a caption") == 1


# --- what is flagged ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def knows_colours(tmp_path_factory) -> Path:
    """A tiny CLIP that has learnt which word goes with a picture of which colour."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder = save_tiny_contrastive(tmp_path_factory.mktemp("trained") / "clip", "clip")
    model = AutoModel.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)(
        [f"a {name} wall" for name in COLOURS], return_tensors="pt", padding=True
    )
    images = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():  # from where it can learn
        for tensor in model.parameters():
            tensor /= 8 if tensor.dim() > 1 else 1
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        pixels = images([picture(name, step) for name in COLOURS], return_tensors="pt")
        out = model(**tokens, pixel_values=pixels["pixel_values"], return_loss=True)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert out.loss.item() < 0.1
    model.save_pretrained(folder)
    return folder


def picture(colour: str, number: int) -> Image.Image:
    rng = rng_for("colours", colour, number)
    noise = rng.integers(-14, 15, (72, 64 + number % 7, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


def colour_table(folder: Path, wrong: dict[int, str]) -> PhotoTable:
    """60 plain pictures captioned by their colour; those of `wrong` by another."""
    photos = folder / "photos"
    photos.mkdir()
    names = list(COLOURS)
    for number in range(60):
        colour = names[number % len(names)]
        picture(colour, 1000 + number).save(photos / f"{number:03d}.png")
        said = wrong.get(number, colour)
        (photos / f"{number:03d}.caption").write_text(f"a {said} wall", encoding="utf-8")
    table = PhotoTable.open(folder / "photos.lance", create=True)
    ingest_stage(table, source_from(str(photos), "auto", [], {}))
    return table


def flagged_by_similarity(table: PhotoTable) -> list[str]:
    rows = table.read(["sources", COLUMN]).to_pylist()
    return sorted(
        row["sources"][0]["key"][:3] for row in rows if "similarity" in row[COLUMN]["flags"]
    )


def test_wrong_pairs_are_flagged_and_no_others(tmp_path, knows_colours):
    wrong = {4: "red", 13: "blue", 31: "white", 50: "yellow"}
    table = colour_table(tmp_path, wrong)
    config = clip_similarity.Config(model=str(knows_colours), device="cpu")
    [report] = annotate_stage(table, [("scorer", "score_clip_similarity", config)])
    assert (report["done"], report["failed"]) == (60, 0)
    assert flagged_by_similarity(table) == ["004", "013", "031", "050"]
    counts = caption_counts(table)
    assert counts is not None
    assert counts["flags"] == {"similarity": 4}
    assert counts["uncompared"] == 0
    assert counts["sets"]["sidecar"]["similarity"]["score_clip_similarity"] > 0.5
    reasons = table.read([COLUMN])[COLUMN].to_pylist()[4]["reasons"]
    assert reasons[0].startswith("sidecar: similarity: ")


def test_without_wrong_pairs_none_is_flagged(tmp_path, knows_colours):
    table = colour_table(tmp_path, {})
    config = clip_similarity.Config(model=str(knows_colours), device="cpu")
    annotate_stage(table, [("scorer", "score_clip_similarity", config)])
    assert flagged_by_similarity(table) == []


def test_the_bound_stands_firm_while_fewer_than_half_are_wrong():
    rng = rng_for("bound")
    right, wrong = rng.normal(0.28, 0.03, 1000), rng.normal(0.1, 0.02, 150)
    alone, mixed = least_usual(right.tolist()), least_usual([*right, *wrong])
    assert 0.28 - 3.3 * 0.03 < alone < 0.28 - 2.7 * 0.03
    assert abs(mixed - alone) < 0.03
    assert np.mean(right < mixed) < 0.01
    assert np.mean(wrong < mixed) > 0.99
    assert least_usual([0.3] * 40) < 0.3  # all alike: none of them is an outlier


# --- out of date ----------------------------------------------------------------------------------


class Writer:
    """Captions every image alike, or otherwise at another attempt."""

    columns = pa.schema([("text", pa.string()), ("attempt", pa.int32())])
    pixels = PixelNeeds(pixels=False)
    fingerprint = "writer"
    batch_size = 4
    is_thread_safe = False

    def __init__(self, text: str) -> None:
        self.text = text

    def annotate(self, batch):
        rows = [{"text": self.text, "attempt": sample.attempt} for sample in batch]
        return pa.RecordBatch.from_pylist(rows, schema=self.columns)


def test_a_caption_written_later_is_out_of_date_until_compared(tmp_path, folders):
    table = caption_table(tmp_path, ["A dog sits on grass.", None, "A cat lies on a wall."])
    jobs = [
        (
            "scorer",
            "score_clip_similarity",
            clip_similarity.Config(model=str(folders["clip"]), device="cpu"),
        )
    ]
    annotate_stage(table, jobs)
    assert caption_counts(table)["uncompared"] == 0
    annotate(table, {"caption_writer": Writer("A bird sits on a wall.")})
    check_captions(table)
    counts = caption_counts(table)
    assert (counts["uncompared"], counts["flagged"]) == (3, 0)
    checks = table.read([COLUMN])[COLUMN].to_pylist()
    assert checks[0]["columns"] == ["score_clip_similarity"]
    assert checks[0]["reasons"] == [
        "writer: not compared by score_clip_similarity since it was written"
    ]
    [again] = annotate_stage(table, jobs)
    assert (again["done"], again["skipped"]) == (0, 3)
    [retried] = annotate_stage(table, jobs, retry_failed=True)
    assert (retried["done"], retried["failed"]) == (3, 0)
    assert caption_counts(table)["uncompared"] == 0
    values = table.read(["score_clip_similarity"])["score_clip_similarity"].to_pylist()
    assert [[e["column"] for e in value["captions"]] for value in values] == [
        ["text", "caption_writer"],
        ["caption_writer"],
        ["text", "caption_writer"],
    ]
    # Another text in the same place is no longer the one that was compared.
    annotate(table, {"caption_writer": Writer("A horse runs on sand.")}, redo=True)
    check_captions(table)
    assert caption_counts(table)["uncompared"] == 3


class Config:
    def __init__(self, annotator):
        self.annotator = annotator

    def build(self):
        return self.annotator


def test_in_one_run_captions_are_written_before_they_are_compared(tmp_path, folders):
    table = caption_table(tmp_path, [None] * 3)
    scorer = Config(scorer_of(folders["clip"]))
    writer = Config(Writer("A bird sits on a wall."))
    jobs = [("scorer", "score_near", scorer), ("captioner", "caption_writer", writer)]
    reports = annotate_stage(table, jobs)
    assert {report["column"]: report["done"] for report in reports} == {
        "score_near": 3,
        "caption_writer": 3,
    }
    assert caption_counts(table)["uncompared"] == 0
    assert all(v["score"] is not None for v in table.read(["score_near"])["score_near"].to_pylist())


def test_the_command_line_scores_and_says_what_is_out_of_date(
    tmp_path, folders, monkeypatch, capsys
):
    table = caption_table(tmp_path, [f"A dog number {n} sits on the grass." for n in range(4)])

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["sdprep", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        return capsys.readouterr().out

    how = ("--with", "clip_similarity", "--model", folders["siglip"], "--device", "cpu")
    found = json.loads(call("score", table.path, *how, "--as", "near", "--json"))
    assert (found["column"], found["done"]) == ("score_near", 4)
    assert "median similarity" in call("status", table.path)
    table.refresh()
    annotate(table, {"caption_writer": Writer("A bird sits on a wall.")})
    check_captions(table)
    text = " ".join(call("status", table.path).split())
    assert "4 images have captions that were not compared with them" in text
    call("score", table.path, *how, "--as", "near", "--retry-failed")
    assert "not compared" not in call("status", table.path)
