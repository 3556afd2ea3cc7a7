"""One spelling for what other files call otherwise: canonical paths of tensors, by names alone.

The way back from `single_file_keys` and `lora_keys`, without a network or its configuration: what
a name leaves open, the other names of the file tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sdtrain.formats import single_file_keys as keys
from sdtrain.formats.adapter_weights import OTHER_NAMES, PEFT_LENGTHS, split_key
from sdtrain.paths import WRAPPERS

_LAYERS = (2, 1, 3, 4)
"""Layers of a UNet's block: the first that fits the names; published models have two."""
_TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.")
_KOHYA_PARTS = {
    "lora_unet_": "unet.",
    "lora_te_": "text_encoder.",
    "lora_te1_": "text_encoder.",
    "lora_te2_": "text_encoder_2.",
}
_WORDS = (
    *("down_blocks", "up_blocks", "mid_block", "input_blocks", "output_blocks", "middle_block"),
    *("transformer_blocks", "proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out"),
    *("conv_norm_out", "conv_in", "conv_out", "conv_shortcut", "skip_connection"),
    *("time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2"),
    *("time_embed", "label_emb", "in_layers", "out_layers", "emb_layers"),
    *("text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("final_layer_norm", "layer_norm1", "layer_norm2", "token_embedding", "position_embedding"),
)
"""Words with an underscore of their own, which kohya's names write like a dot."""
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers called them until 0.18, as in the published folders of SD 1.5."""
_BLOCKS = "oft_blocks"
_IN_CHECKPOINTS = {
    "down": "lora_down.weight",
    "mid": "lora_mid.weight",
    "up": "lora_up.weight",
    "magnitude": "dora_scale",
    "free": _BLOCKS,
}
"""Ends of our checkpoints' paths, and what files for others call the same."""


def canonical_entries(names: Iterable[str]) -> list[keys.Entry]:
    """What the tensors of a model or an adapter are, whoever wrote it.

    Args:
        names: of all tensors; in a diffusers folder with the part in front.

    Returns:
        one entry each, in order; a name of no known spelling stands for itself.
    """
    names = list(names)
    plain = [plain_key(name) for name in names]
    shape = _Shape(plain)
    found = []
    for name, known in zip(names, plain, strict=True):
        sources, layout = _sources(known, shape)
        found.append(keys.Entry(name, sources, layout))
    return found


def plain_key(key: str) -> str:
    """A key without wrappers, and with the prefix of text encoders that some tools leave out."""
    key = "." + key
    for wrapper in WRAPPERS:
        key = key.replace("." + wrapper, ".")
    key = key[1:]
    for prefix in (keys.ONE_ENCODER, keys.FIRST_ENCODER, *_TEXT_ENCODERS):
        rest = key.removeprefix(prefix)
        if rest != key and rest.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
            return f"{prefix}text_model.{rest}"
    return key


def pieces(tensor: Tensor, entry: keys.Entry) -> list[Tensor]:
    """The pieces of one tensor of a file, in the order of the entry's sources."""
    if entry.layout == "rows":
        return list(tensor.chunk(len(entry.sources)))
    if entry.layout == "skew":
        return [_upper_triangles(tensor - tensor.mT)]
    return [tensor.t() if entry.layout == "transposed" else tensor]


def _upper_triangles(blocks: Tensor) -> Tensor:
    """The numbers above the diagonals of (…, b, b): (…, b(b-1)/2), as checkpoints hold them."""
    side = blocks.shape[-1]
    rows, columns = torch.triu_indices(side, side, 1)
    return blocks[..., rows, columns]


class _Shape:
    """What the names of a file say about its networks.

    Args:
        names: all of them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        unet = [name.removeprefix(keys.UNET) for name in names if name.startswith(keys.UNET)]
        unet += [_dotted(name) for name in names if name.startswith("lora_unet_")]
        self.layers = next((n for n in _LAYERS if _fits(unet, n)), _LAYERS[0])
        levels = re.compile(rf"{re.escape(keys.VAE)}decoder\.up\.(\d+)\.")
        self.vae_levels = 1 + max((int(m[1]) for m in map(levels.match, names) if m), default=0)


def _fits(names: Iterable[str], layers: int) -> bool:
    """Whether in a UNet with so many layers a block every resize, and nothing else, ends one."""
    for name in names:
        found = re.match(r"input_blocks\.(\d+)\.\d+\.(op\.)?", name)
        ends = found is not None and int(found[1]) % (layers + 1) == 0
        if found and found[1] != "0" and ends != bool(found[2]):
            return False
    return True


def _sources(name: str, shape: _Shape) -> tuple[tuple[str, ...], keys.Layout]:
    """Canonical paths of one tensor, and how they lie in it."""
    for prefix in (keys.ONE_ENCODER, keys.FIRST_ENCODER):
        if name.startswith(prefix):
            return (f"text_encoder.{name.removeprefix(prefix)}",), "same"
    if name.startswith(keys.SECOND_ENCODER):
        return keys.open_clip_sources(name.removeprefix(keys.SECOND_ENCODER))
    if name.startswith(keys.UNET):
        inside = name.removeprefix(keys.UNET)
        return (f"unet.{keys.unet_name(inside, shape.layers)}",), "same"
    if name.startswith(keys.VAE):
        inside = name.removeprefix(keys.VAE)
        return (f"vae.{keys.vae_name(inside, shape.vae_levels)}",), "same"
    stem, end = split_key(name)
    if end in OTHER_NAMES or end in PEFT_LENGTHS or name.startswith(tuple(_KOHYA_PARTS)):
        end = "dora_scale" if end in PEFT_LENGTHS else OTHER_NAMES.get(end, end)
        return (f"{_module(stem, shape)}.{end}",), "skew" if end == _BLOCKS else "same"
    if end in _IN_CHECKPOINTS:
        return (f"{stem}.{_IN_CHECKPOINTS[end]}",), "same"
    old = re.fullmatch(r"(vae\..+\.attentions\.\d+)\.(\w+)\.(weight|bias)", name)
    if old and old[2] in _OLD_VAE_ATTENTION:
        return (f"{old[1]}.{_OLD_VAE_ATTENTION[old[2]]}.{old[3]}",), "same"
    return (name,), "same"


def _module(stem: str, shape: _Shape) -> str:
    """Canonical path of the module that an adapter's key begins with."""
    prefix = next(filter(stem.startswith, _KOHYA_PARTS), "")
    if not prefix:
        return plain_key(stem)
    name = _dotted(stem)
    if prefix == "lora_unet_":
        name = keys.unet_name(f"{name}.weight", shape.layers).removesuffix(".weight")
    return _KOHYA_PARTS[prefix] + name


def _dotted(key: str) -> str:
    """A name of kohya's with its dots, without the part."""
    stem, _, end = key.partition(".")
    prefix = next(filter(stem.startswith, _KOHYA_PARTS))
    words = "|".join(sorted(_WORDS, key=len, reverse=True))
    name = re.sub(rf"({words})(?=_|$)|_", lambda m: m[1] or ".", stem.removeprefix(prefix))
    return f"{name}.{end}" if end else name
