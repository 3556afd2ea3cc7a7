"""A tiny Stable Diffusion folder: real classes and vocabulary, few channels, keyed weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdprep.seeding import rng_for
from sdtrain.families._tiny_vae import VAE_CONFIG, set_codec_weights
from sdtrain.formats.diffusers import Folder, copy_tokenizer
from sdtrain.paths import canonical_path

VOCABULARY = 49408
TEXT_WIDTH = 32
SIDE_LATENTS = 16
TOKEN_STD = 0.5
POSITION_STD = 0.1
CHANNELS = (32, 64)
PAD_TOKENS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}


@dataclass(frozen=True)
class TinySizes:
    """What differs between the tiny models of this line.

    Args:
        pipeline: name of the diffusers pipeline.
        scaling_factor: of the latents.
        text_encoders: class names of `text_encoder`, `text_encoder_2`.
        unet: options of the UNet beyond the common ones.
    """

    pipeline: str
    scaling_factor: float
    text_encoders: tuple[str, ...]
    unet: Mapping[str, Any]


def write_tiny_folder(path: Path, sizes: TinySizes, seed: int, scheduler: Any) -> None:
    """Write the model; equal arguments give equal bytes."""
    from transformers import CLIPTokenizer

    networks = _networks(sizes)
    for part, network in networks.items():
        if part != "vae":
            draw_weights(part, network, seed)
    set_codec_weights(networks["vae"], sizes.scaling_factor)
    tokenizers = {}
    for name in list(PAD_TOKENS)[: len(sizes.text_encoders)]:
        with as_file(files("sdprep") / "data" / "clip_tokenizer") as source:
            copy_tokenizer(source, path / name, PAD_TOKENS[name])
        tokenizers[name] = CLIPTokenizer.from_pretrained(str(path / name))
    folder = Folder(sizes.pipeline, networks, tokenizers, scheduler, {})
    folder.save(path)


def _networks(sizes: TinySizes) -> dict[str, nn.Module]:
    import diffusers
    import transformers

    width = TEXT_WIDTH * len(sizes.text_encoders)
    with torch.random.fork_rng(devices=[]):  # building draws weights that are replaced below
        networks: dict[str, Any] = {
            "unet": diffusers.UNet2DConditionModel(
                sample_size=SIDE_LATENTS,
                block_out_channels=CHANNELS,
                layers_per_block=1,
                cross_attention_dim=width,
                norm_num_groups=8,
                **sizes.unet,
            ),
            "vae": diffusers.AutoencoderKL(**VAE_CONFIG, scaling_factor=sizes.scaling_factor),
        }
        for index, class_name in enumerate(sizes.text_encoders):
            part = "text_encoder" if index == 0 else f"text_encoder_{index + 1}"
            config = _text_config(is_second=index > 0)
            networks[part] = getattr(transformers, class_name)(config)
    return networks


def _text_config(*, is_second: bool) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="gelu" if is_second else "quick_gelu",
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=0 if is_second else 49407,
    )


def draw_weights(part: str, network: nn.Module, seed: int) -> None:
    """Replace every weight by a keyed draw of its own.

    Matrices and kernels get the standard deviation of torch's own initialisation, norms start as
    the identity, biases at zero.
    """
    for name, parameter in network.named_parameters():
        path = canonical_path(part, network, name)
        with torch.no_grad():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            draw = rng_for(seed, "tiny", path).standard_normal(tuple(parameter.shape), "float32")
            parameter.copy_(torch.from_numpy(draw) * _std(path, parameter))


def _std(path: str, parameter: nn.Parameter) -> float:
    if path.endswith("token_embedding.weight"):
        return TOKEN_STD
    if path.endswith("position_embedding.weight"):
        return POSITION_STD
    fan_in = parameter[0].numel()
    return (3 * fan_in) ** -0.5
