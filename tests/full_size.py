"""The full-size UNets on the meta device: real names and shapes, no memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


@lru_cache
def sdxl_unet() -> Any:
    """Stable Diffusion XL's: 2,567,463,684 parameters in 1,680 tensors."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


@lru_cache
def sd15_unet() -> Any:
    """Stable Diffusion 1.5's: 859,520,964 parameters."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
