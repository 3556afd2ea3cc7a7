"""OFT: the outputs of a layer are rotated, block by block; angles between neurons stay.

Source: arXiv:2306.07280, in the block-diagonal form of LyCORIS (Diag-OFT).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from sdprep.recipe import Section
from sdtrain.adapter import UnsuitableError
from sdtrain.adapters._layers import LayerAdapter, OwnKind
from sdtrain.adapters._rotations import Rotated
from sdtrain.adapters._targets import REACHES, Targets, is_target


class Config(Section):
    """Rotate the outputs of each layer, block by block."""

    type: Literal["oft"] = "oft"
    block_size: int = Field(8, ge=2, le=256, description="Outputs that rotate among themselves.")
    rescaled: bool = Field(False, description="Train a factor for each output as well.")
    targets: Targets = Field("attention+ff", description="Which layers get one.")

    def build(self) -> LayerAdapter:
        """The adapter."""

        def make(base: Any, path: str) -> Oft:
            return Oft(base, path, block_size=self.block_size, rescaled=self.rescaled)

        return LayerAdapter(
            "oft",
            OwnKind(make),
            partial(is_target, self.targets),
            REACHES[self.targets],
            lambda count: [f"oft: {count} layers in blocks of {self.block_size}; no alpha"],
        )


class Oft(Rotated):
    """One rotation for each block of outputs."""

    def __init__(self, base: Any, path: str, *, block_size: int, rescaled: bool) -> None:
        outputs = base.weight.shape[0]
        if outputs % block_size:
            near = [b for b in range(2, outputs + 1) if outputs % b == 0]
            near = sorted(sorted(near, key=lambda b: abs(b - block_size))[:3])
            raise UnsuitableError(
                path,
                f"its {outputs} outputs do not divide into blocks of {block_size}",
                f"Sizes that do: {', '.join(map(str, near))}; or freeze it by a later rule.",
            )
        super().__init__(
            base, block_size=block_size, leading=(outputs // block_size,), rescaled=rescaled
        )

    def rotated(self) -> Tensor:
        """W + (R - I)ᵀ W, block by block."""
        base = self.base_layer.weight
        side = self.block_size
        change = self.rotations() - torch.eye(side, device=base.device)
        blocks = base.reshape(-1, side, base[0].numel())  # (m / b, b, in)
        return base + (change.mT @ blocks).reshape(base.shape)
