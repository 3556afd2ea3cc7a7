"""Canonical parameter paths: the same words whatever wraps a network or loaded it."""

from __future__ import annotations

from torch import nn

WRAPPERS = ("_orig_mod.", "module.", "base_model.model.", "base_layer.")
ADAPTER_MARKS = (".lora_", ".hada_", ".lokr_", ".adapter.")


def canonical_path(part: str, network: nn.Module, live_name: str) -> str:
    """The path that rules, files and printed tables use for one parameter or module.

    transformers 5 drops `text_model.` from CLIPTextModel and keeps it for
    CLIPTextModelWithProjection; here it is always there.

    Args:
        part: the network's name in the family, such as `text_encoder`.
        network: the network itself.
        live_name: what `network.named_parameters()` calls it.
    """
    name = "." + live_name
    for wrapper in WRAPPERS:
        name = name.replace("." + wrapper, ".")
    name = name[1:]
    if is_clip_text(network) and not name.startswith(("text_model.", "text_projection.")):
        name = "text_model." + name
    return f"{part}.{name}"


def is_clip_text(network: nn.Module) -> bool:
    """Whether a network is one of CLIP's text encoders, wrapped or not."""
    inner = getattr(network, "_orig_mod", network)
    return type(getattr(inner, "module", inner)).__name__.startswith("CLIPText")


def is_adapter(live_name: str) -> bool:
    """Whether a live name belongs to an adapter beside a base weight: one of peft's or ours."""
    return any(mark in live_name for mark in ADAPTER_MARKS)
