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
from sdtrain.formats.adapter_weights import (
    KINDS,
    Ends,
    NoSuchKindError,
    changed,
    plain_name,
    split_key,
)
from sdtrain.formats.lora_keys import kohya_stem
from sdtrain.formats.tensor_files import is_safetensors, is_single_file, read_names

Kind = Literal["checkpoint", "model", "adapter"]
MODEL_INDEX = "model_index.json"
ADAPTER_FILES = ("pytorch_lora_weights.safetensors", "lora-kohya.safetensors")
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
    if not path.is_file() or not is_single_file(str(path)) or not is_safetensors(path):
        return None
    names = read_names(path)
    return path if names and all(_is_adapter_key(name) for name in names) else None


def _is_adapter_key(name: str) -> bool:
    return name.endswith(".alpha") or any(mark in name for mark in _MARKS)


@contextmanager
def with_adapter(family: Any, places: Mapping[str, nn.Parameter], path: Path) -> Iterator[None]:
    """An adapter folded into the base weights; they come back bit for bit afterwards.

    Args:
        family: names the modules.
        places: parameters of the base model by canonical path.
        path: file or folder.

    Raises:
        DataError: it is of another model, or of a kind that is not known.
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
    """What an adapter adds to each base weight and bias, by its canonical path, float32."""
    file = adapter_file(path)
    assert file is not None, "kind_of said so"
    modules, settings = _modules(file)
    stems = _stems(family, places)
    deltas: dict[str, Tensor] = {}
    misfits: dict[str, str] = {}
    for stem, ends in modules.items():
        target = stems.get(stem)
        if target is None:
            misfits |= {f"{stem}.{end}": "this model has no such layer" for end in ends}
            continue
        first = min(ends)
        try:
            deltas |= _of_module(target, ends, places, settings)
        except NoSuchKindError as error:
            misfits[f"{stem}.{first}"] = str(error)
            continue
        misfits |= {f"{stem}.{end}": f"only {KINDS} can be read here" for end in ends}
    if misfits or not deltas:
        raise _misfit(file, misfits)
    return deltas


def _modules(file: Path) -> tuple[dict[str, Ends], dict[str, Any]]:
    """Tensors of a file by module and plain end, and what its metadata says about alpha."""
    from safetensors import safe_open

    modules: dict[str, Ends] = {}
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        for key in opened.keys():  # noqa: SIM118
            stem, end = split_key(key)
            plain, tensor = plain_name(end, opened.get_tensor(key))
            modules.setdefault(stem, {})[plain] = tensor
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise DataError(f"{file}: its lora_adapter_metadata is damaged: {error}") from None
    return modules, dict(settings)


def _of_module(
    target: str, ends: Ends, places: Mapping[str, nn.Parameter], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """What the tensors of one module change: its weight, its bias, or both."""
    found: dict[str, Tensor] = {}
    bias = target.removesuffix("weight") + "bias"
    for end in ("diff_b", "b_norm"):
        if end not in ends:
            continue
        if bias not in places or places[bias].shape != ends[end].shape:
            raise NoSuchKindError(f"the layer has no bias of {tuple(ends[end].shape)}")
        found[bias] = ends.pop(end).float()
    if ends:
        alpha = _alpha(settings, target.removesuffix(".weight"), ends)
        base = places[target].detach().float()
        found[target] = changed(base, ends, alpha) - base
    return found


def _alpha(settings: Mapping[str, Any], module: str, ends: Ends) -> float | None:
    """Alpha of one layer by diffusers' metadata, as it would stand beside the tensors."""
    part, _, name = module.partition(".")
    alpha = settings.get(f"{part}.lora_alpha")
    for pattern, special in (settings.get(f"{part}.alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):  # as peft reads it
            alpha = special
            break
    if alpha is None or "lora_down.weight" not in ends:
        return None
    rank = len(ends["lora_down.weight"])
    # Rank-stabilized: over the root of the rank.
    return float(alpha) * (math.sqrt(rank) if settings.get(f"{part}.use_rslora") else 1.0)


def _stems(family: Any, places: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Every beginning of adapter keys to the weight it stands for, in all spellings."""
    found: dict[str, str] = {}
    two = "text_encoder_2" in family.parts
    config = family.parts["unet"].config
    for path in places:
        if not path.endswith(".weight"):
            continue
        module = path.removesuffix(".weight")
        found[module] = path
        found[module.replace(".text_model.", ".")] = path
        try:
            found[kohya_stem(module, has_two_encoders=two, unet_config=config)] = path
        except (AssertionError, KeyError, ValueError):  # the VAE has no name there
            continue
        found[kohya_stem(module, has_two_encoders=False, unet_config=config)] = path
    return found


def _misfit(file: Path, misfits: Mapping[str, str]) -> DataError:
    names = sorted(misfits)
    shown = ", ".join(names[:_SHOWN])
    why = misfits[names[0]] if names else "there is nothing in it"
    return DataError(
        f"{file} cannot be put on this model: {len(names)} tensors do not fit, such as {shown}: "
        f"{why}",
        "Use the recipe of its base model; adapters of other kinds need a checkpoint of their run.",
    )
