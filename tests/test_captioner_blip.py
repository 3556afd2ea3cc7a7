"""The captioner `blip` on a real, tiny BLIP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdprep.annotate import annotate
from sdprep.captioners._generation import Request
from sdprep.captioners.blip import BlipWriter, Config
from sdprep.errors import DataError
from sdprep.model_files import model_folder
from sdprep.seeding import rng_for
from tests.caption_table import caption_table
from tests.tiny_captioners import save_tiny_blip


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_blip(tmp_path_factory.mktemp("models") / "tiny blip")


def config(blip: Path, beginning: str | None = None) -> Config:
    return Config(
        model=str(blip), device="cpu", temperature=1.0, max_new_tokens=10, beginning=beginning
    )


def test_blip_captions_a_table(tmp_path: Path, blip: Path) -> None:
    table = caption_table(tmp_path, [None] * 5)
    [report] = annotate(table, {"caption_blip": config(blip).build()})
    rows = table.read(["caption_blip"])["caption_blip"].to_pylist()
    assert report.done >= 4, report.first_error
    done = [row for row in rows if row["error"] is None]
    assert len({row["text"] for row in done}) == len(done)
    assert all(row["prompt"] is None and row["finish_reason"] for row in done)
    assert not any("[" in row["text"] for row in done)
    [again] = annotate(table, {"caption_blip": config(blip).build()})
    assert again.skipped == 5


@pytest.mark.parametrize("beginning", [None, "the old house"])
def test_a_caption_does_not_depend_on_its_batch_mates(blip: Path, beginning: str | None) -> None:
    writer = BlipWriter(model_folder(str(blip), None, ["*"]), config(blip, beginning), "cpu")
    wanted = []
    for number in range(6):
        pixels = rng_for("blip test", number).integers(0, 255, (30 + number, 40, 3))
        image = Image.fromarray(pixels.astype(np.uint8))
        wanted.append(Request(f"{number:032x}", image, 0, beginning, 0))
    alone = [writer.write([request])[0] for request in wanted]
    assert writer.write(wanted) == alone
    assert writer.write(wanted[:2]) + writer.write(wanted[2:]) == alone
    texts = {answer.text for answer in alone}
    assert len(texts) == 6
    assert all(text.startswith(beginning or "") for text in texts)


def test_another_kind_of_model_is_refused(tmp_path: Path, blip: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llava"}', encoding="utf-8")
    with pytest.raises(DataError, match="expected blip"):
        Config(model=str(folder)).build()
