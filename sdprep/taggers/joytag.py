"""JoyTag: Danbooru's tags for photographs and drawings alike."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from sdprep.annotate import PixelNeeds, Sample
from sdprep.devices import BatchSize, DeviceName, FittingBatches, batch_on, torch_device
from sdprep.errors import DataError
from sdprep.model_files import ModelFolder, ModelName, Revision, fingerprint, model_folder
from sdprep.recipe import AnnotatorConfig
from sdprep.taggers._joytag_vit import JoyTagViT, read_config
from sdprep.taggers._scored_tags import COLUMNS, StoreAbove, tagged
from sdprep.taggers._white_square import white_square

FILES = ("config.json", "model.safetensors", "top_tags.txt")

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's, RGB
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class Config(AnnotatorConfig):
    """JoyTag: some 5,800 Danbooru tags, good at photographs too; F1 .578 at threshold .4."""

    type: Literal["joytag"] = "joytag"
    model: ModelName = "fancyfeast/joytag"
    revision: Revision = None
    device: DeviceName = "auto"
    batch_size: BatchSize = 16
    store_above: StoreAbove = 0.1

    def build(self) -> JoyTagTagger:
        """Find the model's files and read all but the weights.

        Raises:
            UserError: files are missing or of another model, or the device is not there.
        """
        return JoyTagTagger(model_folder(self.model, self.revision, FILES), self)


class JoyTagTagger:
    """Fills `tags_joytag`; the file of tags knows no categories, so they are NULL."""

    columns = COLUMNS
    pixels = PixelNeeds()
    is_thread_safe = False

    def __init__(self, folder: ModelFolder, config: Config) -> None:
        self.folder, self.batch_size = folder, config.batch_size
        self.store_above = config.store_above
        self.vit_config = read_config(
            folder.read_json("config.json"), str(folder.path / "config.json")
        )
        self.tags = [(name, None) for name in _read_tags(folder, self.vit_config.n_tags)]
        folder.need("model.safetensors")
        self.device = torch_device(config.device, "tagger joytag")
        self.fingerprint = fingerprint("joytag", 1, folder, store_above=config.store_above)
        self._batches = FittingBatches("tagger joytag")
        self._model: JoyTagViT | None = None

    def annotate(self, batch: Sequence[Sample]) -> pa.RecordBatch:
        """Every tag at or above the storing threshold, the most probable first."""
        run = functools.partial(self._batches.run, self._probabilities)
        return tagged(batch, run, self.tags, self.store_above)

    def _probabilities(self, images: Sequence[Image.Image]) -> np.ndarray:
        import torch

        if self._model is None:
            weights = self.folder.read_weights()
            model = JoyTagViT(self.vit_config, weights, str(self.folder.path / FILES[1]))
            self._model = model.to(self.device)
        found = []
        size = batch_on(self.device, len(images))
        for start in range(0, len(images), size):
            part = images[start : start + size]
            pixels = np.stack([pixels_of(image, self.vit_config.image_size) for image in part])
            with torch.inference_mode():
                inputs = torch.from_numpy(pixels).to(self.device, copy=True)  # aligned, too
                logits = self._model.logits(inputs)
                found.append(logits.sigmoid().cpu().numpy())
        return np.concatenate(found)


def pixels_of(image: Image.Image, side_px: int) -> np.ndarray:
    """(3, side_px, side_px) float32, RGB, normalised with CLIP's mean and deviation."""
    square = white_square(image, side_px).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(((square - _MEAN) / _STD).transpose(2, 0, 1))


def _read_tags(folder: ModelFolder, num_tags: int) -> list[str]:
    path = folder.need("top_tags.txt")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from None
    names = [line.strip() for line in lines if line.strip()]
    if len(names) != num_tags:
        raise DataError(f"{path} lists {len(names)} tags, config.json says n_tags {num_tags}")
    return names
