"""How single files name the tensors of Stable Diffusion: pure maps over names, there and back.

Single files keep the layout of the first public code (LDM, and OpenCLIP for the second encoder of
SDXL). Every map takes the names of a network's own state dict and its configuration, so that a
network of any depth has one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

UNET = "model.diffusion_model."
VAE = "first_stage_model."
ONE_ENCODER = "cond_stage_model.transformer."
FIRST_ENCODER = "conditioner.embedders.0.transformer."
SECOND_ENCODER = "conditioner.embedders.1.model."

OPTIONAL = ("position_ids", "logit_scale", "transformer.text_projection.weight")
"""Ends of tensors of the original code that no network here needs."""

Layout = Literal["same", "kernel", "transposed", "rows", "skew"]


@dataclass(frozen=True)
class Entry:
    """One tensor of a single file.

    Args:
        key: its name there.
        sources: the canonical paths that it is made of, with the part's name in front.
        layout: `same`; `kernel`, a matrix written as a 1 by 1 convolution; `transposed`;
            `rows`, several tensors one below the other; or `skew`, of adapter files: blocks that
            stand for what is antisymmetric in them.
    """

    key: str
    sources: tuple[str, ...]
    layout: Layout = "same"


def entries(
    part: str, names: Iterable[str], config: Mapping[str, Any], *, two: bool
) -> list[Entry]:
    """Every tensor of one network.

    Args:
        part: `unet`, `vae`, `text_encoder` or `text_encoder_2`.
        names: the network's canonical names, without the part.
        config: the network's own configuration.
        two: whether the model has two text encoders.
    """
    if part == "text_encoder_2":
        return _open_clip_entries(part, list(names))
    if part == "text_encoder":
        prefix = FIRST_ENCODER if two else ONE_ENCODER
        return [Entry(prefix + name, (f"{part}.{name}",)) for name in names]
    if part == "unet":
        return [Entry(UNET + unet_key(name, config), (f"{part}.{name}",)) for name in names]
    return [_vae_entry(part, name, config) for name in names]


# --- UNet ----------------------------------------------------------------------------------------

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_key(name: str, config: Mapping[str, Any]) -> str:
    """The name of one tensor of the UNet in a single file, without its prefix.

    Args:
        name: diffusers' name.
        config: of the UNet; `layers_per_block` and `up_block_types` count.

    Raises:
        ValueError: the original layout has no such tensor.
    """
    for start, original in _UNET_ENDS.items():
        if name.startswith(f"{start}."):
            rest = name.removeprefix(f"{start}.")
            return f"{original}.{_resnet(rest) if 'resnets' in start else rest}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if not found:
        raise ValueError(f"a single file has no place for unet.{name}")
    side, block, kind, layer, rest = found.groups()
    # A down block holds its layers and a resize; an up block one layer more, which is resized too.
    start = int(block) * (config["layers_per_block"] + 1)
    position = start + int(layer) + (side == "down")
    column = 1 if kind == "attentions" else 0
    if kind == "downsamplers":
        position, rest = start + config["layers_per_block"] + 1, rest.replace("conv.", "op.", 1)
    if kind == "upsamplers":
        position = start + config["layers_per_block"]
        column = 2 if "CrossAttn" in config["up_block_types"][int(block)] else 1
    blocks = "input_blocks" if side == "down" else "output_blocks"
    if kind == "resnets":
        rest = _resnet(rest)
    return f"{blocks}.{position}.{column}.{rest}"


def _resnet(name: str) -> str:
    """A tensor's name inside a residual block."""
    word, _, kind = name.partition(".")
    return f"{_UNET_RESNET[word]}.{kind}"


def unet_name(key: str, layers: int) -> str:
    """The way back from `unet_key`: diffusers' name of a tensor; an unknown key as it is.

    Args:
        key: without its prefix.
        layers: of each down block.
    """
    for name, original in _UNET_ENDS.items():
        if key.startswith(f"{original}."):
            rest = key.removeprefix(f"{original}.")
            return f"{name}.{_resnet_back(rest) if 'resnets' in name else rest}"
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", key)
    if not found:
        return key
    is_down, column, rest = found[1] == "input", found[3], found[4]
    block, layer = divmod(int(found[2]) - is_down, layers + 1)
    side, kind = "down" if is_down else "up", "resnets" if column == "0" else "attentions"
    if is_down and layer == layers:
        kind, layer, rest = "downsamplers", 0, rest.replace("op.", "conv.", 1)
    elif column != "0" and rest.startswith("conv."):
        kind, layer = "upsamplers", 0
    elif column == "0":
        rest = _resnet_back(rest)
    return f"{side}_blocks.{block}.{kind}.{layer}.{rest}"


def _resnet_back(name: str) -> str:
    return _replaced(name, {f"{original}.": f"{word}." for word, original in _UNET_RESNET.items()})


