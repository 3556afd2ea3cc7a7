"""The frame of every adapter that sits on single layers: attach, merge, and the files.

What an adapter does at one layer is its `Kind`; here is what all of them share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sdprep.errors import UserError
from sdtrain.adapter import Trained
from sdtrain.adapters._targets import chosen_layers
from sdtrain.family import Family
from sdtrain.formats.lora_keys import write_diffusers, write_kohya

Wanted = Callable[[str, nn.Module], bool]
DIFFUSERS_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "lora-kohya.safetensors"


class Kind(Protocol):
    """What one adapter does at one layer."""

    def wrap(self, network: nn.Module, paths: Mapping[str, str]) -> None:
        """Put layers of this kind in the place of some; `paths` is live name to canonical path."""

    def parameters(self, layer: Any) -> dict[str, nn.Parameter]:
        """What trains, by the end of its canonical path."""

    def draw(self, path: str, layer: Any) -> None:
        """Set the first values, keyed by the path; the output must be the base layer's."""

    def merged_weight(self, layer: Any) -> Tensor:
        """The base weight with the adapter folded in: float32, in the base's shape."""

    def kohya(self, layer: Any) -> dict[str, Tensor]:
        """Tensors of the file for ComfyUI and A1111, by the end of their key."""

    def diffusers(self, layer: Any) -> dict[str, Tensor] | None:
        """Tensors of the file for diffusers, `alpha` among them; None if it cannot read such."""


class LayerAdapter:
    """See `Adapter`.

    Args:
        name: of the plugin.
        kind: what it does at one layer.
        wanted: (name, module) to whether it sits on such a module.
        reaches: in words, which layers it can train.
        describe: number of layers to the sentences beside the plan.
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        wanted: Wanted,
        reaches: str,
        describe: Callable[[int], Sequence[str]],
    ) -> None:
        self.name, self.kind, self.wanted, self.reaches = name, kind, wanted, reaches
        self.describe = describe
        self.layers: dict[str, Any] = {}
        self._places: dict[str, tuple[nn.Module, str]] = {}

    def attach(self, family: Family, rates: Mapping[str, float]) -> dict[str, Trained]:
        """Wrap every wanted layer whose weight has a rate; the output is unchanged."""
        trained: dict[str, Trained] = {}
        for _, network, paths in chosen_layers(family, rates, self.wanted):
            if not paths:
                continue
            with torch.random.fork_rng(devices=[]):  # building a layer may draw
                self.kind.wrap(network, paths)
            for name, path in paths.items():
                layer = network.get_submodule(name)
                self.layers[path], self._places[path] = layer, (network, name)
                with torch.no_grad():
                    self.kind.draw(path, layer)
                for end, parameter in self.kind.parameters(layer).items():
                    trained[f"{path}.{end}"] = Trained(f"{path}.weight", parameter)
        return trained

    def begin_step(self, seed: int, samples_seen: int) -> None:
        """Tell the layers that go by the clock."""
        for layer in self.layers.values():
            if isinstance(layer, Adapted):
                layer.begin_step(seed, samples_seen)

    def notes(self) -> list[str]:
        """What the user should know about it."""
        return list(self.describe(len(self.layers)))

    def kohya_tensors(self) -> dict[str, dict[str, Tensor]]:
        """By canonical module path, then by the end of the key."""
        return {path: self.kind.kohya(layer) for path, layer in self.layers.items()}

    def diffusers_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The same for diffusers.

        Raises:
            UserError: diffusers reads no adapters of this kind.
        """
        found = {}
        for path, layer in self.layers.items():
            tensors = self.kind.diffusers(layer)
            if tensors is None:
                raise UserError(
                    f"diffusers has no spelling for what adapter {self.name} did at {path}",
                    "It reads LoRA, convolutions without Tucker, and DoRA. Use lora-kohya, or "
                    "single-file or diffusers for the merged model.",
                )
            found[path] = tensors
        return found

    def save(self, family: Family, path: Path) -> list[Path]:
        """Write the adapter for ComfyUI and A1111, and for diffusers where it reads such."""
        path.mkdir(parents=True, exist_ok=True)
        written = [write_kohya(path / KOHYA_FILE, self.kohya_tensors(), family)]
        if all(self.kind.diffusers(layer) is not None for layer in self.layers.values()):
            written.insert(0, write_diffusers(path / DIFFUSERS_FILE, self.diffusers_tensors()))
        return written

    @contextmanager
    def taken_out(self) -> Iterator[None]:
        """The bare base layers in the networks for a while."""
        for path, (network, name) in self._places.items():
            put(network, name, self.layers[path].get_submodule("base_layer"))
        try:
            yield
        finally:
            for path, (network, name) in self._places.items():
                put(network, name, self.layers[path])

    def merge(self, family: Family) -> None:
        """Fold the adapter into the base weights and take it out of the networks."""
        for path, layer in self.layers.items():
            base = layer.get_submodule("base_layer")
            with torch.no_grad():
                base.weight.copy_(self.kind.merged_weight(layer))
            network, name = self._places[path]
            put(network, name, base)
            vars(network).pop("peft_config", None)  # peft's mark; diffusers would write it
        self.layers = {}


