"""Alpha and rank in words: what a learning rate here would be elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def rate_note(name: str, rank: int, alpha: float, scale: float) -> Callable[[int], list[str]]:
    """The sentence beside the plan, for a number of layers.

    With Adam, lr at scale s moves the product as much as lr · sqrt(s) does at scale 1.

    Args:
        name: of the adapter.
        rank: inner width.
        alpha: as the recipe has it.
        scale: what the product is multiplied by, alpha / rank.
    """
    factor = math.sqrt(1 / scale)

    def describe(num_layers: int) -> list[str]:
        return [
            f"{name}: {num_layers} layers, rank {rank}, alpha {alpha:g}, scale {scale:g}; "
            f"a rate lr here acts like lr / {factor:.3g} at alpha = rank"
        ]

    return describe


def alpha_tensor(alpha: float) -> Tensor:
    """`alpha` as files hold it."""
    return torch.tensor(float(alpha))
