"""LoRA: two thin matrices beside each chosen linear layer; the base stays as it is.

Source: arXiv:2106.09685; rank-stabilized: arXiv:2312.03732. The layers are peft's; which modules
get one, at which rate, and the first values of the matrices are decided here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from sdprep.recipe import Section
from sdtrain.adapters import _peft
from sdtrain.adapters._layers import LayerAdapter
from sdtrain.adapters._scale import alpha_tensor, rate_note
from sdtrain.adapters._targets import REACHES, LinearTargets, is_target
from sdtrain.noise import uniform_for

NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}


class Config(Section):
    """LoRA."""

    type: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, le=1024, description="Inner width of the two matrices.")
    alpha: float = Field(
        1.0, gt=0, description="Output is scaled by alpha / rank; 1 keeps the rate rank-free."
    )
    rank_stabilized: bool = Field(
        False, description="Scale by alpha / sqrt(rank) instead, for large ranks with alpha = rank."
    )
    targets: LinearTargets = Field(
        "attention+ff", description="Which linear layers of a transformer block get one."
    )
    seed: int = Field(0, description="Keys the first values of the inner matrices.")

    def build(self) -> LayerAdapter:
        """The adapter."""
        kind = LoraKind(self)
        return LayerAdapter(
            "lora",
            kind,
            partial(is_target, self.targets),
            REACHES[self.targets],
            rate_note("lora", self.rank, self.alpha, kind.alpha / self.rank),
        )


class LoraKind:
    """See `Kind`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        # In files alpha is always over the rank itself.
        factor = math.sqrt(config.rank) if config.rank_stabilized else 1.0
        self.alpha = config.alpha * factor

    def wrap(self, network: nn.Module, paths: Mapping[str, str]) -> None:
        """Put the matrices beside the layers."""
        from peft import LoraConfig

        options = LoraConfig(
            r=self.config.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=list(paths),
            init_lora_weights=False,  # `draw` does it, keyed
        )
        _peft.inject(network, options)

    def parameters(self, layer: Any) -> dict[str, nn.Parameter]:
        """The inner (rank, in) and the outer (out, rank) matrix."""
        return _peft.tensors(layer, NAMES)

    def draw(self, path: str, layer: Any) -> None:
        """kaiming_uniform with a = √5 for the inner one, as torch and peft; zero outside."""
        down, up = self.parameters(layer).values()
        bound = 1 / math.sqrt(down.shape[1])
        down.copy_((2 * uniform_for(self.config.seed, "lora", path, down.shape) - 1) * bound)
        up.zero_()

    def merged_weight(self, layer: Any) -> Tensor:
        """W + scale · up · down."""
        return _peft.merged_weight(layer)

    def kohya(self, layer: Any) -> dict[str, Tensor]:
        """`lora_down.weight`, `lora_up.weight`, `alpha`."""
        down, up = self.parameters(layer).values()
        alpha = alpha_tensor(self.alpha)
        return {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}

    def diffusers(self, layer: Any) -> dict[str, Tensor]:
        """`lora_A.weight`, `lora_B.weight`, `alpha`."""
        return {**self.parameters(layer), "alpha": alpha_tensor(self.alpha)}