def put(network: nn.Module, name: str, module: nn.Module) -> None:
    """Set a module of a network by its dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


class Adapted(nn.Module):
    """A linear layer or convolution with an adapter of our own around it.

    A subclass fills `adapter` and says what the weight has become.

    Args:
        base: the layer; its own tensors stay as they are.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base
        self.adapter = nn.ParameterDict()

    @property
    def weight(self) -> Tensor:
        """The base layer's, for code that asks a layer for its dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        return self.base_layer.bias

    def add(self, key: str, *shape: int) -> None:
        """Give the layer a trained float32 tensor of zeros, on the base's device."""
        zeros = torch.zeros(shape, dtype=torch.float32, device=self.base_layer.weight.device)
        self.adapter[key] = nn.Parameter(zeros)

    def draw(self, path: str) -> None:
        """Set the first values; zeros unless a subclass says otherwise."""

    def begin_step(self, seed: int, samples_seen: int) -> None:
        """Learn where the clock stands; only some kinds care."""

    def merged_weight(self) -> Tensor:
        """The base weight with the adapter folded in, float32."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The base layer with the weight as it has become."""
        with torch.autocast(x.device.type, enabled=False):
            weight = self.merged_weight()
        return run(self.base_layer, x, weight, self.base_layer.bias)

    def kohya(self) -> dict[str, Tensor]:
        """Tensors of the file for ComfyUI and A1111, by the end of their key."""
        raise NotImplementedError

    def diffusers(self) -> dict[str, Tensor] | None:
        """Tensors of the file for diffusers; None if it cannot read such."""
        return None


def run(base: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a layer does, with another weight: a matrix product or the base's own convolution."""
    if not isinstance(base, nn.Conv2d):
        return nn.functional.linear(x, weight, bias)
    geometry: Any = (base.stride, base.padding, base.dilation)
    return nn.functional.conv2d(x, weight, bias, *geometry)


class OwnKind:
    """`Kind` for a subclass of `Adapted`.

    Args:
        make: (base layer, canonical path) to the layer.
    """

    def __init__(self, make: Callable[[Any, str], Adapted]) -> None:
        self.make = make

    def wrap(self, network: nn.Module, paths: Mapping[str, str]) -> None:
        """Put the layers in place."""
        for name, path in paths.items():
            put(network, name, self.make(network.get_submodule(name), path))

    def parameters(self, layer: Adapted) -> dict[str, nn.Parameter]:
        """What the layer filled its `adapter` with."""
        return dict(layer.adapter.items())

    def draw(self, path: str, layer: Adapted) -> None:
        """The layer's own."""
        layer.draw(path)

    def merged_weight(self, layer: Adapted) -> Tensor:
        """The layer's own."""
        return layer.merged_weight()

    def kohya(self, layer: Adapted) -> dict[str, Tensor]:
        """The layer's own."""
        return layer.kohya()

    def diffusers(self, layer: Adapted) -> dict[str, Tensor] | None:
        """The layer's own."""
        return layer.diffusers()
