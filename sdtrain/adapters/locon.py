"""LoCon: LoRA that reaches convolutions as well, whole or after Tucker.

Source: LyCORIS, arXiv:2309.14859, section 3. peft knows no Tucker convolutions, so the layer is
our own.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator

from sdprep.recipe import Section
from sdtrain.adapters._layers import LayerAdapter, OwnKind
from sdtrain.adapters._low_rank import LowRank
from sdtrain.adapters._scale import rate_note
from sdtrain.adapters._targets import REACHES, Targets, is_target, require_convolutions


class Config(Section):
    """LoRA that reaches the convolutions too."""

    type: Literal["locon"] = "locon"
    rank: int = Field(16, ge=1, le=1024, description="Inner width of the factors.")
    alpha: float = Field(
        1.0, gt=0, description="Output is scaled by alpha / rank; 1 keeps the rate rank-free."
    )
    tucker: bool = Field(
        False, description="Take 3x3 convolutions apart further, which needs fewer parameters."
    )
    targets: Targets = Field("attention+ff+resnets", description="Which layers get one.")
    seed: int = Field(0, description="Keys the first values of the inner factors.")

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.tucker:
            require_convolutions("tucker", self.targets)
        return self

    def build(self) -> LayerAdapter:
        """The adapter."""

        def make(base: Any, path: str) -> LowRank:
            return LowRank(
                base, rank=self.rank, alpha=self.alpha, seed=self.seed, tucker=self.tucker
            )

        return LayerAdapter(
            "locon",
            OwnKind(make),
            partial(is_target, self.targets),
            REACHES[self.targets],
            rate_note("locon", self.rank, self.alpha, self.alpha / self.rank),
        )
