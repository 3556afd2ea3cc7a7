"""Checkpoints that this program did not save: models in other files, adapters on a base."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdprep.errors import DataError
from sdtrain import checkpoint
from sdtrain.formats.lora_keys import kohya_stem
from sdtrain.formats.single_file import is_single_file

Kind = Literal["checkpoint", "model", "adapter"]
MODEL_INDEX = "model_index.json"
ADAPTER_FILES = ("pytorch_lora_weights.safetensors", "lora-kohya.safetensors")
# The two matrices of a LoRA by the ends of their keys: kohya's, peft's, and older diffusers'.
PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
)
ALPHA = ".alpha"
_MARKS = ("lora_", "hada_", "lokr_", "oft_", "dora_", ".lora.", "ia3")
_SHOWN = 3


def kind_of(path: Path) -> Kind:
    """What a path holds: a checkpoint of ours, a whole model, or an adapter.

    Raises:
        DataError: none of them.
    """
    if (path / checkpoint.STATE).is_file():
        return "checkpoint"
    if (path / MODEL_INDEX).is_file():
        return "model"
    file = adapter_file(path)
    if file is not None:
        return "adapter"
    if path.is_file() and is_single_file(str(path)):
        return "model"
    raise DataError(
        f"{path} is no checkpoint: it has neither {checkpoint.STATE} nor {MODEL_INDEX}, "
        "and is no model or adapter file",
        "Give RUN/checkpoints/SAMPLES, a diffusers folder, a single .safetensors file, or a LoRA.",
    )


def adapter_file(path: Path) -> Path | None:
    """The adapter that a path names: a file of one, or a folder with one; None if it is none."""
    if path.is_dir():
        return next((path / name for name in ADAPTER_FILES if (path / name).is_file()), None)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    return path if names and all(_is_adapter_key(name) for name in names) else None


def _is_adapter_key(name: str) -> bool:
    return name.endswith(ALPHA) or any(mark in name for mark in _MARKS)


@contextmanager
def with_adapter(family: Any, places: Mapping[str, nn.Parameter], path: Path) -> Iterator[None]:
    """A LoRA folded into the base weights; they come back bit for bit afterwards.

    Args:
        family: names the modules.
        places: parameters of the base model by canonical path.
        path: file or folder.

    Raises:
        DataError: it is of another model, or of a kind that only its own recipe can load.
    """
    deltas = read_deltas(family, places, path)
    before = {name: places[name].detach().clone() for name in deltas}
    try:
        with torch.no_grad():
            for name, delta in deltas.items():
                places[name].add_(delta.to(places[name].device, places[name].dtype))
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                places[name].copy_(value)


def read_deltas(family: Any, places: Mapping[str, nn.Parameter], path: Path) -> dict[str, Tensor]:
    """What a LoRA adds to each base weight, by its canonical path, float32."""
    from safetensors import safe_open

    file = adapter_file(path)
    assert file is not None, "kind_of said so"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    stems = _stems(family, places)
    deltas, used = {}, set()
    for name in tensors:
        for down_end, up_end in PAIRS:
            if not name.endswith(down_end):
                continue
            stem = name.removesuffix(down_end)
            target = stems.get(stem)
            if target is None or stem + up_end not in tensors:
                raise _misfit(file, [name], "this model has no such layer")
            used |= {name, stem + up_end, stem + ALPHA}
            pair = tensors[name].float(), tensors[stem + up_end].float()
            alpha = tensors.get(stem + ALPHA)
            scale = _scale(file, metadata, target, alpha, len(pair[0]))
            deltas[target] = scale * _product(file, *pair, shape=places[target].shape, name=name)
    left = sorted(set(tensors) - used)
    if left or not deltas:
        raise _misfit(file, left, "only plain LoRA and LoCon can be read here")
    return deltas


def _stems(family: Any, places: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Every beginning of adapter keys to the weight it stands for, in all spellings."""
    found: dict[str, str] = {}
    two = "text_encoder_2" in family.parts
    config = family.parts["unet"].config
    for path, parameter in places.items():
        if not path.endswith(".weight") or parameter.dim() not in (2, 4):
            continue
        module = path.removesuffix(".weight")
        found[module] = path
        found[module.replace(".text_model.", ".")] = path
        try:
            found[kohya_stem(module, has_two_encoders=two, unet_config=config)] = path
        except (AssertionError, KeyError):  # embeddings and the like have no name there
            continue
        found[kohya_stem(module, has_two_encoders=False, unet_config=config)] = path
    return found


def _scale(
    file: Path, metadata: Mapping[str, str], target: str, tensor: Tensor | None, rank: int
) -> float:
    """What the product of one layer is multiplied with.

    Alpha over rank. Alpha lies beside the layer, or in the metadata as diffusers and peft write it:
    for the layer, else for the part; or it is as large as the rank.
    """
    if tensor is not None:
        return float(tensor) / rank
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise DataError(f"{file}: its lora_adapter_metadata is damaged: {error}") from None
    part, _, module = target.removesuffix(".weight").partition(".")
    alpha = settings.get(f"{part}.lora_alpha", rank)
    for pattern, value in (settings.get(f"{part}.alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):  # as peft reads it
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if settings.get(f"{part}.use_rslora") else rank)


def _product(file: Path, down: Tensor, up: Tensor, *, shape: torch.Size, name: str) -> Tensor:
    product = up.flatten(1) @ down.flatten(1)
    if product.numel() != shape.numel() or product.shape[0] != shape[0]:
        raise _misfit(file, [name], f"the layer's weight is {tuple(shape)}")
    return product.reshape(shape)


def _misfit(file: Path, names: list[str], why: str) -> DataError:
    shown = ", ".join(names[:_SHOWN])
    return DataError(
        f"{file} cannot be put on this model: {len(names)} tensors do not fit, such as {shown}: "
        f"{why}",
        "Use the recipe of its base model; adapters of other kinds need a checkpoint of their run.",
    )
