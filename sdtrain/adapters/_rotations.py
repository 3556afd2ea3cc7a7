"""Rotations of a layer's outputs by blocks, from their free numbers.

Source: OFT, arXiv:2306.07280; the file's form is LyCORIS's. peft rotates inputs instead, which
needs other numbers of parameters and has no file that ComfyUI reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdtrain.adapters._layers import Adapted
from sdtrain.adapters._scale import alpha_tensor


class Rotated(Adapted):
    """The common part of OFT and BOFT: blocks, their rotations, and the file.

    Args:
        base: linear layer or convolution with m outputs.
        block_size: side b of a block.
        leading: shape of the blocks, such as (m / b,).
        rescaled: whether each output has a trained factor as well.
    """

    def __init__(
        self, base: Any, *, block_size: int, leading: tuple[int, ...], rescaled: bool
    ) -> None:
        super().__init__(base)
        self.block_size = block_size
        self.add("free", *leading, block_size * (block_size - 1) // 2)
        if rescaled:
            self.add("rescale", base.weight.shape[0])

    def draw(self, path: str) -> None:
        """No rotation, factors of 1."""
        self.adapter["free"].zero_()
        if "rescale" in self.adapter:
            self.adapter["rescale"].fill_(1.0)

    def blocks(self) -> Tensor:
        """The free numbers in the upper triangles: (…, b, b)."""
        free, side = self.adapter["free"], self.block_size
        rows, columns = torch.triu_indices(side, side, 1, device=free.device)
        blocks = free.new_zeros((*free.shape[:-1], side, side))
        blocks[..., rows, columns] = free
        return blocks

    def rotations(self) -> Tensor:
        """Cayley's map: (I + Q)(I - Q)⁻¹ with Q = blocks - blocksᵀ; exactly I at the start."""
        blocks = self.blocks()
        skew = blocks - blocks.mT
        one = torch.eye(self.block_size, device=skew.device)
        return torch.linalg.solve(one - skew, one + skew)  # the two factors commute

    def rotated(self) -> Tensor:
        """(m, …) the base weight with its outputs rotated."""
        raise NotImplementedError

    def merged_weight(self) -> Tensor:
        """The rotated weight, with the factors of the outputs."""
        weight = self.rotated()
        if "rescale" in self.adapter:
            weight = self._column(self.adapter["rescale"]) * weight
        return weight

    def _column(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *[1] * (self.base_layer.weight.dim() - 1))

    def kohya(self) -> dict[str, Tensor]:
        """`oft_blocks`, `rescale`, and an `alpha` of 0: no bound on the rotation."""
        tensors = {"oft_blocks": self.blocks(), "alpha": alpha_tensor(0.0)}
        if "rescale" in self.adapter:
            tensors["rescale"] = self._column(self.adapter["rescale"])
        return tensors
