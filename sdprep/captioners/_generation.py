"""What captioners with a model of their own share: loading, keyed sampling, and a second try."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import pyarrow as pa
from PIL import Image
from pydantic import Field

from sdprep.annotate import PixelNeeds, Sample
from sdprep.caption_monitors import malformed
from sdprep.caption_prompts import CAPTION_COLUMNS, seed_of_try
from sdprep.devices import FittingBatches, torch_device
from sdprep.errors import DataError
from sdprep.model_files import ModelFolder, fingerprint
from sdprep.pretrained import load_parts
from sdprep.seeding import rng_for

if TYPE_CHECKING:
    from torch import Tensor

Temperature = Annotated[
    float,
    Field(ge=0, le=5, description="Of the sampling; 0 is greedy, and retries change nothing."),
]
TopP = Annotated[float, Field(gt=0, le=1, description="Share of probability sampled from.")]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Field(description="Of the weights; auto: bfloat16 on CUDA, float32 elsewhere."),
]
COLUMNS = CAPTION_COLUMNS.append(pa.field("error", pa.string()))
FILES = (
    *("config.json", "generation_config.json", "chat_template.json", "chat_template.jinja"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model"),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
)


PIXELS = PixelNeeds(columns=("tags",))


@dataclass(frozen=True)
class Request:
    """One caption that is wanted."""

    id: str
    image: Image.Image | None  # None where the captioner reads no pixels
    template: int
    prompt: str | None
    seed: int


@dataclass(frozen=True)
class Answer:
    """What a model wrote."""

    text: str
    finish_reason: str  # stop | length


class Writer(Protocol):
    """A loaded model."""

    def write(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer a request, in order; each depends on its own request alone."""
        ...


class ModelCaptioner:
    """Draws prompts, runs a model in batches that fit, and asks again where it wrote rubbish."""

    columns = CAPTION_COLUMNS
    is_thread_safe = False

    def __init__(
        self,
        who: str,
        fingerprint: str,
        batch_size: int,
        seed: int,
        draw: Callable[[Sample], tuple[int, str | None]],
        load: Callable[[], Writer],
        pixels: PixelNeeds = PIXELS,
    ) -> None:
        """Nothing is loaded before the first batch.

        Args:
            who: what runs, for messages.
            draw: number of the template and prompt of an image; a DataError fails that image.
            load: makes the writer.
        """
        self.fingerprint, self.batch_size, self.pixels = fingerprint, batch_size, pixels
        self._seed, self._draw, self._load = seed, draw, load
        self._batches = FittingBatches(who)
        self._writer: Writer | None = None

    def annotate(self, batch: Sequence[Sample]) -> pa.RecordBatch:
        """A caption for each sample; where two answers are malformed, a message in `error`."""
        rows: dict[str, dict[str, Any]] = {}
        requests = []
        for sample in batch:
            rows[sample.id] = {"attempt": sample.attempt, "error": None}
            try:
                requests.append(self._request(sample))
            except DataError as error:
                rows[sample.id]["error"] = str(error)
        for again in (False, True):
            answers = self._batches.run(self._write, requests)
            failed = []
            for request, answer in zip(requests, answers, strict=True):
                why = malformed(answer.text, request.prompt)
                if why is None:
                    rows[request.id] |= _values(request, answer)
                elif again:
                    rows[request.id]["error"] = f"malformed twice; {why}: {answer.text[:80]!r}"
                else:
                    failed.append(replace(request, seed=request.seed + 1))
            requests = failed
        return pa.RecordBatch.from_pylist([rows[sample.id] for sample in batch], schema=COLUMNS)

    def _request(self, sample: Sample) -> Request:
        template, prompt = self._draw(sample)
        seed = seed_of_try(self._seed, sample.attempt, again=False)
        return Request(sample.id, sample.image, template, prompt, seed)

    def _write(self, requests: Sequence[Request]) -> list[Answer]:
        if not requests:
            return []
        if self._writer is None:
            self._writer = self._load()
        return self._writer.write(requests)


def _values(request: Request, answer: Answer) -> dict[str, Any]:
    said = {"text": answer.text, "finish_reason": answer.finish_reason}
    return said | {"prompt": request.prompt, "seed": request.seed}


_SHARED_OPTIONS = {"seed", "temperature", "top_p", "max_new_tokens", "precision"}


