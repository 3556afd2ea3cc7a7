"""Which layers of a network an adapter may sit on, by their names and kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import nn

from sdtrain.adapter import UnsuitableError
from sdtrain.family import Family
from sdtrain.paths import canonical_path

Targets = Literal["attention", "attention+ff", "resnets", "attention+ff+resnets", "all"]
LinearTargets = Literal["attention", "attention+ff"]

# The last names of the linear layers of a transformer block: in UNets, then in CLIP.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2")
RESNET_CONVS = ("conv1", "conv2")
KEYS_AND_VALUES = ("to_k", "to_v", "k_proj", "v_proj")
FEED_FORWARD_OUT = ("ff.net.2", "mlp.fc2")
# It makes the pooled vector, and no adapter file has a key for it that every reader knows.
NEVER = ("text_projection",)

REACHES: dict[str, str] = {
    "attention": "linear layers of attentions",
    "attention+ff": "linear layers of the transformer blocks",
    "resnets": "3x3 convolutions of residual blocks",
    "attention+ff+resnets": "linear layers of the transformer blocks and convolutions of resnets",
    "all": "linear layers and convolutions",
}


def require_convolutions(key: str, targets: str) -> None:
    """Refuse an option about convolutions where no convolution gets an adapter.

    Raises:
        ValueError: `targets` names linear layers only.
    """
    if targets in ("attention", "attention+ff"):
        raise ValueError(
            f"{key} has no effect with targets = {targets!r}, which has no convolution"
        )


def ends_with(name: str, ends: tuple[str, ...]) -> bool:
    """Whether the last names of a module are one of `ends`, by whole names."""
    return f".{name}".endswith(tuple(f".{end}" for end in ends))


def is_target(targets: str, name: str, module: nn.Module) -> bool:
    """Whether a module is one of those that `targets` names.

    Args:
        targets: one of `Targets`.
        name: the module's name in its network.
        module: the module itself.
    """
    if isinstance(module, nn.Linear):
        wanted: tuple[str, ...] = ATTENTION if targets.startswith("attention") else ()
        wanted += FEED_FORWARD if "ff" in targets else ()
        return targets == "all" and not ends_with(name, NEVER) or ends_with(name, wanted)
    if isinstance(module, nn.Conv2d):
        in_resnet = ".resnets." in f".{name}" and ends_with(name, RESNET_CONVS)
        return targets == "all" or ("resnets" in targets and in_resnet)
    return False


def chosen_layers(
    family: Family, rates: Mapping[str, float], wanted: Any
) -> Iterator[tuple[str, nn.Module, dict[str, str]]]:
    """The layers of each part that get an adapter: wanted by it, with a rate by the rules.

    Args:
        family: the model.
        rates: canonical path to learning rate of every base parameter that a rule trains.
        wanted: (name, module) to whether the adapter sits on such a module.

    Yields:
        part, network, and live name to canonical path of its layers.

    Raises:
        UnsuitableError: a convolution of a kind that no adapter is right for.
    """
    for part in family.trainable_parts:
        network = family.parts[part]
        chosen = {}
        for name, module in network.named_modules():
            path = canonical_path(part, network, name)
            if f"{path}.weight" in rates and wanted(name, module):
                _require_plain(path, module)
                chosen[name] = path
        yield part, network, chosen


def _require_plain(path: str, module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d) and (module.groups != 1 or module.padding_mode != "zeros"):
        kind = f"{module.groups} groups and padding {module.padding_mode!r}"
        raise UnsuitableError(path, f"it is a convolution with {kind}; adapters need 1 and 'zeros'")
