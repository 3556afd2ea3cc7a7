"""Low-rank products beside a layer: matrices, convolutions, and convolutions after Tucker."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sdtrain.adapters._layers import Adapted, run
from sdtrain.adapters._scale import alpha_tensor
from sdtrain.noise import uniform_for

Factors = tuple[Tensor, Tensor | None, Tensor]
"""Inner, middle (Tucker only) and outer factor."""


class LowRank(Adapted):
    """W + scale · (up · mid · down), computed beside the base layer.

    Args:
        base: linear layer or convolution.
        rank: inner width r.
        alpha: the scale is alpha / r.
        seed: keys the first values.
        tucker: of a convolution larger than 1x1, take a kernel (r, r, k, k) between 1x1 factors.
    """

    def __init__(
        self, base: Any, *, rank: int, alpha: float, seed: int, tucker: bool = False
    ) -> None:
        super().__init__(base)
        self.rank, self.alpha, self.seed = rank, alpha, seed
        outputs, inputs, *kernel = base.weight.shape
        ones = [1] * len(kernel)
        if tucker and kernel != ones:
            self.add("down", rank, inputs, *ones)
            self.add("mid", rank, rank, *kernel)
        else:
            self.add("down", rank, inputs, *kernel)
        self.add("up", outputs, rank, *ones)

    @property
    def has_tucker(self) -> bool:
        """Whether there is a kernel in the middle."""
        return "mid" in self.adapter

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank

    def draw(self, path: str) -> None:
        """kaiming_uniform with a = √5 inside, as torch and peft; zero outside."""
        for key in ("down", "mid") if self.has_tucker else ("down",):
            tensor = self.adapter[key]
            bound = 1 / math.sqrt(tensor[0].numel())
            name = path if key == "down" else f"{path}.{key}"
            draw = uniform_for(self.seed, "lora", name, tensor.shape)
            tensor.copy_((2 * draw - 1) * bound)

    def factors(self) -> Factors:
        """The factors in use."""
        mid = self.adapter["mid"] if self.has_tucker else None
        return self.adapter["down"], mid, self.adapter["up"]

    def delta(self, factors: Factors) -> Tensor:
        """The product in the base's shape, not scaled."""
        down, mid, up = factors
        shape = self.base_layer.weight.shape
        if mid is None:
            return (up.flatten(1) @ down.flatten(1)).reshape(shape)
        return torch.einsum("or,rikl,ij->ojkl", up.flatten(1), mid, down.flatten(1))

    def beside(self, x: Tensor, factors: Factors) -> Tensor:
        """The product applied to an input, not scaled."""
        down, mid, up = factors
        base = self.base_layer
        if not isinstance(base, nn.Conv2d):
            linear = nn.functional.linear
            return linear(linear(x, down), up)
        # Stride and padding belong to the factor that has the kernel.
        if mid is None:
            inner = run(base, x, down, None)
        else:
            inner = run(base, nn.functional.conv2d(x, down), mid, None)
        return nn.functional.conv2d(inner, up)

    def merged_weight(self) -> Tensor:
        """W + scale · up · mid · down."""
        return self.base_layer.weight + self.scale * self.delta(self.factors())

    def forward(self, x: Tensor) -> Tensor:
        """The base's output and the scaled product's."""
        return self.base_layer(x) + self.scale * self.beside(x, self.factors())

    def kohya(self) -> dict[str, Tensor]:
        """`lora_down.weight`, `lora_mid.weight`, `lora_up.weight`, `alpha`."""
        named = {f"lora_{key}.weight": tensor for key, tensor in self.adapter.items()}
        return {**named, "alpha": alpha_tensor(self.alpha)}

    def diffusers(self) -> dict[str, Tensor] | None:
        """`lora_A.weight`, `lora_B.weight`, `alpha`; peft has no middle kernel."""
        if self.has_tucker:
            return None
        down, _, up = self.factors()
        return {"lora_A.weight": down, "lora_B.weight": up, "alpha": alpha_tensor(self.alpha)}
