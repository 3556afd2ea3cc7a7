"""Captions from tags alone, by a small language model: TIPO."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from sdprep.annotate import PixelNeeds, Sample
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
from sdprep.tag_rules import written_tag

_LINES = {"meta": "meta", "rating": "rating", "artist": "artist", "characters": "character"}
_LINES |= {"copyrights": "copyright"}
_RATINGS = {"general": "safe", "questionable": "nsfw", "explicit": "nsfw, explicit"}
_NEXT_LINE = re.compile(r"\n")


class Config(AnnotatorConfig):
    """TIPO: writes a text from the composed tags; what it invents never becomes a tag."""

    type: Literal["tipo"] = "tipo"
    model: ModelName = "KBlueLeaf/TIPO-500M"
    revision: Revision = None
    quality: str | None = Field(
        None, min_length=1, description="Quality words to write for; none: no such line."
    )
    length: Literal["very_short", "short", "long", "very_long"] = Field(
        "long", description="Target length of the text."
    )
    seed: Seed = 0
    temperature: Temperature = 0.35
    top_p: TopP = 0.95
    top_k: int = Field(60, ge=0, description="Only the likeliest tokens are drawn; 0: all.")
    min_p: float = Field(0.1, ge=0, lt=1, description="Least share of the likeliest token's.")
    max_new_tokens: int = Field(512, ge=1, le=4096, description="Tokens of a caption at most.")
    precision: Precision = "auto"
    device: DeviceName = "auto"
    batch_size: BatchSize = 16

    def build(self) -> ModelCaptioner:
        """Find the model's files; weights are read with the first batch.

        Raises:
            UserError: files are missing, or the device is not there.
        """
        folder = model_folder(self.model, self.revision, FILES)
        folder.need("config.json")

        def draw(sample: Sample) -> tuple[int, str | None]:
            return 0, tipo_prompt(sample.row, self.quality, self.length)

        return model_captioner(
            self,
            folder,
            TipoWriter,
            draw,
            options={"quality", "length", "top_k", "min_p"},
            pixels=PixelNeeds(pixels=False, columns=("tags",)),
        )


def tipo_prompt(row: Mapping[str, Any], quality: str | None, length: str) -> str:
    """The lines that TIPO goes on from; lines of which nothing is known are left out.

    Raises:
        DataError: the image has no tags.

    Source: spec/prep.md, section 5; the protocol of KohakuBlueleaf/KGen.
    """
    tags = row.get("tags")
    if tags is None:
        tags = (row.get("text") or {}).get("tags") or []
    by_category: dict[str, list[str]] = {}
    for tag in tags:
        name = written_tag(tag["name"], spaces=True)
        if name:
            by_category.setdefault(tag.get("category") or "general", []).append(name)
    if not by_category.get("general"):
        raise DataError("TIPO writes from tags and the image has none", "Run sdprep tag first.")
    lines = []
    for line, category in _LINES.items():
        names = by_category.get(category, [])
        if line == "rating":
            names = [_RATINGS.get(name, name) for name in names]
        if names:
            lines.append(f"{line}: {', '.join(names)}")
    if quality:
        lines.append(f"quality: {quality}")
    lines.append(f"target: <|{length}|> <|tag_to_long|>")
    lines.append(f"tag: {', '.join(by_category['general'])}")
    return "\n".join([*lines, "long:"])


class TipoWriter:
    """A loaded TIPO."""

    def __init__(self, folder: ModelFolder, config: Config, device: str) -> None:
        self.config, self.device = config, device
        self.model, self.tokenizer = load_model(folder, device, config.precision, sees=False)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.generation = generation_config(self.model, config.max_new_tokens)
        self.generation.pad_token_id = self.tokenizer.pad_token_id
        own = token_ids(self.generation.eos_token_id)
        self.ends = own or token_ids(self.tokenizer.eos_token_id)

    def write(self, requests: Sequence[Request]) -> list[Answer]:
        """Texts for some images' tags: what follows `long:`, to the end of its line."""
        import torch

        config = self.config
        texts = [request.prompt or "" for request in requests]
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        inputs = inputs.to(self.device)
        sampler = KeyedSampler(
            requests, config.temperature, config.top_p, config.top_k, config.min_p
        )
        with torch.inference_mode():
            found = self.model.generate(
                **inputs, generation_config=self.generation, logits_processor=[sampler]
            )
        new = found[:, inputs["input_ids"].shape[1] :].tolist()
        return [_first_line(answer) for answer in answers_of(new, self.ends, self.tokenizer)]


def _first_line(answer: Answer) -> Answer:
    """The text without the lines that may follow it; whoever began another line has finished."""
    line, *more = _NEXT_LINE.split(answer.text, maxsplit=1)
    return Answer(line.strip(), "stop" if more else answer.finish_reason)
