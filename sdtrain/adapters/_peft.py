"""Layers of peft: put in by name, drawn by key, read as tensors.

Which modules get one, the first values and the files are decided here; peft has the algebra of
training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

PEFT_NAME = "default"


def inject(network: nn.Module, options: Any) -> None:
    """Put peft's layers into a network."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(options, network, adapter_name=PEFT_NAME)


def tensors(layer: Any, names: Mapping[str, str]) -> dict[str, nn.Parameter]:
    """The trained tensors of one layer that it has.

    Args:
        layer: one of peft's.
        names: attribute of the layer, a dict by adapter name, to the end of the path.
    """
    found: dict[str, nn.Parameter] = {}
    for attribute, end in names.items():
        value = getattr(layer, attribute)
        if PEFT_NAME in value:
            tensor: Any = value[PEFT_NAME]
            weight: Any = tensor.weight if isinstance(tensor, nn.Module) else tensor
            found[end] = weight
    return found


def merged_weight(layer: Any) -> Tensor:
    """Base weight and what peft adds to it."""
    return layer.get_base_layer().weight + layer.get_delta_weight(PEFT_NAME)
