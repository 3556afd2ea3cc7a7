"""(IA)³: one factor for each key, value and feed-forward channel; the smallest adapter there is.

Source: arXiv:2205.05638; files as LyCORIS writes them. Keys and values are scaled at their outputs,
the last feed-forward layer at its inputs. Biases stay: a file has no word for them (peft scales
them, and so ends up elsewhere after a reload).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sdprep.recipe import Section
from sdtrain.adapters._layers import Adapted, LayerAdapter, OwnKind
from sdtrain.adapters._targets import (
    FEED_FORWARD_OUT,
    KEYS_AND_VALUES,
    LinearTargets,
    ends_with,
)

REACHES = {
    "attention": "key and value layers of attentions",
    "attention+ff": "key, value and last feed-forward layers of the transformer blocks",
}


class Config(Section):
    """Scale keys, values and the feed-forward inside."""

    type: Literal["ia3"] = "ia3"
    targets: LinearTargets = Field(
        "attention+ff", description="Keys and values only, or the feed-forward layers too."
    )

    def build(self) -> LayerAdapter:
        """The adapter."""

        def make(base: Any, path: str) -> Ia3:
            return Ia3(base, on_input=ends_with(path, FEED_FORWARD_OUT))

        return LayerAdapter(
            "ia3",
            OwnKind(make),
            partial(_is_wanted, self.targets),
            REACHES[self.targets],
            lambda count: [f"ia3: {count} layers; it wants a high rate, 5e-3 to 1e-2"],
        )


def _is_wanted(targets: str, name: str, module: nn.Module) -> bool:
    ends = KEYS_AND_VALUES + (FEED_FORWARD_OUT if targets == "attention+ff" else ())
    return isinstance(module, nn.Linear) and ends_with(name, ends)


class Ia3(Adapted):
    """W · (1 + weight), row by row or column by column.

    Args:
        base: the linear layer.
        on_input: scale what goes in, not what comes out.
    """

    def __init__(self, base: Any, *, on_input: bool) -> None:
        super().__init__(base)
        self.on_input = on_input
        self.add("weight", base.in_features if on_input else base.out_features)

    def draw(self, path: str) -> None:
        """Nothing is scaled."""
        self.adapter["weight"].zero_()

    def merged_weight(self) -> Tensor:
        """The scaled weight."""
        gain = 1 + self.adapter["weight"]
        return self.base_layer.weight * (gain if self.on_input else gain[:, None])

    def kohya(self) -> dict[str, Tensor]:
        """`weight` and the flag `on_input`."""
        flag = torch.tensor(int(self.on_input))
        return {"weight": self.adapter["weight"], "on_input": flag}
