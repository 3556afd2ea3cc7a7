"""CLIP and SigLIP: pictures and words as vectors of one space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sdprep.clip_tokens import clean_text
from sdprep.devices import batch_on
from sdprep.errors import DataError, UserError
from sdprep.model_files import ModelFolder
from sdprep.pretrained import load_parts

if TYPE_CHECKING:
    from torch import Tensor

CLASSES = ("clip", "siglip")
FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)


def check_files(folder: ModelFolder) -> None:
    """Whether it is a CLIP or SigLIP with all its parts, without reading the weights.

    Raises:
        DataError: it is not.
    """
    found = folder.read_json("config.json").get("model_type")
    if found not in CLASSES:
        raise DataError(
            f"model {folder.name} is of type {found!r}, expected clip or siglip",
            "Take a model with both image and text encoder, as openai/clip-vit-large-patch14.",
        )
    if not folder.has("model.safetensors.index.json"):
        folder.need("model.safetensors")
    if not folder.has("processor_config.json"):
        folder.need("preprocessor_config.json")
    if not any(folder.has(name) for name in ("tokenizer.json", "vocab.json", "spiece.model")):
        folder.need("tokenizer.json")


class ContrastiveModel:
    """A loaded model with its processors."""

    def __init__(self, folder: ModelFolder, device: str) -> None:
        """Load weights, image processor and tokenizer.

        Raises:
            DataError: weights are missing or of another shape.
        """
        import torch

        names = ("AutoModel", "AutoImageProcessor", "AutoTokenizer")
        model, self.processor, self.tokenizer = load_parts(folder, *names, dtype=torch.float32)
        self.name, self.device = folder.name, device
        self.model = model.to(device)
        self.scale = float(model.logit_scale.detach().exp())
        self.is_siglip = model.config.model_type == "siglip"
        self.max_tokens = int(model.config.text_config.max_position_embeddings)

    def image_embeddings(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(B, D) float32 of unit length."""
        import torch

        found = []
        size = batch_on(self.device, len(images))
        with torch.inference_mode():
            for start in range(0, len(images), size):
                part = list(images[start : start + size])
                pixels = self.processor(images=part, return_tensors="pt")["pixel_values"]
                features = self.model.get_image_features(pixel_values=pixels.to(self.device))
                found.append(_tensor(features).float().cpu().numpy())
        return _unit(np.concatenate(found))

    def text_embedding(self, texts: Sequence[str]) -> np.ndarray:
        """(D,) float32 of unit length: the mean direction of all ways to say it.

        Raises:
            UserError: a text is longer than the model reads.
        """
        texts = [clean_text(text) for text in texts]
        for text in texts:
            count = self.num_tokens(text)
            if count > self.max_tokens:
                raise UserError(
                    f"model {self.name} reads {self.max_tokens} tokens, and this prompt of a label "
                    f"has {count}: {text!r}",
                    "Shorten it.",
                )
        return _unit(self._text_embeddings(texts).mean(axis=0))

    def caption_embeddings(self, texts: Sequence[str]) -> tuple[np.ndarray, list[bool]]:
        """(B, D) float32 of unit length, and whether each text was cut to what the model reads."""
        texts = [clean_text(text) for text in texts]
        size = batch_on(self.device, len(texts))
        parts = [
            self._text_embeddings(texts[start : start + size])
            for start in range(0, len(texts), size)
        ]
        return np.concatenate(parts), [self.num_tokens(text) > self.max_tokens for text in texts]

    def num_tokens(self, text: str) -> int:
        """Tokens of a text, those at its ends included."""
        return len(self.tokenizer(text, verbose=False)["input_ids"])

    def _text_embeddings(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        # SigLIP was trained with every text padded to the end.
        how: dict[str, Any] = {"padding": "max_length" if self.is_siglip else True}
        how |= {"truncation": True, "max_length": self.max_tokens}
        with torch.inference_mode():
            tokens = self.tokenizer(list(texts), return_tensors="pt", **how).to(self.device)
            wanted = {"input_ids": tokens["input_ids"]}
            if not self.is_siglip:
                wanted["attention_mask"] = tokens["attention_mask"]
            found = self.model.get_text_features(**wanted)
            return _unit(_tensor(found).float().cpu().numpy())


def _tensor(found: Any) -> Tensor:
    """The features themselves; transformers 5 wraps them, 4 does not."""
    return getattr(found, "pooler_output", found)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
