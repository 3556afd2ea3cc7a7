"""WD v3 taggers: ratings, general tags and characters of drawings."""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field

from sdprep.annotate import PixelNeeds, Sample
from sdprep.devices import BatchSize, DeviceName, FittingBatches
from sdprep.errors import DataError
from sdprep.model_files import ModelFolder, ModelName, Revision, fingerprint, model_folder
from sdprep.recipe import AnnotatorConfig
from sdprep.taggers._scored_tags import COLUMNS, StoreAbove, tagged
from sdprep.taggers._wd_backends import ONNX_FILE, TIMM_FILES, Backend, OnnxBackend, TimmBackend
from sdprep.taggers._white_square import white_square

TAGS_FILE = "selected_tags.csv"
CATEGORIES = {
    "0": "general",
    "1": "artist",
    "3": "copyright",
    "4": "character",
    "5": "meta",
    "9": "rating",
}
_HEADER = ["tag_id", "name", "category", "count"]


class Config(AnnotatorConfig):
    """WD v3 (ViT, SwinV2, ConvNeXt, ViT-L, EVA02-L): ratings, general tags, characters."""

    type: Literal["wd"] = "wd"
    model: ModelName = "SmilingWolf/wd-vit-tagger-v3"
    revision: Revision = None
    backend: Literal["auto", "onnx", "timm"] = Field(
        "auto", description="onnx, timm (safetensors), or what the model has, onnx first."
    )
    device: DeviceName = "auto"
    batch_size: BatchSize = 16
    store_above: StoreAbove = 0.1

    def build(self) -> WdTagger:
        """Find the model's files and read the list of tags.

        Raises:
            UserError: files are missing or of another model, or a package or device is.
        """
        files = {"onnx": (ONNX_FILE,), "timm": TIMM_FILES}
        chosen = "onnx" if self.backend == "auto" else self.backend
        folder = model_folder(self.model, self.revision, (TAGS_FILE, *files[chosen]))
        if self.backend == "auto" and not folder.has(ONNX_FILE):
            folder = model_folder(self.model, self.revision, (TAGS_FILE, *TIMM_FILES))
            chosen = "timm"
        return WdTagger(folder, chosen, self)


class WdTagger:
    """Fills `tags_wd`; the most probable rating is always among them."""

    columns = COLUMNS
    pixels = PixelNeeds()
    is_thread_safe = False

    def __init__(self, folder: ModelFolder, backend: str, config: Config) -> None:
        self.batch_size, self.store_above = config.batch_size, config.store_above
        self.tags = read_tags(folder)
        self.backend = OnnxBackend if backend == "onnx" else TimmBackend
        self.backend.check(folder)
        self.folder, self.device = folder, config.device
        self.fingerprint = fingerprint(
            "wd", 1, folder, backend=backend, store_above=config.store_above
        )
        self._batches = FittingBatches("tagger wd")
        self._model: Backend | None = None

    def annotate(self, batch: Sequence[Sample]) -> pa.RecordBatch:
        """Every tag at or above the storing threshold, the most probable first."""
        run = functools.partial(self._batches.run, self._probabilities)
        return tagged(batch, run, self.tags, self.store_above)

    def _probabilities(self, images: Sequence[Image.Image]) -> np.ndarray:
        if self._model is None:
            self._model = self.backend(self.folder, self.device, len(self.tags))
        squares = [white_square(image, self._model.side_px) for image in images]
        return self._model.probabilities(np.stack(squares)[..., ::-1])  # RGB to BGR


def read_tags(folder: ModelFolder) -> list[tuple[str, str]]:
    """(name, category) of every output, from `selected_tags.csv`.

    Raises:
        DataError: another header, or a line that is no tag.
    """
    path = folder.need(TAGS_FILE)
    tags = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = csv.reader(stream)
            header = next(lines, [])
            if header != _HEADER:
                raise DataError(f"{path} begins with {','.join(header)!r}, expected {_HEADER}")
            for number, line in enumerate(lines, 2):
                if not line:
                    continue
                if len(line) != len(_HEADER) or line[2] not in CATEGORIES or not line[1]:
                    known = ", ".join(f"{key} {name}" for key, name in CATEGORIES.items())
                    raise DataError(
                        f"{path}, line {number}: {','.join(line)!r} is no tag with a category; "
                        f"known: {known}"
                    )
                tags.append((line[1], CATEGORIES[line[2]]))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no list of tags: {error}") from None
    if not tags:
        raise DataError(f"{path} lists no tags")
    return tags