def model_captioner(
    config: Any,
    folder: ModelFolder,
    writer: Callable[[ModelFolder, Any, str], Writer],
    draw: Callable[[Sample], tuple[int, str | None]],
    *,
    options: set[str],
    pixels: PixelNeeds = PIXELS,
    **more: Any,
) -> ModelCaptioner:
    """The captioner of a plugin's options; weights are read with the first batch.

    Args:
        config: the plugin's own, with all options that captioners with a model share.
        writer: loads the model of a folder onto a device.
        draw: as `ModelCaptioner` takes it.
        options: further ones that change a caption.
        more: what else changes one.

    Raises:
        UserError: the device is not there.
    """
    who = f"captioner {config.type}"
    device = torch_device(config.device, who)
    told = config.model_dump(mode="json", include=_SHARED_OPTIONS | options) | more
    return ModelCaptioner(
        who,
        fingerprint(config.type, 1, folder, **told),
        config.batch_size,
        config.seed,
        draw,
        functools.partial(writer, folder, config, device),
        pixels,
    )


class KeyedSampler:
    """Temperature, top-p and Gumbel noise keyed by row and step; the largest logit is the draw.

    Gumbel-max sampling: argmax(logits / T + noise) is distributed as softmax(logits / T). Since
    the noise is a function of (seed, id, template, step), a caption does not depend on what else
    is in the batch.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        temperature: float,
        top_p: float,
        top_k: int = 0,
        min_p: float = 0.0,
    ) -> None:
        self.top_k, self.min_p = top_k, min_p
        self.keys = [(request.seed, request.id, request.template) for request in requests]
        self.temperature, self.top_p = temperature, top_p
        self.first_length: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, L) tokens so far and (B, V) logits to (B, V) float32 logits with their noise."""
        import numpy as np
        import torch

        if self.temperature == 0:
            return scores
        if self.first_length is None:
            self.first_length = input_ids.shape[1]
        step = input_ids.shape[1] - self.first_length
        kept = likeliest(scores.float() / self.temperature, self.top_k, 0)
        kept = likeliest(nucleus(kept, self.top_p), 0, self.min_p)
        draws = [
            rng_for(seed, "caption", id_, template, step).random(kept.shape[1], dtype=np.float32)
            for seed, id_, template in self.keys
        ]
        uniform = torch.from_numpy(np.stack(draws)).to(kept.device)
        tiny = 2.0**-25  # half a step of the draws: no noise is infinite
        return kept - torch.log(-torch.log(uniform + tiny))


def likeliest(logits: Tensor, top_k: int, min_p: float) -> Tensor:
    """Logits with all but the `top_k` best, and those above `min_p` of the best's share, at -inf.

    Either is off at 0.
    """
    if top_k and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if min_p:
        shares = logits.softmax(dim=-1)
        floor = min_p * shares.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(shares < floor, float("-inf"))
    return logits


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits with all but the likeliest tokens at -inf: the fewest whose share reaches `top_p`.

    Source: Holtzman et al. 2020, "The curious case of neural text degeneration".
    """
    if top_p >= 1:
        return logits
    ordered, places = logits.sort(dim=-1, descending=True, stable=True)
    shares = ordered.softmax(dim=-1)
    is_out = shares.cumsum(dim=-1) - shares >= top_p  # what comes before it suffices already
    return logits.masked_fill(is_out.scatter(-1, places, is_out), float("-inf"))


def dtype_of(precision: str, device: str) -> Any:
    """The torch type of the weights."""
    import torch

    if precision == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    return getattr(torch, precision)


def load_model(
    folder: ModelFolder, device: str, precision: str, *, sees: bool = True
) -> tuple[Any, Any]:
    """A model of transformers, ready to generate, and its processor.

    Args:
        sees: image-text-to-text; else a language model with its tokenizer.

    Raises:
        DataError: files are missing or do not fit each other.
        UserError: the processor needs a package that is not there.
    """
    kinds = ("AutoModelForImageTextToText", "AutoProcessor")
    kinds = kinds if sees else ("AutoModelForCausalLM", "AutoTokenizer")
    model, processor = load_parts(folder, *kinds, dtype=dtype_of(precision, device))
    return model.to(device), processor


def generation_config(model: Any, max_new_tokens: int) -> Any:
    """The model's own settings, but greedy: the sampler has drawn already."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample, config.num_beams, config.max_new_tokens = False, 1, max_new_tokens
    config.max_length = config.temperature = config.top_p = config.top_k = None
    return config


def answers_of(tokens: Sequence[Sequence[int]], ends: set[int], tokenizer: Any) -> list[Answer]:
    """Texts of new tokens; a row without a token of `ends` was cut at the limit."""
    found = []
    for row in tokens:
        stops = [at for at, token in enumerate(row) if token in ends]
        kept = row[: stops[0]] if stops else row
        text = tokenizer.decode(list(kept), skip_special_tokens=True).strip()
        found.append(Answer(text, "stop" if stops else "length"))
    return found


def token_ids(value: int | Sequence[int] | None) -> set[int]:
    """End tokens as transformers gives them: one, several or none."""
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)
