"""The same bits again on the same GPU.

A CPU adds in one order anyway. On a GPU, some kernels let threads add in whatever order they come,
and cuBLAS and cuDNN choose among algorithms as they see fit; all three can be told not to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WORKSPACES = ":4096:8"
"""Eight buffers of 4 MiB for cuBLAS, instead of as many as it likes (its documentation, "Results
reproducibility"). It reads the variable when it starts."""

_NO_SUCH_KERNEL = "does not have a deterministic implementation"


@contextmanager
def deterministic(is_wanted: bool) -> Iterator[None]:
    """Let PyTorch compute in one order only, while inside; enter before anything is on the GPU.

    Args:
        is_wanted: False changes nothing.
    """
    if not is_wanted:
        yield
        return
    memory: Any = torch.utils.deterministic  # it sets its attribute by a property
    kept = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACES)
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # only slower
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(kept[0], warn_only=kept[1])
        memory.fill_uninitialized_memory = kept[2]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = kept[3:]


def what_is_missing(error: BaseException) -> str | None:
    """The operation that has no deterministic kernel, if that is what an error says."""
    text = str(error)
    if not isinstance(error, RuntimeError) or _NO_SUCH_KERNEL not in text:
        return None
    return text.split(_NO_SUCH_KERNEL)[0].strip()
