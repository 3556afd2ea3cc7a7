"""Hashes are of dtype, shape and bytes, in the order that was asked, however many there are."""

from __future__ import annotations

from hashlib import blake2b

import torch

from sdtrain.tensor_hashes import tensor_hash, tensor_hashes


def test_many_are_what_one_by_one_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    named = [
        (f"t{n}", torch.randn(n % 7 + 1, 3, generator=generator).to(dtype))
        for n in range(60)
        for dtype in ((torch.float32, torch.bfloat16, torch.float16)[n % 3],)
    ]
    found = tensor_hashes(iter(named))
    assert list(found) == [name for name, _ in named]
    assert found == {name: tensor_hash(tensor) for name, tensor in named}
    assert tensor_hashes([]) == {}


def test_a_hash_is_of_type_shape_and_bytes() -> None:
    tensor = torch.arange(6, dtype=torch.float32)
    data = b"torch.float32 (2, 3) " + tensor.numpy().tobytes()
    assert tensor_hash(tensor.view(2, 3)) == blake2b(data, digest_size=16).hexdigest()
    assert tensor_hash(tensor.view(2, 3).t().contiguous().t()) == tensor_hash(tensor.view(2, 3))
    others = [tensor, tensor.view(3, 2), tensor.view(torch.int32).view(2, 3), tensor.view(2, 3) + 1]
    assert len({tensor_hash(other) for other in [*others, tensor.view(2, 3)]}) == 5
