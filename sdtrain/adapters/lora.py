"""LoRA: two thin matrices beside each chosen linear layer; the base stays as it is.

Source: arXiv:2106.09685. The layers are peft's; which modules get one, at which rate, and the
first values of the matrices are decided here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from sdprep.recipe import Section
from sdtrain.adapter import Trained
from sdtrain.family import Family
from sdtrain.formats.lora_keys import write_diffusers, write_kohya
from sdtrain.noise import uniform_for
from sdtrain.paths import canonical_path

# The last names of the linear layers of a transformer block: in UNets, then in CLIP.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2")
PEFT_NAME = "default"


class Config(Section):
    """LoRA."""

    type: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, le=1024, description="Inner width of the two matrices.")
    alpha: float = Field(
        1.0, gt=0, description="Output is scaled by alpha / rank; 1 keeps the rate rank-free."
    )
    targets: Literal["attention", "attention+ff"] = Field(
        "attention+ff", description="Which linear layers of a transformer block get one."
    )
    seed: int = Field(0, description="Keys the first values of the inner matrices.")

    def build(self) -> Lora:
        """The adapter."""
        return Lora(self)


class Lora:
    """See `Adapter`."""

    name = "lora"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.num_modules = 0

    @property
    def scale(self) -> float:
        """What the product of the matrices is multiplied by."""
        return self.config.alpha / self.config.rank

    def attach(self, family: Family, rates: Mapping[str, float]) -> dict[str, Trained]:
        """Put the matrices beside every target whose weight has a rate; the output is unchanged."""
        from peft import LoraConfig, inject_adapter_in_model

        trained: dict[str, Trained] = {}
        for part in family.trainable_parts:
            network = family.parts[part]
            chosen = [
                name
                for name, module in network.named_modules()
                if isinstance(module, nn.Linear) and self._is_target(name)
                if canonical_path(part, network, f"{name}.weight") in rates
            ]
            if not chosen:
                continue
            options = LoraConfig(
                r=self.config.rank,
                lora_alpha=self.config.alpha,  # type: ignore[arg-type]
                target_modules=chosen,
                init_lora_weights=False,  # `_draw` does it, keyed
            )
            with torch.random.fork_rng(devices=[]):  # building a layer draws
                inject_adapter_in_model(options, network, adapter_name=PEFT_NAME)
            self._freeze_base(network)
            trained |= self._draw(part, network)
        self.num_modules = len(trained) // 2
        return trained

    def _is_target(self, name: str) -> bool:
        ends = ATTENTION if self.config.targets == "attention" else ATTENTION + FEED_FORWARD
        return f".{name}".endswith(tuple(f".{end}" for end in ends))

    @staticmethod
    def _freeze_base(network: nn.Module) -> None:
        for name, parameter in network.named_parameters():
            if ".lora_" not in name:
                parameter.requires_grad_(False)

    def _draw(self, part: str, network: nn.Module) -> dict[str, Trained]:
        trained = {}
        for path, layer in lora_layers(part, network):
            down, up = matrices(layer)
            bound = 1 / math.sqrt(down.shape[1])  # kaiming_uniform with a = √5, as torch and peft
            with torch.no_grad():
                draw = uniform_for(self.config.seed, "lora", path, down.shape)
                down.copy_((2 * draw - 1) * bound)
                up.zero_()
            trained[f"{path}.lora_A.weight"] = Trained(f"{path}.weight", down)
            trained[f"{path}.lora_B.weight"] = Trained(f"{path}.weight", up)
        return trained

    def notes(self) -> list[str]:
        """What the rate would be at other choices of alpha."""
        rank, alpha = self.config.rank, self.config.alpha
        factor = math.sqrt(rank / alpha)
        return [
            f"lora: {self.num_modules} layers, rank {rank}, alpha {alpha:g}, scale {self.scale:g}; "
            f"a rate lr here acts like lr / {factor:.3g} at alpha = rank"
        ]

    def save(self, family: Family, path: Path) -> list[Path]:
        """Write the adapter for diffusers and, as `…-kohya`, for ComfyUI and A1111."""
        path.mkdir(parents=True, exist_ok=True)
        pairs = {
            module_path: tuple(matrix.detach().to("cpu").contiguous() for matrix in matrices(layer))
            for part in family.trainable_parts
            for module_path, layer in lora_layers(part, family.parts[part])
        }
        alpha = self.config.alpha
        return [
            write_diffusers(path / "pytorch_lora_weights.safetensors", pairs, alpha),
            write_kohya(path / "lora-kohya.safetensors", pairs, alpha, family),
        ]

    def merge(self, family: Family) -> None:
        """Fold scale · up · down into the base weights and take the matrices out."""
        for part in family.trainable_parts:
            network = family.parts[part]
            for live_name, layer in _live_layers(network):
                layer.merge(adapter_names=[PEFT_NAME])
                parent, _, child = live_name.rpartition(".")
                setattr(network.get_submodule(parent), child, layer.get_base_layer())


def _live_layers(network: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, m) for name, m in network.named_modules() if isinstance(m, LoraLayer)]


def lora_layers(part: str, network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every layer with an adapter, by the canonical path of its module."""
    for name, layer in _live_layers(network):
        yield canonical_path(part, network, name), layer


def matrices(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """The inner (rank, in) and the outer (out, rank) matrix of one layer."""
    return layer.lora_A[PEFT_NAME].weight, layer.lora_B[PEFT_NAME].weight
