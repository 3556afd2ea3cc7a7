"""OWLv2: finds whatever a few words describe; by default watermarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field, field_validator

from sdprep import boxes
from sdprep.annotate import PixelNeeds, Sample
from sdprep.detectors._padded_square import pixels_of
from sdprep.devices import BatchSize, DeviceName, FittingBatches, torch_device
from sdprep.errors import DataError, UserError
from sdprep.model_files import ModelFolder, ModelName, Revision, fingerprint, model_folder
from sdprep.pretrained import load_parts
from sdprep.recipe import AnnotatorConfig

_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "*_map.json", "added_tokens.json")
FILES = ("config.json", "model.safetensors", "tokenizer_config.json", *_TOKENIZER)
_WHO = "detector owlv2"


class Config(AnnotatorConfig):
    """OWLv2: boxes for text queries; a box of `a watermark` stands for the tag watermark."""

    type: Literal["owlv2"] = "owlv2"
    model: ModelName = "google/owlv2-base-patch16-ensemble"
    revision: Revision = None
    device: DeviceName = "auto"
    batch_size: BatchSize = 4
    queries: tuple[str, ...] = Field(
        ("a watermark",), min_length=1, description="What to look for; each is its boxes' label."
    )
    min_score: float = Field(0.1, ge=0, lt=1, description="Boxes above this score are stored.")

    @field_validator("queries")
    @classmethod
    def _are_words(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not query.strip() for query in value) or len(set(value)) < len(value):
            raise ValueError("each query must have words, and occur once")
        return value

    def build(self) -> Owlv2Detector:
        """Find the model's files and read all but the weights.

        Raises:
            UserError: files are missing or of another model, a query is too long, or the device
                is not there.
        """
        return Owlv2Detector(model_folder(self.model, self.revision, FILES), self)


class Owlv2Detector:
    """Fills `boxes_owlv2` with every box above the score; none is suppressed."""

    columns = boxes.COLUMNS
    pixels = PixelNeeds()
    is_thread_safe = False

    def __init__(self, folder: ModelFolder, config: Config) -> None:
        self.folder, self.batch_size = folder, config.batch_size
        self.queries, self.min_score = config.queries, config.min_score
        self.side_px = _side_px(folder)
        folder.need("model.safetensors")
        self.tokens = _tokens(folder, config.queries)
        self.device = torch_device(config.device, _WHO)
        options = {"queries": config.queries, "min_score": config.min_score}
        self.fingerprint = fingerprint("owlv2", 1, folder, **options)
        self._batches = FittingBatches(_WHO)
        self._model: Any = None

    def annotate(self, batch: Sequence[Sample]) -> pa.RecordBatch:
        """One row a sample; its boxes in the model's order."""
        images = [sample.image for sample in batch if sample.image is not None]
        rows = self._batches.run(self._rows, images)
        return pa.RecordBatch.from_pylist(rows, schema=self.columns)

    def _rows(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        import torch

        if self._model is None:
            self._model = _load(self.folder).to(self.device)
        pixels = torch.from_numpy(np.stack([pixels_of(image, self.side_px) for image in images]))
        tokens = {
            name: torch.from_numpy(values).repeat(len(images), 1).to(self.device)
            for name, values in self.tokens.items()
        }
        with torch.inference_mode():
            result = self._model(pixel_values=pixels.to(self.device), **tokens)
            best = result.logits.float().sigmoid().max(dim=-1)  # over the queries
        scores, labels = best.values.cpu().numpy(), best.indices.cpu().numpy()
        places = result.pred_boxes.float().cpu().numpy()
        sizes = [image.size for image in images]
        return [self._found(*each) for each in zip(places, scores, labels, sizes, strict=True)]

    def _found(
        self, places: np.ndarray, scores: np.ndarray, labels: np.ndarray, size: tuple[int, int]
    ) -> dict[str, Any]:
        inside, fractions = unpadded(places, size)
        kept = np.flatnonzero(inside & (scores > self.min_score))
        names = [self.queries[labels[index]] for index in kept]
        return boxes.found(names, scores[kept].tolist(), fractions[kept])


def unpadded(places: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """From fractions of the padded square to fractions of the picture.

    Args:
        places: (m, 4) centre x, centre y, width, height.
        size: width and height of the picture, px; it lies in the upper left of the square.

    Returns:
        (m,) whether the centre lies in the picture, and (m, 4) x0, y0, x1, y1, cut to 0..1.
    """
    stretch = max(size) / np.array(size, np.float64)
    centre, half = places[:, :2] * stretch, places[:, 2:] * stretch / 2
    corners = np.concatenate([centre - half, centre + half], axis=1)
    return (centre[:, 0] <= 1) & (centre[:, 1] <= 1), corners.clip(0, 1)


def _side_px(folder: ModelFolder) -> int:
    config = folder.read_json("config.json")
    vision = config.get("vision_config") or {}
    side = vision.get("image_size", 768)  # what transformers takes where it is not said
    if config.get("model_type") != "owlv2" or not isinstance(side, int) or side < 1:
        raise DataError(
            f"{folder.path / 'config.json'} has model_type {config.get('model_type')!r} and "
            f"vision_config.image_size {side!r}; expected 'owlv2' and a number of pixels",
            "Take google/owlv2-base-patch16-ensemble or one made like it.",
        )
    return side


def _tokens(folder: ModelFolder, queries: Sequence[str]) -> dict[str, np.ndarray]:
    """`input_ids` and `attention_mask`, (queries, tokens) int64, padded to the model's length."""
    from transformers import AutoTokenizer

    length = (folder.read_json("config.json").get("text_config") or {}).get(
        "max_position_embeddings", 16
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"model {folder.name}: its tokenizer cannot be read: {error}",
            "The folder needs tokenizer.json, or vocab.json and merges.txt.",
        ) from None
    for query in queries:
        count = len(tokenizer(query)["input_ids"])
        if count > length:
            raise UserError(f"query {query!r} has {count} tokens, the model takes {length}")
    found = tokenizer(list(queries), padding="max_length", max_length=length, return_tensors="np")
    return {name: found[name].astype(np.int64) for name in ("input_ids", "attention_mask")}


def _load(folder: ModelFolder) -> Any:
    """The model in eval mode, float32.

    Raises:
        DataError: it does not load, or weights are missing, which would be left random.
    """
    import torch

    return load_parts(folder, "Owlv2ForObjectDetection", dtype=torch.float32)[0]
