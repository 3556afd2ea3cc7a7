"""Small tables of pictures with captions, for tests of captioners and of their monitors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sdprep.seeding import rng_for
from sdprep.stages import ingest_stage, source_from
from sdprep.table import PhotoTable


def caption_table(folder: Path, captions: Sequence[str | None], size: int = 72) -> PhotoTable:
    """A table of one small picture for each caption, in their order."""
    photos = folder / "some photos"
    photos.mkdir(parents=True)
    for number, caption in enumerate(captions):
        pixels = rng_for("caption_table", number).integers(0, 255, (size, size + number % 5, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(photos / f"{number:03d}.png")
        if caption is not None:
            (photos / f"{number:03d}.caption").write_text(caption, encoding="utf-8")
    table = PhotoTable.open(folder / "photos.lance", create=True)
    ingest_stage(table, source_from(str(photos), "auto", [], {}))
    return table
