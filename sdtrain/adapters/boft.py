"""BOFT: rotations in stages like a fast Fourier transform, so that every output meets every other.

Source: arXiv:2311.06243, in the form of LyCORIS: stage i mixes pairs of groups of 2^i · b / 2
outputs. The m outputs must be b times a power of two.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import Field, field_validator
from torch import Tensor

from sdprep.recipe import Section
from sdtrain.adapter import UnsuitableError
from sdtrain.adapters._layers import LayerAdapter, OwnKind
from sdtrain.adapters._rotations import Rotated
from sdtrain.adapters._targets import REACHES, Targets, is_target


class Config(Section):
    """Rotate the outputs of each layer in stages, like a butterfly."""

    type: Literal["boft"] = "boft"
    block_size: int = Field(
        10, ge=2, le=256, description="Outputs that rotate among themselves; m = size · 2^p."
    )
    rescaled: bool = Field(False, description="Train a factor for each output as well.")
    targets: Targets = Field("attention", description="Which layers get one.")

    @field_validator("block_size")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even: each stage pairs halves of blocks")
        return value

    def build(self) -> LayerAdapter:
        """The adapter."""

        def make(base: Any, path: str) -> Boft:
            return Boft(base, path, block_size=self.block_size, rescaled=self.rescaled)

        return LayerAdapter(
            "boft",
            OwnKind(make),
            partial(is_target, self.targets),
            REACHES[self.targets],
            lambda count: [f"boft: {count} layers in blocks of {self.block_size}; no alpha"],
        )


def butterfly_sizes(outputs: int) -> list[int]:
    """Even block sizes that divide a number of outputs into a power of two."""
    counts = [outputs >> power for power in range(outputs.bit_length()) if outputs % 2**power == 0]
    return sorted(size for size in counts if size % 2 == 0)


class Boft(Rotated):
    """log2(m / b) + 1 stages of block rotations."""

    def __init__(self, base: Any, path: str, *, block_size: int, rescaled: bool) -> None:
        outputs = base.weight.shape[0]
        sizes = butterfly_sizes(outputs)
        if block_size not in sizes:
            raise UnsuitableError(
                path,
                f"its {outputs} outputs are not {block_size} times a power of two",
                f"Sizes that do: {', '.join(map(str, sizes[:6]))}; or freeze it by a later rule."
                if sizes
                else "No size does: freeze it by a later rule.",
            )
        count = outputs // block_size
        leading = (count.bit_length(), count)
        super().__init__(base, block_size=block_size, leading=leading, rescaled=rescaled)

    def rotated(self) -> Tensor:
        """W after all stages."""
        base = self.base_layer.weight
        weight = base.reshape(base.shape[0], -1)  # (m, in)
        rows, columns = weight.shape
        for stage, rotations in enumerate(self.rotations()):  # (m / b, b, b)
            half = 2**stage * self.block_size // 2
            # Row (group, side, place) goes to (group, place, side): its partner comes beside it.
            paired = weight.view(-1, 2, half, columns).transpose(1, 2)
            mixed = rotations @ paired.reshape(-1, self.block_size, columns)
            back = mixed.reshape(-1, half, 2, columns).transpose(1, 2)
            weight = back.reshape(rows, columns)
        return weight.reshape(base.shape)
