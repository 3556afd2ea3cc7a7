"""Captions from any server that speaks OpenAI's chat protocol: vLLM, llama.cpp, Ollama, others."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal
from urllib.parse import urlsplit

import pyarrow as pa
from pydantic import Field, field_validator

from sdprep.annotate import PixelNeeds, Sample
from sdprep.caption_monitors import malformed
from sdprep.caption_prompts import (
    CAPTION_COLUMNS,
    Prompt,
    Seed,
    Template,
    Templates,
    draw_prompt,
    dump,
    seed_of_try,
    templates_of,
)
from sdprep.chat_endpoint import CallFailed, ChatEndpoint
from sdprep.console import say
from sdprep.errors import DataError, UserError
from sdprep.recipe import AnnotatorConfig
from sdprep.seeding import integer

COLUMNS = CAPTION_COLUMNS.append(pa.field("error", pa.string()))
_PIXELS_PER_TOKEN = 750  # of a picture; servers differ, so this is a guess until some are measured
_PROMPT_TOKENS = 40


class Config(AnnotatorConfig):
    """Captions from an OpenAI-compatible server (vLLM, llama.cpp, Ollama); says the cost first."""

    type: Literal["openai"] = "openai"
    base_url: str = Field(
        "http://127.0.0.1:8000/v1", description="Address of the server, up to /chat/completions."
    )
    model: str = Field(min_length=1, description="Name of the model, as the server calls it.")
    api_key_env: str | None = Field(
        None,
        pattern=r"^[A-Z_][A-Z0-9_]*$",
        description="Environment variable that holds the API key; the key itself goes nowhere.",
    )
    prompt: Prompt = None
    templates: Templates = None
    system: str | None = Field(None, description="System prompt; none: none is sent.")
    seed: Seed = 0
    temperature: float = Field(0.6, ge=0, le=5, description="Of the sampling; 0 is greedy.")
    top_p: float = Field(0.9, gt=0, le=1, description="Share of probability that is sampled from.")
    max_tokens: int = Field(256, ge=1, le=32_768, description="New tokens at most.")
    token_limit_key: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="What the server calls that limit."
    )
    max_side_px: int = Field(1024, ge=32, le=8192, description="Larger pictures are reduced.")
    jpeg_quality: int = Field(90, ge=30, le=100, description="Of the picture that is sent.")
    concurrency: int = Field(8, ge=1, le=512, description="Requests at the same time.")
    timeout_s: float = Field(120.0, gt=0, le=3600, description="Patience with one answer, seconds.")
    retries: int = Field(5, ge=0, le=50, description="Further tries after 429, 5xx or no answer.")
    backoff_s: float = Field(1.0, ge=0, le=60, description="Wait before the first retry, seconds.")
    input_price: float | None = Field(None, ge=0, description="Price of a million tokens read.")
    output_price: float | None = Field(None, ge=0, description="Price of a million tokens written.")
    max_cost: float | None = Field(None, gt=0, description="Stop before a run that may cost more.")
    seconds_per_image: float = Field(
        3.0, gt=0, description="Guess for the first estimate; then it is measured."
    )

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an http:// or https:// address")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must hold no user, password or query; the key goes into api_key_env")
        return value

    def build(self) -> OpenaiCaptioner:
        """Make the captioner; no request is sent."""
        return OpenaiCaptioner(self)


class OpenaiCaptioner:
    """Fills `caption_openai`; several requests run at the same time."""

    columns = CAPTION_COLUMNS
    pixels = PixelNeeds(pixels=False, data=True, columns=("tags",))
    is_thread_safe = False

    def __init__(self, config: Config) -> None:
        self.config = config
        self.templates: Sequence[Template] = templates_of(config.prompt, config.templates)
        self.batch_size = (
            4 * config.concurrency
        )  # bytes of files only: each request decodes its own
        self.endpoint = ChatEndpoint(
            config.base_url, config.api_key_env, config.timeout_s, config.retries, config.backoff_s
        )
        self.fingerprint = _fingerprint(config, self.templates)
        self._usage = _Usage()

    def foresee(self, count: int) -> None:
        """Say what a run will take and cost at most.

        Raises:
            UserError: the key is not set, or the cost may exceed `max_cost`.
        """
        config = self.config
        self.endpoint.key()
        self._usage = _Usage(count=count)
        read = _PROMPT_TOKENS + config.max_side_px**2 // _PIXELS_PER_TOKEN
        cost = self._cost(count * read, count * config.max_tokens)
        hours = count * config.seconds_per_image / config.concurrency / 3600
        price = "" if cost is None else f", at most about {cost:,.2f} in the currency of the prices"
        say(
            f"{count:,} images to {config.model} at {config.base_url}: up to "
            f"{count * read / 1e6:,.2f} M tokens read and {count * config.max_tokens / 1e6:,.2f} M "
            f"written{price}; {hours:.2f} h if an image takes {config.seconds_per_image:g} s"
        )
        if config.max_cost is not None:
            if cost is None:
                raise UserError("max_cost needs input_price and output_price")
            if cost > config.max_cost:
                raise UserError(
                    f"this run may cost {cost:,.2f}, more than max_cost = {config.max_cost:g}",
                    "Raise max_cost, or take fewer images with --where.",
                )

    def annotate(self, batch: Sequence[Sample]) -> pa.RecordBatch:
        """Ask for every image; one that fails has a message in `error`.

        Raises:
            UserError: the server cannot be reached or refuses every request.
        """
        started = time.monotonic()
        with ThreadPoolExecutor(self.config.concurrency, thread_name_prefix="caption") as pool:
            try:
                rows = list(pool.map(self._row, batch))
            except UserError:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self._say_measured(len(batch), time.monotonic() - started)
        return pa.RecordBatch.from_pylist(rows, schema=COLUMNS)

    def _row(self, sample: Sample) -> dict[str, Any]:
        row: dict[str, Any] = {"attempt": sample.attempt, "error": None}
        try:
            _, prompt = draw_prompt(self.templates, self.config.seed, sample.id, sample.row)
            assert sample.data is not None
            picture = data_uri(sample.data, self.config.max_side_px, self.config.jpeg_quality)
            return row | self._caption(sample, prompt, picture)
        except (DataError, CallFailed) as error:
            return row | {"error": str(error)}

    def _caption(self, sample: Sample, prompt: str, picture: str) -> dict[str, Any]:
        """A whole answer; a malformed one is asked for once more, with the next seed.

        Raises:
            CallFailed: the second answer is malformed, too.
        """
        why = ""
        for again in (False, True):
            drawn = seed_of_try(self.config.seed, sample.attempt, again)
            seed = integer(drawn, "openai", sample.id) >> 33  # 31 bits, which every server takes
            answer = self.endpoint.chat(self._body(prompt, picture, seed), sample.id)
            self._usage.add(answer.get("usage"))
            text, reason = _content(answer)
            why = malformed(text, prompt) or ""
            if not why:
                return {"text": text, "prompt": prompt, "seed": seed, "finish_reason": reason}
        raise CallFailed(f"malformed answer twice; {why}: {text[:80]!r}")

    def _body(self, prompt: str, picture: str, seed: int) -> dict[str, Any]:
        config = self.config
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": prompt},
        ]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if config.system:
            messages.insert(0, {"role": "system", "content": config.system})
        return {
            "model": config.model,
            "messages": messages,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": seed,
            config.token_limit_key: config.max_tokens,
        }

    def _cost(self, read: float, written: float) -> float | None:
        config = self.config
        if config.input_price is None or config.output_price is None:
            return None
        return (read * config.input_price + written * config.output_price) / 1e6

    def _say_measured(self, images: int, seconds: float) -> None:
        """After the first batch: the estimate again, from what it took."""
        usage = self._usage
        left, usage.count = usage.count - images, 0
        if left <= 0:
            return
        cost = self._cost(usage.read / images * left, usage.written / images * left)
        price = "" if cost is None or not usage.written else f" and {cost:,.2f}"
        say(
            f"measured: {seconds / images:.2f} s an image; the other {left:,} take about "
            f"{left * seconds / images / 3600:.2f} h{price}"
        )


class _Usage:
    """Tokens that a server says it read and wrote; several threads add to it."""

    def __init__(self, count: int = 0) -> None:
        self.count = count  # images of the run; 0 once the measured estimate is told
        self.read = self.written = 0
        self._lock = threading.Lock()

    def add(self, usage: Any) -> None:
        if isinstance(usage, dict):
            with self._lock:
                self.read += _whole(usage.get("prompt_tokens"))
                self.written += _whole(usage.get("completion_tokens"))


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _content(answer: dict[str, Any]) -> tuple[str, str | None]:
    """Text and finish reason of an answer; an empty text where it has none."""
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    choice = choice if isinstance(choice, dict) else {}
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str))
    reason = choice.get("finish_reason")
    text = content.strip() if isinstance(content, str) else ""
    return text, reason if isinstance(reason, str) else None


def data_uri(data: bytes, max_side_px: int, quality: int) -> str:
    """A picture as a JPEG of its upright sRGB pixels, without any metadata.

    Raises:
        DataError: it does not open.
    """
    from sdprep.images import open_image

    image = open_image(data, first_frame=True).image
    image.thumbnail((max_side_px, max_side_px))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _fingerprint(config: Config, templates: Sequence[Template]) -> str:
    """All that changes a caption; the address is not part of it, so that a server may move."""
    import json

    keys = ("model", "system", "seed", "temperature", "top_p", "max_tokens", "max_side_px")
    found: dict[str, Any] = {"name": "openai", "version": 1, "templates": dump(templates)}
    found |= {key: getattr(config, key) for key in (*keys, "jpeg_quality")}
    return json.dumps(found, sort_keys=True, ensure_ascii=False)
