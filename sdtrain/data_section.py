"""The `[data]` of a training recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field, model_validator

from sdprep.errors import DataError
from sdprep.recipe import Section
from sdtrain.pixels import CropRule

STREAM_KEEP_GB = 20.0
USUAL_MICRO_BATCH = 4
_OF_DATA = re.compile(r"(?<![\w/.\\-])data\.(path|revision|image_column|caption_column)\b")


@contextmanager
def called(section: str) -> Iterator[None]:
    """What is opened like a `[data]` is named in errors as what it is, such as `prior`."""
    try:
        yield
    except DataError as error:
        words = (_OF_DATA.sub(rf"{section}.\1", text) for text in (error.message, error.hint))
        raise DataError(*words) from error


class DataSection(Section):
    """What is trained on, and how it is cut into steps."""

    path: str = Field(
        min_length=1,
        description="Prepared folder, curated .lance table, Hub id, or any Hugging Face data set.",
    )
    revision: str | None = Field(None, description="Commit, tag or branch of a Hub data set.")
    streaming: bool = Field(
        False,
        description="Begin at once with a published set on the Hub; pictures come as needed.",
    )
    stream_keep_gb: float | None = Field(
        None,
        ge=0.0,
        allow_inf_nan=False,
        description="Most gigabytes of its pictures that stay on this disk; default: 20.",
    )
    image_column: str | None = Field(
        None, description="Column with the pictures, when it is not to be guessed."
    )
    caption_column: str | None = Field(
        None, description="Column with the text, when it is not to be guessed."
    )
    splits: Literal["train", "all"] = Field(
        "train", description="What is trained on; all: the held-out images too, as --final does."
    )
    limit: int | None = Field(
        None,
        gt=0,
        description="Most training images used; a smaller limit takes a part of them.",
    )
    resolution_px: int | None = Field(
        None, gt=0, description="Side of the square with a bucket's area; default: the model's own."
    )
    batch_size: int = Field(
        16, gt=0, description="Samples per optimizer step, over all GPUs and accumulation."
    )
    micro_batch_size: int = Field(
        USUAL_MICRO_BATCH,
        gt=0,
        description="Samples per forward on one GPU; default: 4, or batch_size if that is less.",
    )
    run_samples: int = Field(
        8, gt=0, description="Samples of one size and text length that follow each other."
    )
    min_aspect: float = Field(0.0, ge=0.0, description="Narrowest bucket, width over height.")
    max_aspect: float | None = Field(None, gt=0.0, description="Widest bucket, width over height.")
    max_upscale: float = Field(
        1.0, gt=0.0, description="Images that would grow by more than this factor are refused."
    )
    crop: Literal["random", "centre"] = Field(
        "random", description="Where training pictures are cropped; evaluation takes the centre."
    )
    cached_crops: int | None = Field(
        None,
        gt=0,
        description="Draws of crop and flip per image, repeated in turn; default: no end of them.",
    )
    flip_prob: float = Field(
        0.0, ge=0.0, le=1.0, description="Probability of a mirrored image, training only."
    )
    workers: int = Field(2, ge=0, le=256, description="Processes that load images; 0: none.")

    @model_validator(mode="before")
    @classmethod
    def _micro_follows(cls, data: Any) -> Any:
        """A small batch needs no second key to be said."""
        if not isinstance(data, Mapping) or "micro_batch_size" in data:
            return data
        batch = data.get("batch_size")
        is_small = type(batch) is int and 0 < batch < USUAL_MICRO_BATCH
        return {**data, "micro_batch_size": batch} if is_small else data

    @model_validator(mode="after")
    def _micro_fits(self) -> DataSection:
        if self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} must not exceed "
                f"batch_size {self.batch_size}"
            )
        if self.max_aspect is not None and self.max_aspect < self.min_aspect:
            raise ValueError("max_aspect must not be below min_aspect")
        return self

    @model_validator(mode="after")
    def _cached_crops_do_something(self) -> DataSection:
        one_crop = self.crop == "centre" and self.flip_prob in (0.0, 1.0)
        if self.cached_crops is not None and one_crop:
            raise ValueError(
                'cached_crops does nothing with crop = "centre", which is one crop per image'
            )
        return self

    @model_validator(mode="after")
    def _keeping_is_of_streams(self) -> DataSection:
        if self.stream_keep_gb is not None and not self.streaming:
            raise ValueError("stream_keep_gb does nothing without streaming = true")
        return self

    @property
    def stream_keep_bytes(self) -> int:
        """How much of a streamed set may stay on this disk."""
        asked = STREAM_KEEP_GB if self.stream_keep_gb is None else self.stream_keep_gb
        return round(asked * 1e9)

    @property
    def crops(self) -> CropRule:
        """How training pictures are cropped and mirrored."""
        return CropRule(self.flip_prob, self.crop, self.cached_crops)
