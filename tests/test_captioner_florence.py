"""The captioner `florence` on a real, tiny Florence-2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdprep.annotate import annotate
from sdprep.captioners._generation import Request
from sdprep.captioners.florence import Config, FlorenceWriter
from sdprep.errors import DataError
from sdprep.model_files import model_folder
from sdprep.seeding import rng_for
from tests.caption_table import caption_table
from tests.tiny_captioners import save_tiny_florence


@pytest.fixture(scope="module")
def florence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_florence(tmp_path_factory.mktemp("models") / "tiny florence")


def config(model: Path) -> Config:
    return Config(model=str(model), device="cpu", temperature=1.0, max_new_tokens=10)


def test_florence_captions_a_table(tmp_path: Path, florence: Path) -> None:
    table = caption_table(tmp_path, [None] * 5)
    [report] = annotate(table, {"caption_florence": config(florence).build()})
    rows = table.read(["caption_florence"])["caption_florence"].to_pylist()
    assert report.done >= 4, report.first_error
    done = [row for row in rows if row["error"] is None]
    assert {row["prompt"] for row in done} == {"<MORE_DETAILED_CAPTION>"}
    assert {row["finish_reason"] for row in done} <= {"stop", "length"}
    assert len({row["text"] for row in done}) == len(done)
    assert not any("<" in row["text"] for row in done)


def test_a_caption_does_not_depend_on_its_batch_mates(florence: Path) -> None:
    writer = FlorenceWriter(model_folder(str(florence), None, ["*"]), config(florence), "cpu")
    wanted = []
    for number in range(6):
        pixels = rng_for("florence test", number).integers(0, 255, (30 + number, 40, 3))
        image = Image.fromarray(pixels.astype(np.uint8))
        wanted.append(Request(f"{number:032x}", image, 0, "<CAPTION>", 0))
    alone = [writer.write([request])[0] for request in wanted]
    assert writer.write(wanted) == alone
    assert writer.write(wanted[:2]) + writer.write(wanted[2:]) == alone
    assert len({answer.text for answer in alone}) == 6


def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    text = '{"model_type": "florence2", "auto_map": {"AutoConfig": "configuration_florence2.X"}}'
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="florence-community"):
        Config(model=str(folder)).build()
