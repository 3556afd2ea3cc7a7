"""How LoRA tensors are called: by diffusers and peft, and by kohya's tools, ComfyUI and A1111.

Keys are built from canonical module paths, never from live names, so they do not depend on the
installed transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Pairs = Mapping[str, tuple[Tensor, ...]]
"""Canonical module path to its inner (rank, in) and outer (out, rank) matrix."""


def write_diffusers(
    path: Path, pairs: Pairs, alpha: float, about: Mapping[str, str] | None = None
) -> Path:
    """Write `unet.….lora_A.weight`, with alpha in the metadata, where diffusers looks for it."""
    from safetensors.torch import save_file

    tensors = {}
    settings: dict[str, Any] = {}
    for module, (down, up) in pairs.items():
        tensors[f"{module}.lora_A.weight"] = down
        tensors[f"{module}.lora_B.weight"] = up
        part, _, name = module.partition(".")
        settings[f"{part}.r"] = down.shape[0]
        settings[f"{part}.lora_alpha"] = alpha
        # peft matches ends of live names, which lack the prefix under transformers 5.
        targets = settings.setdefault(f"{part}.target_modules", [])
        targets.append(name.removeprefix("text_model."))
    own = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
    save_file(tensors, str(path), metadata={**(about or {}), **own})
    return path


def write_kohya(
    path: Path,
    pairs: Pairs,
    alpha: float,
    family: Any,
    about: Mapping[str, str] | None = None,
) -> Path:
    """Write `lora_unet_….lora_down.weight`, `.lora_up.weight` and `.alpha`."""
    from safetensors.torch import save_file

    has_two_encoders = "text_encoder_2" in family.parts
    layers = getattr(family.parts["unet"], "config", {}).get("layers_per_block", 2)
    tensors = {}
    for module, (down, up) in pairs.items():
        stem = kohya_stem(module, has_two_encoders=has_two_encoders, layers_per_block=layers)
        tensors[f"{stem}.lora_down.weight"] = down
        tensors[f"{stem}.lora_up.weight"] = up
        tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, str(path), metadata={**(about or {}), "format": "pt"})
    return path


def kohya_stem(module: str, *, has_two_encoders: bool, layers_per_block: int = 2) -> str:
    """The beginning of the keys of one module.

    With two text encoders (SDXL) the UNet's blocks have their names from the original code, such
    as `lora_unet_input_blocks_4_1_…`; with one (SD 1.5) they have diffusers' own.

    Args:
        module: canonical module path.
        has_two_encoders: whether the model has `text_encoder_2`.
        layers_per_block: of the UNet.
    """
    part, _, name = module.partition(".")
    if part == "unet":
        if has_two_encoders:
            name = _original_block(name, layers_per_block)
        return f"lora_unet_{name.replace('.', '_')}"
    prefix = {"text_encoder": "te1" if has_two_encoders else "te", "text_encoder_2": "te2"}[part]
    return f"lora_{prefix}_{name.replace('.', '_')}"


def _original_block(name: str, layers_per_block: int) -> str:
    """Name an attention of the UNet as the original code does; each down block ends in a resize."""
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", name)
    if found:
        side, block, layer, rest = found.groups()
        position = int(block) * (layers_per_block + 1) + int(layer)
        if side == "down":
            return f"input_blocks.{position + 1}.1.{rest}"
        return f"output_blocks.{position}.1.{rest}"
    rest = name.removeprefix("mid_block.attentions.0.")
    assert rest != name, f"{name} is no part of an attention"
    return f"middle_block.1.{rest}"
