"""Short captions by BLIP: a small model that runs anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from sdprep.annotate import Sample
from sdprep.caption_prompts import Seed
from sdprep.captioners._generation import (
    FILES,
    Answer,
    KeyedSampler,
    ModelCaptioner,
    Precision,
    Request,
    Temperature,
    TopP,
    answers_of,
    generation_config,
    load_model,
    model_captioner,
    token_ids,
)
from sdprep.devices import BatchSize, DeviceName
from sdprep.errors import DataError
from sdprep.model_files import ModelFolder, ModelName, Revision, model_folder
from sdprep.recipe import AnnotatorConfig


class Config(AnnotatorConfig):
    """BLIP: one short sentence an image; small enough for a CPU."""

    type: Literal["blip"] = "blip"
    model: ModelName = "Salesforce/blip-image-captioning-large"
    revision: Revision = None
    beginning: str | None = Field(
        None, min_length=1, max_length=200, description="Words that every caption begins with."
    )
    seed: Seed = 0
    temperature: Temperature = 0.6
    top_p: TopP = 0.9
    max_new_tokens: int = Field(48, ge=1, le=400, description="Tokens of a caption at most.")
    precision: Precision = "auto"
    device: DeviceName = "auto"
    batch_size: BatchSize = 16

    def build(self) -> ModelCaptioner:
        """Find the model's files; weights are read with the first batch.

        Raises:
            UserError: files are missing or of another model, or the device is not there.
        """
        folder = model_folder(self.model, self.revision, FILES)
        found = folder.read_json("config.json").get("model_type")
        if found != "blip":
            raise DataError(
                f"model {folder.name} is of type {found!r}, expected blip",
                "For a chat model take the captioner vlm.",
            )

        def draw(sample: Sample) -> tuple[int, str | None]:
            return 0, self.beginning

        return model_captioner(
            self,
            folder,
            BlipWriter,
            draw,
            options={"beginning"},
        )


class BlipWriter:
    """A loaded BLIP."""

    def __init__(self, folder: ModelFolder, config: Config, device: str) -> None:
        self.config, self.device = config, device
        self.model, self.processor = load_model(folder, device, config.precision)
        self.generation = generation_config(self.model.text_decoder, config.max_new_tokens)
        self.ends = token_ids(self.model.config.text_config.sep_token_id)

    def write(self, requests: Sequence[Request]) -> list[Answer]:
        """Captions of some pictures."""
        import torch

        images = [request.image for request in requests]
        texts = [request.prompt for request in requests] if self.config.beginning else None
        inputs = self.processor(images=images, text=texts, return_tensors="pt")
        inputs = inputs.to(self.device, self.model.dtype)
        sampler = KeyedSampler(requests, self.config.temperature, self.config.top_p)
        with torch.inference_mode():
            found = self.model.generate(
                **inputs, generation_config=self.generation, logits_processor=[sampler]
            )
        # The start token goes; the words that it began with stay part of the caption.
        return answers_of(found[:, 1:].tolist(), self.ends, self.processor.tokenizer)