def _replaced(name: str, words: Mapping[str, str]) -> str:
    """A name whose beginning is one of `words`, with what stands for it."""
    start = next(filter(name.startswith, words), "")
    return words[start] + name.removeprefix(start) if start else name


# --- VAE -----------------------------------------------------------------------------------------

_VAE_MID = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def vae_key(name: str, config: Mapping[str, Any]) -> str:
    """The name of one tensor of the VAE in a single file, without its prefix."""
    name = name.replace("conv_norm_out.", "norm_out.").replace("conv_shortcut.", "nin_shortcut.")
    for start, original in _VAE_MID.items():
        name = name.replace(f".{start}.", f".{original}.")
    if ".attn_1." in name:
        for word, original in _VAE_ATTENTION.items():
            name = name.replace(f".attn_1.{word}.", f".attn_1.{original}.")
    found = re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if not found:
        return name
    network, side, block, kind, layer, rest = found.groups()
    # The decoder counts from its end: the block that comes first has the highest number.
    number = int(block) if side == "down" else len(config["block_out_channels"]) - 1 - int(block)
    if kind == "resnets":
        return f"{network}.{side}.{number}.block.{layer}.{rest}"
    resize = "downsample" if side == "down" else "upsample"
    return f"{network}.{side}.{number}.{resize}.{rest}"


def vae_name(key: str, levels: int) -> str:
    """The way back from `vae_key`.

    Args:
        key: without its prefix.
        levels: how many blocks the decoder has.
    """
    name = key.replace("norm_out.", "conv_norm_out.").replace("nin_shortcut.", "conv_shortcut.")
    for start, original in _VAE_MID.items():
        name = name.replace(f".{original}.", f".{start}.")
    if ".mid_block.attentions.0." in name:
        place, _, rest = name.partition(".attentions.0.")
        back = {f"{original}.": f"{word}." for word, original in _VAE_ATTENTION.items()}
        return f"{place}.attentions.0.{_replaced(rest, back)}"
    found = re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d+)\.(\w+)\.(.+)", name)
    if not found:
        return name
    network, side, number, kind, rest = found.groups()
    block = int(number) if side == "down" else levels - 1 - int(number)
    kinds = {"block": "resnets", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}
    return f"{network}.{side}_blocks.{block}.{kinds.get(kind, kind)}.{rest}"


def _vae_entry(part: str, name: str, config: Mapping[str, Any]) -> Entry:
    is_matrix = re.search(r"\.attentions\.0\.to_\w+(\.0)?\.weight$", name) is not None
    key = VAE + vae_key(name, config)
    return Entry(key, (f"{part}.{name}",), "kernel" if is_matrix else "same")


# --- second text encoder -------------------------------------------------------------------------

_OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _open_clip_entries(part: str, names: list[str]) -> list[Entry]:
    """OpenCLIP's layout: residual blocks, one matrix for queries, keys and values."""
    made = []
    for name in names:
        found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name == "text_projection.weight":
            made.append(
                Entry(SECOND_ENCODER + "text_projection", (f"{part}.{name}",), "transposed")
            )
        elif not found:
            made.append(Entry(SECOND_ENCODER + _OPEN_CLIP[name], (f"{part}.{name}",)))
        else:
            entry = _open_clip_layer(part, *found.groups())
            if entry:
                made.append(entry)
    return made


def _open_clip_layer(part: str, layer: str, module: str, kind: str) -> Entry | None:
    """One tensor of a layer; None for keys and values, which lie below the queries."""
    block = f"{SECOND_ENCODER}transformer.resblocks.{layer}"
    live = f"{part}.text_model.encoder.layers.{layer}"
    if module in _OPEN_CLIP_LAYER:
        key = f"{block}.{_OPEN_CLIP_LAYER[module]}.{kind}"
        return Entry(key, (f"{live}.{module}.{kind}",))
    if module != "self_attn.q_proj":
        return None
    sources = tuple(f"{live}.self_attn.{each}.{kind}" for each in _PROJECTIONS)
    return Entry(f"{block}.attn.in_proj_{kind}", sources, "rows")


def open_clip_sources(key: str) -> tuple[tuple[str, ...], Layout]:
    """The way back: canonical paths of one of OpenCLIP's tensors, and how they lie in it.

    Args:
        key: without its prefix; an unknown one stands for itself.
    """
    part = "text_encoder_2"
    if key == "text_projection":
        return (f"{part}.text_projection.weight",), "transposed"
    for name, original in _OPEN_CLIP.items():
        if key == original:
            return (f"{part}.{name}",), "same"
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", key)
    if not found:
        return (f"{part}.{key}",), "same"
    layer, module, kind = found.groups()
    live = f"{part}.text_model.encoder.layers.{layer}"
    if module == "attn.in_proj":
        return tuple(f"{live}.self_attn.{each}.{kind}" for each in _PROJECTIONS), "rows"
    back = {original: name for name, original in _OPEN_CLIP_LAYER.items()}
    return (f"{live}.{back.get(module, module)}.{kind}",), "same"
