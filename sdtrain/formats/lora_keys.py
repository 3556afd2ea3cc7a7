"""How adapter tensors are called: by diffusers and peft, and by kohya's tools, ComfyUI and A1111.

Keys are built from canonical module paths, never from live names, so they do not depend on the
installed transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sdtrain.formats.single_file_keys import unet_key
from sdtrain.formats.tensor_files import save_tensors

Modules = Mapping[str, Mapping[str, Tensor]]
"""Canonical module path to its tensors by the end of their key, such as `lora_down.weight`."""
ALPHA = "alpha"
MAGNITUDE = "lora_magnitude_vector"


def write_diffusers(path: Path, modules: Modules, about: Mapping[str, str] | None = None) -> Path:
    """Write `unet.….lora_A.weight`, with alpha in the metadata, where diffusers looks for it."""
    tensors = {}
    settings: dict[str, Any] = {}
    for module, ends in modules.items():
        for end, tensor in ends.items():
            if end != ALPHA:
                # peft drops `.weight` of this one; the loader of transformers 5 wants it back.
                weight = ".weight" if end == MAGNITUDE and module.startswith("text") else ""
                tensors[f"{module}.{end}{weight}"] = _plain(tensor)
        part, _, name = module.partition(".")
        settings[f"{part}.r"] = ends["lora_A.weight"].shape[0]
        settings[f"{part}.lora_alpha"] = float(ends[ALPHA])
        if MAGNITUDE in ends:
            settings[f"{part}.use_dora"] = True
        # peft matches ends of live names, which lack the prefix under transformers 5.
        targets = settings.setdefault(f"{part}.target_modules", [])
        targets.append(name.removeprefix("text_model."))
    own = {"lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
    save_tensors(path, tensors, {**(about or {}), **own})
    return path


def write_kohya(
    path: Path, modules: Modules, family: Any, about: Mapping[str, str] | None = None
) -> Path:
    """Write `lora_unet_….lora_down.weight`, `.alpha` and what else the adapter has."""
    has_two_encoders = "text_encoder_2" in family.parts
    config = family.parts["unet"].config
    tensors = {}
    for module, ends in modules.items():
        stem = kohya_stem(module, has_two_encoders=has_two_encoders, unet_config=config)
        for end, tensor in ends.items():
            tensors[f"{stem}.{end}"] = _plain(tensor)
    save_tensors(path, tensors, about or {})
    return path


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, without a history, sharing memory with no other tensor of the file."""
    return tensor.detach().to("cpu").contiguous().clone()


def kohya_stem(module: str, *, has_two_encoders: bool, unet_config: Mapping[str, Any]) -> str:
    """The beginning of the keys of one module.

    With two text encoders (SDXL) the UNet's blocks have their names from the original code, such
    as `lora_unet_input_blocks_4_1_…`; with one (SD 1.5) they have diffusers' own.

    Args:
        module: canonical module path.
        has_two_encoders: whether the model has `text_encoder_2`.
        unet_config: `layers_per_block` and `up_block_types` count.
    """
    part, _, name = module.partition(".")
    if part == "unet":
        if has_two_encoders:
            name = unet_key(f"{name}.weight", unet_config).removesuffix(".weight")
        return f"lora_unet_{name.replace('.', '_')}"
    prefix = {"text_encoder": "te1" if has_two_encoders else "te", "text_encoder_2": "te2"}[part]
    return f"lora_{prefix}_{name.replace('.', '_')}"
