"""Captions by Florence-2, short, detailed or very detailed, in the layout of transformers."""

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
    """Florence-2: a sentence or a paragraph an image; small enough for a CPU."""

    type: Literal["florence"] = "florence"
    model: ModelName = "florence-community/Florence-2-base"
    revision: Revision = None
    task: Literal["caption", "detailed_caption", "more_detailed_caption"] = Field(
        "more_detailed_caption", description="A short sentence, a few, or a paragraph."
    )
    seed: Seed = 0
    temperature: Temperature = 0.6
    top_p: TopP = 0.9
    max_new_tokens: int = Field(256, ge=1, le=1000, description="Tokens of a caption at most.")
    precision: Precision = "auto"
    device: DeviceName = "auto"
    batch_size: BatchSize = 8

    def build(self) -> ModelCaptioner:
        """Find the model's files; weights are read with the first batch.

        Raises:
            UserError: files are missing or of another model, or the device is not there.
        """
        folder = model_folder(self.model, self.revision, FILES)
        config = folder.read_json("config.json")
        if config.get("model_type") != "florence2" or "auto_map" in config:
            raise DataError(
                f"model {folder.name} is of type {config.get('model_type')!r}"
                f"{' with code of its own' if 'auto_map' in config else ''}, expected florence2 "
                "as transformers itself has it",
                "The converted models are florence-community/Florence-2-base, -large and others.",
            )

        def draw(sample: Sample) -> tuple[int, str | None]:
            return 0, f"<{self.task.upper()}>"

        return model_captioner(
            self,
            folder,
            FlorenceWriter,
            draw,
            options={"task"},
        )


class FlorenceWriter:
    """A loaded Florence-2."""

    def __init__(self, folder: ModelFolder, config: Config, device: str) -> None:
        self.config, self.device = config, device
        self.model, self.processor = load_model(folder, device, config.precision)
        self.generation = generation_config(self.model, config.max_new_tokens)
        own = token_ids(self.generation.eos_token_id)
        self.ends = own or token_ids(self.processor.tokenizer.eos_token_id)

    def write(self, requests: Sequence[Request]) -> list[Answer]:
        """Captions of some pictures."""
        import torch

        inputs = self.processor(
            text=[request.prompt for request in requests],
            images=[request.image for request in requests],
            padding=True,
            return_tensors="pt",
        )
        inputs = inputs.to(self.device, self.model.dtype)
        sampler = KeyedSampler(requests, self.config.temperature, self.config.top_p)
        with torch.inference_mode():
            found = self.model.generate(
                **inputs, generation_config=self.generation, logits_processor=[sampler]
            )
        # The decoder starts from a token that is also its end: that one is no caption.
        return answers_of(found[:, 1:].tolist(), self.ends, self.processor.tokenizer)
