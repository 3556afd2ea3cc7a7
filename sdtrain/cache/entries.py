"""Entries of a cache: named tensors to bytes and back, with a checksum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CHECKSUM_BYTES = 8


@dataclass(frozen=True)
class Entry:
    """One row of a cache.

    Args:
        key: what it is called.
        label: whose it is, for people: an image's id, or the start of a prompt.
        dtype: `fp16`, `bf16` or `fp32`.
        layout: name and shape of every tensor, such as `mean:4x64x64`.
        data: their bytes, little-endian, one after the other.
        checksum: of all that.
    """

    key: bytes
    label: str
    dtype: str
    layout: str
    data: bytes
    checksum: bytes

    @property
    def is_sound(self) -> bool:
        """Whether the checksum fits."""
        return self.checksum == _checksum(self.key, self.dtype, self.layout, self.data)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, on the CPU, in the entry's dtype."""
        whole = torch.frombuffer(bytearray(self.data), dtype=DTYPES[self.dtype])
        found, start = {}, 0
        for part in self.layout.split(";"):
            name, _, sides = part.partition(":")
            shape = [int(side) for side in sides.split("x")]
            count = torch.Size(shape).numel()
            found[name] = whole[start : start + count].view(shape)
            start += count
        return found


def pack(key: bytes, label: str, dtype: str, tensors: Mapping[str, Tensor]) -> Entry:
    """An entry of some tensors on the CPU, all of one of `DTYPES`."""
    layout = layout_of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    pieces = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors.values()]
    assert all(tensor.dtype == DTYPES[dtype] for tensor in tensors.values()), dtype
    data = torch.cat(pieces).numpy().tobytes()
    return Entry(key, label, dtype, layout, data, _checksum(key, dtype, layout, data))


def layout_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Names and shapes as one text."""
    return ";".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _checksum(key: bytes, dtype: str, layout: str, data: bytes) -> bytes:
    hasher = blake2b(key + f"{dtype} {layout} ".encode(), digest_size=CHECKSUM_BYTES)
    hasher.update(data)
    return hasher.digest()
