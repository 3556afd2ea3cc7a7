"""Stable Diffusion XL: two CLIP text encoders, a pooled vector, and sizes as conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sdtrain.batch import MicroConditioning
from sdtrain.families._full_size import SDXL
from sdtrain.families._opening import open_model_files
from sdtrain.families._stable_diffusion import StableDiffusion, TextOptions, only_length
from sdtrain.families._tiny import TinySizes, write_tiny_folder
from sdtrain.formats.diffusers import Folder
from sdtrain.text import TextConditioning, group_by_length

PIPELINE = "StableDiffusionXLPipeline"
PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
UNET_71 = (
    "unet.down_blocks.0.resnets.**",
    "unet.down_blocks.*.downsamplers.**",
    "unet.up_blocks.*.upsamplers.**",
    "unet.up_blocks.2.resnets.**",
    "unet.down_blocks.2.attentions.1.**",
    "unet.up_blocks.0.attentions.0.**",
)
UNET_63 = (
    *UNET_71,
    "unet.down_blocks.1.resnets.**",
    "unet.down_blocks.2.resnets.1.**",
    "unet.mid_block.resnets.**",
    "unet.up_blocks.0.resnets.0.**",
    "unet.up_blocks.1.resnets.**",
)


class Config(TextOptions):
    """Stable Diffusion XL."""

    type: Literal["sdxl"] = "sdxl"
    pipeline: ClassVar[str] = PIPELINE
    uncond: Literal["empty", "zero"] = Field(
        "empty", description="What a dropped caption becomes: the empty prompt, or zeros."
    )

    def build(
        self,
        path: str,
        *,
        precision: str = "no",
        device: str = "cpu",
        revision: str | None = None,
    ) -> StableDiffusionXL:
        """Load a diffusers folder, Hub id or single file.

        Raises:
            UserError: there is no such folder, or it holds another kind of model.
            DataError: its weights are incomplete.
        """
        folder = open_model_files(
            path, PIPELINE, PARTS, SDXL, config=self.config, revision=revision
        )
        family = StableDiffusionXL(folder, self, precision)
        family.to(device)
        return family

    @staticmethod
    def write_tiny(path: Path, seed: int) -> None:
        """Write a tiny model of this family: 64 px, one layer a block, two encoders."""
        sizes = TinySizes(
            pipeline=PIPELINE,
            scaling_factor=0.13025,
            text_encoders=("CLIPTextModel", "CLIPTextModelWithProjection"),
            unet={
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "attention_head_dim": (4, 4),
                "transformer_layers_per_block": (1, 2),
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                # six sizes of 8 channels each, and the pooled vector
                "projection_class_embeddings_input_dim": 6 * 8 + 32,
            },
        )
        write_tiny_folder(path, sizes, seed)


class StableDiffusionXL(StableDiffusion):
    """See `Family`."""

    name = "sdxl"
    encoders = ("text_encoder", "text_encoder_2")
    # 71.1620 % and 63.4697 % of the full-size UNet train. Source: 6DammK9.
    presets = {"unet-71": UNET_71, "unet-63": UNET_63}

    def __init__(self, folder: Folder, options: Config, precision: str = "no") -> None:
        super().__init__(folder, options, precision)
        self.uncond = options.uncond
        folder.index["force_zeros_for_empty_prompt"] = options.uncond == "zero"

    def encode_prompts(self, prompts: Sequence[str]) -> TextConditioning:
        """Both encoders' last but one layer side by side, and the second one's pooled vector.

        A dropped caption is the empty prompt, encoded like any other (as A1111 and ComfyUI do),
        or with `uncond = "zero"` zeros in place of all of it (as Stability's scripts do).
        """
        first, _ = self._encode("text_encoder", prompts, -2, final_norm=False)
        second, pooled = self._encode("text_encoder_2", prompts, -2, final_norm=False)
        hidden = [torch.cat(pair, dim=-1) for pair in zip(first, second, strict=True)]
        assert pooled is not None, "the second encoder has a projection"
        if self.uncond == "zero":
            keep = [float(prompt != "") for prompt in prompts]
            hidden = [states * factor for states, factor in zip(hidden, keep, strict=True)]
            factors = torch.tensor(keep).to(pooled.device, non_blocking=True)
            pooled = pooled * factors.view(-1, 1)
        return TextConditioning(group_by_length(hidden), pooled)

    def predict(
        self,
        noisy_latents: Tensor,
        u: Tensor,
        conditioning: TextConditioning,
        micro: Sequence[MicroConditioning],
    ) -> Tensor:
        """The UNet's output (B, 4, h, w), given text, pooled text and sizes."""
        assert conditioning.pooled is not None, "made by encode_prompts"
        time_ids = torch.tensor([sizes.time_ids() for sizes in micro], dtype=torch.float32)
        added = {
            "text_embeds": conditioning.pooled,
            "time_ids": time_ids.to(noisy_latents.device, non_blocking=True),
        }
        return self._predict(noisy_latents, u, conditioning, added)

    def never_trained(self) -> Mapping[str, Sequence[str]]:
        """The first encoder's last layer; the second's is needed for the pooled vector."""
        encoder: Any = self.parts["text_encoder"]
        last = encoder.config.num_hidden_layers - 1
        globs = (
            f"text_encoder.text_model.encoder.layers.{last}.**",
            "text_encoder.text_model.final_layer_norm.*",
        )
        return {"behind the last but one layer, which is the one that is read": globs}

    def pipeline_inputs(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Embeddings of prompts that take equally many chunks, and of as many empty chunks."""
        conditioning = self.encode_prompts(prompts)
        states = only_length(conditioning)
        uncond = self.encode_prompts([""])
        empty = only_length(uncond)
        repeats = -(-states.shape[1] // empty.shape[1])
        assert conditioning.pooled is not None
        assert uncond.pooled is not None
        return {
            "prompt_embeds": states,
            "negative_prompt_embeds": empty.repeat(len(states), repeats, 1)[:, : states.shape[1]],
            "pooled_prompt_embeds": conditioning.pooled,
            "negative_pooled_prompt_embeds": uncond.pooled.repeat(len(states), 1),
        }
