"""`[noise]`: training noise that is more than one normal number per latent.

Drawn by the loader's workers under keys of its own; evaluation and pictures never see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import interpolate

from sdprep.recipe import Section
from sdprep.seeding import uniform
from sdtrain.noise import noise_for

Key = tuple[int, str, int]
"""Seed of the run, sample id, visit."""


class NoiseSection(Section):
    """What the noise of training has besides itself; one of the three, or nothing."""

    offset: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Size of a shift drawn for each channel as a whole; bigASP's code has 0.05.",
    )
    multires_iterations: int = Field(
        0, ge=0, le=16, description="Coarser layers added to the noise (pyramid noise); 0: none."
    )
    multires_discount: float = Field(
        0.3, gt=0.0, le=1.0, description="Size of each of those layers, relative to the one before."
    )
    input_perturbation: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Size of further noise that the input gets and the target does not.",
    )

    @model_validator(mode="after")
    def _one_at_a_time(self) -> NoiseSection:
        asked = [
            key
            for key in ("offset", "multires_iterations", "input_perturbation")
            if getattr(self, key)
        ]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} exclude each other; keep one")
        usual = type(self).model_fields["multires_discount"].default
        if self.multires_discount != usual and not self.multires_iterations:
            raise ValueError("multires_discount needs multires_iterations > 0")
        return self

    @property
    def is_plain(self) -> bool:
        """Whether the noise is just noise."""
        return not (self.offset or self.multires_iterations or self.input_perturbation)

    def draw(self, key: Key, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The noise of one training sample.

        Args:
            key: seed, sample id and visit; nothing else decides.
            shape: (C, h, w) of one latent.

        Returns:
            the noise that target and input are made of, and what the input gets on top, or None:
            two float32 of `shape`, on the CPU.
        """
        seed, sample_id, visit = key
        noise = noise_for(seed, "noise", sample_id, visit, shape)
        if self.offset:
            shift = noise_for(seed, "noise-offset", sample_id, visit, (shape[0], 1, 1))
            return noise + self.offset * shift, None
        if self.multires_iterations:
            return self._pyramid(noise, key), None
        if self.input_perturbation:
            more = noise_for(seed, "noise-perturbation", sample_id, visit, shape)
            return noise, self.input_perturbation * more
        return noise, None

    def _pyramid(self, noise: Tensor, key: Key) -> Tensor:
        """Add layers of noise that are 2 to 4 times coarser each, then scale to deviation 1."""
        seed, sample_id, visit = key
        channels, height, width = noise.shape
        total, coarser = noise, 1.0
        for layer in range(1, self.multires_iterations + 1):
            coarser *= 2 + 2 * uniform(seed, "noise-multires", sample_id, visit, layer)
            size = max(1, math.floor(height / coarser)), max(1, math.floor(width / coarser))
            small = noise_for(seed, f"noise-multires-{layer}", sample_id, visit, (channels, *size))
            large = interpolate(small[None], (height, width), mode="bilinear")[0]
            total = total + self.multires_discount**layer * large
            if 1 in size:
                break
        return total / torch.std(total)


PLAIN = NoiseSection()
