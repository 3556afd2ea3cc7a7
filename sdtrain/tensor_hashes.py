"""Hashes of tensors: what proves that the frozen ones were left alone, and names a model's weights.

A full model has 14 GB in float32, and blake2b reads about one GB a second, so several are hashed at
a time; hashlib lets go of the interpreter's lock meanwhile.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b

import torch
from torch import Tensor

from sdprep.seeding import digest
from sdtrain.engine import whole

MOST_THREADS = 8


def tensor_hash(tensor: Tensor) -> str:
    """Hex of a 128-bit blake2b over a tensor's dtype, shape and bytes."""
    return _of_bytes(_on_cpu(tensor))


def tensor_hashes(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """`tensor_hash` of many; with sharded tensors every process must ask for the same, in order.

    Args:
        named: name and tensor, one after the other; a few are copied to the CPU at a time.
    """
    found: dict[str, str] = {}
    waiting: deque[tuple[str, Future[str]]] = deque()
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="hash") as pool:
        for name, tensor in named:
            waiting.append((name, pool.submit(_of_bytes, _on_cpu(tensor))))
            if len(waiting) > 2 * threads:
                first, result = waiting.popleft()
                found[first] = result.result()
        found.update((name, result.result()) for name, result in waiting)
    return found


def part_hashes(hashes: Mapping[str, str]) -> dict[str, str]:
    """One hash for each network.

    Args:
        hashes: of its tensors by `part.path`, sorted.
    """
    by_part: dict[str, list[str]] = {}
    for path, value in hashes.items():
        by_part.setdefault(path.split(".")[0], []).append(value)
    return {part: digest(part, *values) for part, values in by_part.items()}


def _on_cpu(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).to("cpu").contiguous()


def _of_bytes(data: Tensor) -> str:
    hasher = blake2b(f"{data.dtype} {tuple(data.shape)} ".encode(), digest_size=16)
    hasher.update(data.view(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
