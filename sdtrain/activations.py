"""How much memory a step takes beside weights and optimizer: the largest one, run without numbers.

PyTorch runs a network on tensors that have a shape and no content (`FakeTensorMode`), which takes
seconds and no memory. What is alive at the same time on the way forward and back is what a GPU
would have to hold: activations, gradients, half-precision copies of weights, blocks that are
computed again. Fragmentation and the libraries' own buffers are not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdtrain.batch import Batch, MicroConditioning
from sdtrain.family import Family, Loss
from sdtrain.step import denoising_loss

_BLOCK_BYTES = 512
"""PyTorch's allocator rounds up to it."""


@dataclass(frozen=True)
class Forward:
    """The size of one.

    Args:
        height: of the bucket, in pixels.
        width: of the bucket, in pixels.
        samples: in the micro-batch.
        chunks: of the longest prompt.
        pictures: encoded at once; 0: their latents are stored.
        is_repeated: whether gradients of another one are there already.
    """

    height: int
    width: int
    samples: int
    chunks: int
    pictures: int
    is_repeated: bool


def working_bytes(family: Family, loss: Loss, forward: Forward) -> int:
    """Bytes that are alive at once, at most, in a forward and its backward.

    Args:
        family: as it trains: adapter attached, the rest frozen. It stays as it is.
        loss: of the recipe.
        forward: its size.

    Returns:
        the peak, gradients included; weights, optimizer and averages are not in it.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _without_numbers(family.parts) as device:
        batch = _batch(family, forward, device)
        with _Alive() as alive:
            for _ in range(1 + forward.is_repeated):
                if forward.pictures:
                    shape = (forward.pictures, 3, forward.height, forward.width)
                    family.encode_images(torch.empty(shape, device=device))
                shape = (forward.samples, *batch.noise.shape[1:])
                latents = torch.empty(shape, device=device)
                denoising_loss(family, batch, loss, latents=latents).mean().backward()
        return alive.most


class _Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and nobody has let go of."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = -(-storage.nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


@contextmanager
def _without_numbers(parts: Mapping[str, nn.Module]) -> Iterator[torch.device]:
    """Networks whose tensors have no content, for a while; yields the device they would be on."""
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    device = torch.device("cpu")
    try:
        for tensors, name, tensor in _tensors(parts.values()):
            kept.append((tensors, name, tensor))
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            if isinstance(tensor, nn.Parameter):
                device = tensor.device
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            tensors[name] = empty
        yield device
    finally:
        for tensors, name, tensor in kept:
            tensors[name] = tensor


def _tensors(networks: Iterable[nn.Module]) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Where each parameter and buffer is kept, its name there, and itself."""
    return [
        (tensors, name, tensor)
        for network in networks
        for module in network.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]


def _batch(family: Family, forward: Forward, device: torch.device) -> Batch:
    """Samples of the size, with a prompt of the length."""
    size = (forward.height, forward.width)
    scale = family.vae_scale_factor
    shape = (family.latent_channels, forward.height // scale, forward.width // scale)
    prompt = "a"
    while family.num_chunks(prompt) < forward.chunks:
        prompt += " a" * 20
    count = forward.samples
    return Batch(
        ids=[str(at) for at in range(count)],
        visits=[0] * count,
        pixels=torch.empty(count, 0),
        prompts=[prompt] * count,
        micro=[MicroConditioning(size, (0, 0), size)] * count,
        noise=torch.empty(count, *shape, device=device),
        u=torch.full((count,), 0.5, dtype=torch.float64),
    )
