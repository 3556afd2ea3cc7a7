"""The published sizes of Stable Diffusion, for single files, which do not carry their own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from sdtrain.families._tiny import PAD_TOKENS
from sdtrain.formats.diffusers import copy_tokenizer

SD15_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_CLIP: dict[str, Any] = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
CLIP_L: dict[str, Any] = {
    **_CLIP,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "pad_token_id": 49407,
}
CLIP_BIG_G: dict[str, Any] = {
    **_CLIP,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}


def vae_config(sample_size: int, scaling_factor: float) -> dict[str, Any]:
    """The autoencoder; both families have the same, with another scale of the latents."""
    return {
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
    }


SD15: dict[str, dict[str, Any]] = {
    "unet": SD15_UNET,
    "vae": vae_config(512, 0.18215),
    "text_encoder": CLIP_L,
}
SDXL: dict[str, dict[str, Any]] = {
    "unet": SDXL_UNET,
    "vae": vae_config(1024, 0.13025),
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_BIG_G,
}


def standard_tokenizers(parts: Iterable[str]) -> dict[str, Any]:
    """CLIP's vocabulary, which ships with the project, padded as each encoder was trained."""
    from transformers import CLIPTokenizer

    names = [p.replace("text_encoder", "tokenizer") for p in parts if p.startswith("text_encoder")]
    made = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            with as_file(files("sdprep") / "data" / "clip_tokenizer") as source:
                copy_tokenizer(source, Path(scratch) / name, PAD_TOKENS[name])
            made[name] = CLIPTokenizer.from_pretrained(str(Path(scratch) / name))
    return made


def standard_scheduler() -> Any:
    """The noise schedule of both families; markers of the file may change what it predicts."""
    import diffusers

    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
