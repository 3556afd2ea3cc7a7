"""LoKr: the Kronecker product of a small matrix and a large one, whole or of low rank.

Source: LyCORIS, arXiv:2309.14859. With W m×n, m = a·c and n = b·d the factors are a×b and c×d; c×d
is of rank r unless r ≥ max(c, d) / 2, and then alpha has no say. The layers are peft's, with that
last rule set right: peft scales whole factors too. First values as in LyCORIS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from sdprep.recipe import Section
from sdtrain.adapters import _peft
from sdtrain.adapters._layers import LayerAdapter
from sdtrain.adapters._scale import alpha_tensor, rate_note
from sdtrain.adapters._targets import REACHES, Targets, is_target, require_convolutions
from sdtrain.noise import uniform_for

ENDS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
NAMES = {f"lokr_{end}": f"lokr_{end}" for end in ENDS}
ZERO_AT_START = ("lokr_w2", "lokr_w2_b")
WHOLE_RANK = 1 << 20  # beyond half of any layer's width


class Config(Section):
    """Kronecker product of a small and a large factor."""

    type: Literal["lokr"] = "lokr"
    factor: int = Field(
        8, ge=-1, le=1024, description="Size of the small factor; -1 is near the square root."
    )
    whole: bool = Field(False, description="Train the large factor whole, whatever its size.")
    rank: int = Field(16, ge=1, le=1024, description="Inner width of a factor that is not whole.")
    alpha: float = Field(
        1.0, gt=0, description="A factor of low rank is scaled by alpha / rank; a whole one is not."
    )
    decompose_both: bool = Field(False, description="Give the small factor a low rank as well.")
    tucker: bool = Field(False, description="Take large factors of 3x3 convolutions further apart.")
    targets: Targets = Field("attention+ff", description="Which layers get one.")
    seed: int = Field(0, description="Keys the first values.")

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.factor == 0:
            raise ValueError("factor must be -1 or at least 1")
        dead = [k for k in ("rank", "alpha", "decompose_both", "tucker") if k in self.changed()]
        if self.whole and dead:
            raise ValueError(f"{' and '.join(dead)} has no effect with whole = true; leave it out")
        if self.tucker:
            require_convolutions("tucker", self.targets)
        return self

    def changed(self) -> list[str]:
        """Keys with another value than the default."""
        fields = type(self).model_fields
        return [key for key, field in fields.items() if getattr(self, key) != field.default]

    def build(self) -> LayerAdapter:
        """The adapter."""
        kind = LokrKind(self)
        return LayerAdapter(
            "lokr", kind, partial(is_target, self.targets), REACHES[self.targets], kind.describe
        )


class LokrKind:
    """See `Kind`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.rank = WHOLE_RANK if config.whole else config.rank
        self.num_whole = 0

    def describe(self, num_layers: int) -> Sequence[str]:
        """How many layers are whole, and what alpha means for the others."""
        config = self.config
        lines = []
        if self.num_whole:
            lines.append(
                f"lokr: {self.num_whole} layers with both factors whole, factor {config.factor}; "
                "alpha has no say there"
            )
        left = num_layers - self.num_whole
        if left:
            lines += rate_note("lokr", config.rank, config.alpha, config.alpha / config.rank)(left)
        return lines

    def wrap(self, network: nn.Module, paths: Mapping[str, str]) -> None:
        """Put peft's layers in place; where both factors are whole the scale is 1."""
        from peft import LoKrConfig

        options = LoKrConfig(
            r=self.rank,
            alpha=self.config.alpha,  # type: ignore[arg-type]
            decompose_factor=self.config.factor,
            decompose_both=self.config.decompose_both,
            use_effective_conv2d=self.config.tucker,
            target_modules=list(paths),
        )
        _peft.inject(network, options)
        for name in paths:
            layer: Any = network.get_submodule(name)
            if is_whole(layer):
                layer.scaling[_peft.PEFT_NAME] = 1.0
                self.num_whole += 1

    def parameters(self, layer: Any) -> dict[str, nn.Parameter]:
        """w1 or w1_a w1_b, and w2 or w2_a w2_b, the latter with t2 after Tucker."""
        return _peft.tensors(layer, NAMES)

    def draw(self, path: str, layer: Any) -> None:
        """kaiming_uniform with a = √5, and zero where that makes the product zero."""
        for end, tensor in self.parameters(layer).items():
            if end in ZERO_AT_START:
                tensor.zero_()
                continue
            bound = 1 / math.sqrt(tensor[0].numel())
            draw = uniform_for(self.config.seed, "lokr", f"{path}.{end}", tensor.shape)
            tensor.copy_((2 * draw - 1) * bound)

    def merged_weight(self, layer: Any) -> Tensor:
        """W + scale · w1 ⊗ w2."""
        return _peft.merged_weight(layer)

    def kohya(self, layer: Any) -> dict[str, Tensor]:
        """`lokr_w1` and so on; `alpha`, which readers leave out where both factors are whole."""
        alpha = 1.0 if is_whole(layer) else self.config.alpha
        return {**self.parameters(layer), "alpha": alpha_tensor(alpha)}

    def diffusers(self, layer: Any) -> None:
        """Diffusers reads no LoKr."""


def is_whole(layer: Any) -> bool:
    """Whether neither factor of one of peft's layers is of low rank."""
    return _peft.PEFT_NAME in layer.lokr_w1 and _peft.PEFT_NAME in layer.lokr_w2
