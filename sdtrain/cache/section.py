"""The `[cache]` of a training recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from sdprep.recipe import Section

DEFAULT_FOLDER = "sdtrain-cache"


class CacheSection(Section):
    """What is encoded once and read ever after; `dtype` and `posterior` hold without a cache too.

    Latents and the text of frozen encoders are rounded to `dtype` whether or not they are kept, so
    a run has the same numbers with and without its caches.
    """

    latents: bool = Field(
        False, description="Keep encoded pictures; needs data.cached_crops, or crop = centre."
    )
    text: bool | Literal["auto"] = Field(
        False,
        description='Keep encoded prompts; "auto": if no text encoder trains and texts repeat.',
    )
    path: str | None = Field(
        None,
        description=f"Folder of the caches, which runs may share; default: {DEFAULT_FOLDER} "
        "beside `output`.",
    )
    dtype: Literal["fp16", "bf16", "fp32"] = Field(
        "fp16", description="Number format that latents and frozen text are rounded to."
    )
    posterior: Literal["mode", "sample"] = Field(
        "mode", description="Latents are the mean of the VAE's answer, or a keyed sample of it."
    )
    vae_batch: int = Field(
        1,
        gt=0,
        le=64,
        description="Pictures per forward of the VAE; above 1 it is up to a third faster, but "
        "batch mates move a latent a little (6e-4 on a GPU with TF32).",
    )

    @field_validator("path", mode="after")
    @classmethod
    def _is_named(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("must name a folder, or be left out")
        return value

    @property
    def is_wanted(self) -> bool:
        """Whether anything is to be kept."""
        return self.latents or bool(self.text)

    def folder(self, output: Path) -> Path:
        """Where the caches of a run lie."""
        return output.parent / DEFAULT_FOLDER if self.path is None else Path(self.path)
