"""DoRA: LoRA for the direction of each output's weights, and a length of its own for each output.

Source: arXiv:2402.09353, equation 5, with the norm taken as constant in the gradient (section
4.3). peft takes that norm in the precision of the step, so that under bfloat16 the output at the
start is not the base's; here it is float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from sdprep.recipe import Section
from sdtrain.adapters._layers import LayerAdapter, OwnKind
from sdtrain.adapters._low_rank import LowRank
from sdtrain.adapters._scale import rate_note
from sdtrain.adapters._targets import REACHES, Targets, is_target


class Config(Section):
    """LoRA with a trained length for each output."""

    type: Literal["dora"] = "dora"
    rank: int = Field(16, ge=1, le=1024, description="Inner width of the two matrices.")
    alpha: float = Field(
        1.0, gt=0, description="Output is scaled by alpha / rank; 1 keeps the rate rank-free."
    )
    targets: Targets = Field("attention+ff", description="Which layers get one.")
    seed: int = Field(0, description="Keys the first values of the inner matrices.")

    def build(self) -> LayerAdapter:
        """The adapter."""

        def make(base: Any, path: str) -> Dora:
            return Dora(base, rank=self.rank, alpha=self.alpha, seed=self.seed)

        return LayerAdapter(
            "dora",
            OwnKind(make),
            partial(is_target, self.targets),
            REACHES[self.targets],
            rate_note("dora", self.rank, self.alpha, self.alpha / self.rank),
        )


class Dora(LowRank):
    """magnitude · (W + scale · up · down) / its norm, row by row."""

    def __init__(self, base: Any, *, rank: int, alpha: float, seed: int) -> None:
        super().__init__(base, rank=rank, alpha=alpha, seed=seed)
        self.add("magnitude", base.weight.shape[0])

    def draw(self, path: str) -> None:
        """The matrices as in LoRA; the lengths are those of the base."""
        super().draw(path)
        self.adapter["magnitude"].copy_(self._norm())

    def _norm(self) -> Tensor:
        """(out,) lengths of the rows of W + scale · up · down, without a gradient."""
        with torch.no_grad():
            weight = self.base_layer.weight.float() + self.scale * self.delta(self.factors())
            norm = torch.linalg.vector_norm(weight.flatten(1), dim=1)
            # A row of zeros has no direction: it stays zero, and nothing is divided by it.
            return norm.clamp_min(torch.finfo(torch.float32).tiny)

    def _gain(self) -> Tensor:
        """(out,) what each row is multiplied by; exactly 1 at the start."""
        return self.adapter["magnitude"] / self._norm()

    def merged_weight(self) -> Tensor:
        """The rows with their lengths."""
        gain = self._gain().view(-1, *[1] * (self.base_layer.weight.dim() - 1))
        return gain * super().merged_weight()

    def forward(self, x: Tensor) -> Tensor:
        """The base's output plus what direction and length add to it."""
        with torch.autocast(x.device.type, enabled=False):
            gain = self._gain()
        base, bias = self.base_layer(x), self.base_layer.bias
        if base.dim() == 4:  # (B, C, h, w)
            gain = gain.view(-1, 1, 1)
            bias = None if bias is None else bias.view(-1, 1, 1)
        plain = base if bias is None else base - bias
        added = (gain - 1) * plain + gain * self.scale * self.beside(x, self.factors())
        return base + added.to(base.dtype)

    def kohya(self) -> dict[str, Tensor]:
        """As LoRA, and `dora_scale` (out, 1, …)."""
        tensors = super().kohya()
        magnitude = tensors.pop("lora_magnitude.weight")
        shape = (-1, *[1] * (self.base_layer.weight.dim() - 1))
        return {**tensors, "dora_scale": magnitude.view(shape)}

    def diffusers(self) -> dict[str, Tensor] | None:
        """As LoRA, and `lora_magnitude_vector`."""
        tensors = super().diffusers()
        assert tensors is not None, "no Tucker here"
        magnitude = self.adapter["magnitude"]
        if self.base_layer.weight.dim() == 4:
            magnitude = magnitude.view(1, -1, 1, 1)
        return {**tensors, "lora_magnitude_vector": magnitude}
