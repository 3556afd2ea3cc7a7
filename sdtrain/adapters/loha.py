"""LoHa: the elementwise product of two low-rank products; rank r reaches r² with 2r(m + n) numbers.

Source: FedPara, arXiv:2108.06098; LyCORIS, arXiv:2309.14859. The layers are peft's; lycoris-lora
scales twice when it merges. First values as in LyCORIS, whose learning rates people know.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from sdprep.recipe import Section
from sdtrain.adapters import _peft
from sdtrain.adapters._layers import LayerAdapter
from sdtrain.adapters._scale import alpha_tensor, rate_note
from sdtrain.adapters._targets import REACHES, Targets, is_target, require_convolutions
from sdtrain.noise import noise_for

NAMES = {f"hada_{end}": f"hada_{end}" for end in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
FIRST_STD = {"hada_w1_a": 0.1, "hada_w2_a": 0.0, "hada_t1": 0.1, "hada_t2": 0.1}


class Config(Section):
    """Elementwise product of two low-rank products."""

    type: Literal["loha"] = "loha"
    rank: int = Field(8, ge=1, le=32, description="Inner width r; the product reaches rank r².")
    alpha: float = Field(
        1.0, gt=0, description="Output is scaled by alpha / rank; 1 keeps the rate rank-free."
    )
    tucker: bool = Field(
        False, description="Take 3x3 convolutions apart further, which needs fewer parameters."
    )
    targets: Targets = Field("attention+ff", description="Which layers get one.")
    seed: int = Field(0, description="Keys the first values.")

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.tucker:
            require_convolutions("tucker", self.targets)
        return self

    def build(self) -> LayerAdapter:
        """The adapter."""
        return LayerAdapter(
            "loha",
            LohaKind(self),
            partial(is_target, self.targets),
            REACHES[self.targets],
            rate_note("loha", self.rank, self.alpha, self.alpha / self.rank),
        )


class LohaKind:
    """See `Kind`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def wrap(self, network: nn.Module, paths: Mapping[str, str]) -> None:
        """Put peft's layers in place."""
        from peft import LoHaConfig

        options = LoHaConfig(
            r=self.config.rank,
            alpha=self.config.alpha,  # type: ignore[arg-type]
            use_effective_conv2d=self.config.tucker,
            target_modules=list(paths),
        )
        _peft.inject(network, options)

    def parameters(self, layer: Any) -> dict[str, nn.Parameter]:
        """w1_a (out, r), w1_b (r, in), the same of w2; after Tucker w_a is (r, out)."""
        return _peft.tensors(layer, NAMES)

    def draw(self, path: str, layer: Any) -> None:
        """Normal numbers, and zero where one factor suffices to make the product zero."""
        for end, tensor in self.parameters(layer).items():
            noise = noise_for(self.config.seed, "loha", f"{path}.{end}", 0, tensor.shape)
            tensor.copy_(FIRST_STD.get(end, 1.0) * noise)

    def merged_weight(self, layer: Any) -> Tensor:
        """W + scale · (w1_a w1_b) ∘ (w2_a w2_b)."""
        return _peft.merged_weight(layer)

    def kohya(self, layer: Any) -> dict[str, Tensor]:
        """`hada_w1_a` and so on, `alpha`."""
        return {**self.parameters(layer), "alpha": alpha_tensor(self.config.alpha)}

    def diffusers(self, layer: Any) -> None:
        """Diffusers reads no LoHa."""
