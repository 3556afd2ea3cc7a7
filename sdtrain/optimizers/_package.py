"""What optimizers share: types, bytes of their state, and how a missing package is told."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from math import prod
from typing import Annotated, Any

from pydantic import Field

from sdprep.errors import MissingExtraError

Beta = Annotated[float, Field(ge=0, lt=1)]
Groups = list[dict[str, Any]]

UNUSED_LR = 1.0
"""For constructors that insist on a rate of their own; every group brings one."""

FLOAT32_BYTES = 4
QUANTIZED_LEAST = 4096
"""bitsandbytes keeps 32 bits for tensors with fewer numbers than this."""
QUANTIZED_BLOCK = 256
"""Numbers that share one scale in its 8-bit state."""
CODE_BOOK = 256
"""Numbers that an 8-bit byte may stand for; each state has a list of them."""


def optional(module: str, optimizer: str) -> Any:
    """Import a module of the extra `optim`.

    Raises:
        MissingExtraError: its package is not installed.
    """
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtraError(package, "optim", f"optimizer {optimizer}") from None


def whole_bytes(shape: Sequence[int], copies: int) -> int:
    """Bytes of so many float32 tensors of a shape."""
    return FLOAT32_BYTES * copies * prod(shape)


def factored_bytes(shape: Sequence[int]) -> int:
    """Bytes of a running square that is kept as its rows and columns; whole below two dims."""
    if len(shape) < 2:
        return whole_bytes(shape, 1)
    return whole_bytes(shape[:-1], 1) + whole_bytes((*shape[:-2], shape[-1]), 1)


def quantized_bytes(shape: Sequence[int], copies: int) -> int:
    """Bytes of so many 8-bit states of bitsandbytes, with their scales."""
    count = prod(shape)
    if count < QUANTIZED_LEAST:
        return whole_bytes(shape, copies)
    scales = -(-count // QUANTIZED_BLOCK)
    return copies * (count + FLOAT32_BYTES * scales)
