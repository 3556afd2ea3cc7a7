"""Captions by any chat model of transformers that sees: LLaVA, JoyCaption, Idefics, Gemma."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from sdprep.annotate import Sample
from sdprep.caption_prompts import (
    Prompt,
    Seed,
    Templates,
    draw_prompt,
    dump,
    templates_of,
)
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
    """Any image-text-to-text chat model of transformers; prompts are drawn for each image."""

    type: Literal["vlm"] = "vlm"
    model: ModelName
    revision: Revision = None
    prompt: Prompt = None
    templates: Templates = None
    system: str | None = Field(None, min_length=1, description="System prompt; none: none.")
    seed: Seed = 0
    temperature: Temperature = 0.6
    top_p: TopP = 0.9
    max_new_tokens: int = Field(256, ge=1, le=8192, description="Tokens of a caption at most.")
    precision: Precision = "auto"
    device: DeviceName = "auto"
    batch_size: BatchSize = 8

    def build(self) -> ModelCaptioner:
        """Find the model's files; weights are read with the first batch.

        Raises:
            UserError: files are missing, or the device is not there.
        """
        folder = model_folder(self.model, self.revision, FILES)
        folder.need("config.json")
        templates = templates_of(self.prompt, self.templates)

        def draw(sample: Sample) -> tuple[int, str]:
            return draw_prompt(templates, self.seed, sample.id, sample.row)

        return model_captioner(
            self,
            folder,
            VlmWriter,
            draw,
            options={"system"},
            templates=dump(templates),
        )


class VlmWriter:
    """A loaded chat model."""

    def __init__(self, folder: ModelFolder, config: Config, device: str) -> None:
        """Load it.

        Raises:
            DataError: it does not load, or has no chat template.
        """
        self.config, self.device = config, device
        self.model, self.processor = load_model(folder, device, config.precision)
        if not getattr(self.processor, "chat_template", None):
            raise DataError(
                f"model {folder.name} has no chat template, so it cannot be asked",
                "Take a model tuned for chat, or the captioner blip for a BLIP.",
            )
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # all rows end where writing begins
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.generation = generation_config(self.model, config.max_new_tokens)
        self.generation.pad_token_id = tokenizer.pad_token_id
        own = token_ids(self.generation.eos_token_id)
        self.ends = own or token_ids(tokenizer.eos_token_id)

    def write(self, requests: Sequence[Request]) -> list[Answer]:
        """Captions of some pictures."""
        import torch

        texts = [self._chat(request.prompt or "") for request in requests]
        images = [[request.image] for request in requests]
        inputs = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        inputs = inputs.to(self.device, self.model.dtype)
        sampler = KeyedSampler(requests, self.config.temperature, self.config.top_p)
        with torch.inference_mode():
            found = self.model.generate(
                **inputs, generation_config=self.generation, logits_processor=[sampler]
            )
        new = found[:, inputs["input_ids"].shape[1] :].tolist()
        return answers_of(new, self.ends, self.processor.tokenizer)

    def _chat(self, prompt: str) -> str:
        """The whole text that the model reads, by its own template."""
        turn: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": turn}]
        if self.config.system:
            words = [{"type": "text", "text": self.config.system}]
            messages.insert(0, {"role": "system", "content": words})
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
