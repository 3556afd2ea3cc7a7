"""The nouns of training: a batch, and the sizes that some models are told about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroConditioning:
    """Where the pixels of one sample come from; every pair is (height, width) or (top, left).

    Args:
        original_size_hw: upright size of the source picture before any resize, px.
        crop_top_left: corner of the crop in the resized picture, px.
        target_size_hw: size of the bucket, px.
    """

    original_size_hw: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size_hw: tuple[int, int]

    def time_ids(self) -> list[int]:
        """The six numbers in the order that diffusers pipelines use.

        Swapped height and width have broken several public trainers, so no other place in the
        program may put them together.
        """
        return [*self.original_size_hw, *self.crop_top_left, *self.target_size_hw]


@dataclass(frozen=True)
class Stored:
    """What a cache holds of a batch, as the loader found it.

    Args:
        keys: (B) what the cache calls each sample.
        entries: tensors by name, by position in the batch; the other positions are to be encoded.
    """

    keys: list[bytes]
    entries: Mapping[int, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Batch:
    """Samples of one forward: all of one bucket size, already cropped, rendered and keyed.

    Args:
        ids: (B) sample ids.
        visits: (B) how often each sample has been drawn before.
        pixels: (B, 3, H, W) float32 in [-1, 1]; of samples whose latents are stored, nothing.
        prompts: (B) rendered text; the empty string where the caption was dropped.
        micro: (B) sizes of source, crop and bucket.
        noise: (B, C, h, w) float32, keyed per sample and drawn on the CPU.
        u: (B,) float64 in [0, 1), the noise level; it stays on the CPU, where looking up tables
            never makes the device wait.
        mask: (B, 1, h, w) float32 in 0..1, what each latent counts in the loss; None: all alike.
        input_noise: (B, C, h, w) float32, what the input gets on top of the noise that the target
            is made of; None: nothing.
        text_draws: (B,) float64 in [0, 1), a keyed number that a family may decide by what an
            empty prompt means; on the CPU. None in evaluation.
        stored_latents: what the cache has of the latents; None: there is no cache of them.
        stored_text: what the cache has of the prompts; None: there is no cache of them.
        latents: (B, C, h, w) float32, scaled and clean, once they are made; None: not yet.
        conditioning: of the prompts, once it is made; None: `denoising_loss` makes it.
    """

    ids: list[str]
    visits: list[int]
    pixels: Tensor
    prompts: list[str]
    micro: list[MicroConditioning]
    noise: Tensor
    u: Tensor
    mask: Tensor | None = None
    input_noise: Tensor | None = None
    text_draws: Tensor | None = None
    stored_latents: Stored | None = None
    stored_text: Stored | None = None
    latents: Tensor | None = None
    conditioning: Any = None

    def __post_init__(self) -> None:
        counts = {
            "ids": len(self.ids),
            "visits": len(self.visits),
            "pixels": len(self.pixels) + self._num_stored,
            "prompts": len(self.prompts),
            "micro": len(self.micro),
            "noise": len(self.noise),
            "u": len(self.u),
        }
        if self.mask is not None:
            counts["mask"] = len(self.mask)
            assert self.mask.dtype == torch.float32, f"mask must be float32, not {self.mask.dtype}"
        more = {"input_noise": self.input_noise, "text_draws": self.text_draws}
        counts |= {name: len(part) for name, part in more.items() if part is not None}
        assert len(set(counts.values())) == 1, f"parts of a batch differ in length: {counts}"
        assert self.u.dtype == torch.float64, f"u must be float64, not {self.u.dtype}"
        assert self.noise.dtype == torch.float32, f"noise must be float32, not {self.noise.dtype}"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def _num_stored(self) -> int:
        return 0 if self.stored_latents is None else len(self.stored_latents.entries)

    @property
    def is_masked_out(self) -> list[bool]:
        """(B) whether the mask leaves nothing of the sample; ask while the batch is on the CPU."""
        if self.mask is None:
            return [False] * len(self)
        return (self.mask.flatten(1) == 0).all(1).tolist()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its images, noise and mask on `device`, copied without waiting."""
        names = ("pixels", "noise", "mask", "input_noise")
        there = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        moved = {name: part.to(device, non_blocking=True) for name, part in there.items()}
        return replace(self, **moved)
