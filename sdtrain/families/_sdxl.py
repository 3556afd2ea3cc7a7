"""The networks of Stable Diffusion XL: two text encoders, a pooled vector, sizes they are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sdprep.recipe import Section
from sdtrain.batch import MicroConditioning
from sdtrain.families._full_size import SDXL
from sdtrain.families._opening import open_model_files
from sdtrain.families._stable_diffusion import StableDiffusion, only_length
from sdtrain.families._tiny import TinySizes
from sdtrain.formats.diffusers import Folder
from sdtrain.text import TextConditioning, empty_like, group_by_length, without_text

NO_SIZES = MicroConditioning((0, 0), (0, 0), (0, 0))
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


class SdxlOptions(Section):
    """What is said about the text of this architecture, whatever its objective."""

    pipeline: ClassVar[str] = PIPELINE
    uncond: Literal["empty", "zero"] = Field(
        "empty", description="What a dropped caption becomes: the empty prompt, or zeros."
    )
    uncond_zero_prob: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description='Share of dropped captions that become zeros although uncond = "empty".',
    )
    uncond_zero_sizes: bool = Field(
        False, description="Whether an empty prompt has zeros for its sizes (time_ids) too."
    )
    clip_skip: int = Field(
        2,
        ge=1,
        le=12,
        description="Layer that is read of both text encoders, from the end, as ComfyUI counts; "
        "2: what the base was trained with.",
    )

    @model_validator(mode="after")
    def _mixes_into_empty(self) -> Self:
        if self.uncond == "zero" and self.uncond_zero_prob:
            raise ValueError('uncond_zero_prob goes with uncond = "empty"; here all are zeros')
        return self


def tiny_sizes() -> TinySizes:
    """64 px, one layer a block, two encoders."""
    return TinySizes(
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


def open_folder(path: str, config: str | None, revision: str | None) -> Folder:
    """Networks, tokenizers and scheduler of a diffusers folder, Hub id or single file.

    Raises:
        UserError: there is no such folder, or it holds another kind of model.
        DataError: its weights are incomplete.
    """
    return open_model_files(path, PIPELINE, PARTS, SDXL, config=config, revision=revision)


class SdxlNetworks(StableDiffusion):
    """Both families of this architecture; they differ in their objective."""

    encoders = ("text_encoder", "text_encoder_2")
    is_told_sizes = True
    # 71.1620 % and 63.4697 % of the full-size UNet train. Source: 6DammK9.
    presets = {"unet-71": UNET_71, "unet-63": UNET_63}

    def __init__(self, folder: Folder, options: Any, precision: str = "no") -> None:
        super().__init__(folder, options, precision)
        self.clip_skip = options.clip_skip
        self._require_layers(self.clip_skip)
        self.uncond: str = options.uncond
        self._zero_prob: float = options.uncond_zero_prob
        self._has_zero_sizes: bool = options.uncond_zero_sizes
        folder.index["force_zeros_for_empty_prompt"] = options.uncond == "zero"

    def encode_prompts(self, prompts: Sequence[str]) -> TextConditioning:
        """One layer of both encoders side by side, and the second one's pooled vector.

        The layer is the last but one, unless clip_skip says otherwise; no LayerNorm follows it.

        A dropped caption is the empty prompt, encoded like any other (as A1111 and ComfyUI do),
        or with `uncond = "zero"` zeros in place of all of it (as Stability's scripts do).
        """
        layer = -self.clip_skip
        first, _ = self._encode("text_encoder", prompts, layer, final_norm=False)
        second, pooled = self._encode("text_encoder_2", prompts, layer, final_norm=False)
        hidden = [torch.cat(pair, dim=-1) for pair in zip(first, second, strict=True)]
        assert pooled is not None, "the second encoder has a projection"
        conditioning = TextConditioning(group_by_length(hidden), pooled)
        if self.uncond == "zero":
            return without_text(conditioning, [prompt == "" for prompt in prompts])
        return conditioning

    def as_dropped(
        self,
        conditioning: TextConditioning,
        micro: Sequence[MicroConditioning],
        prompts: Sequence[str],
        draws: Tensor | None,
    ) -> tuple[TextConditioning, Sequence[MicroConditioning]]:
        """Zeros for a share of the empty prompts; one draw decides on all of a sample's text."""
        is_empty = [prompt == "" for prompt in prompts]
        if draws is not None and self._zero_prob:
            drawn = (draws < self._zero_prob).tolist()
            both = [empty and zero for empty, zero in zip(is_empty, drawn, strict=True)]
            conditioning = without_text(conditioning, both)
        if self._has_zero_sizes:
            pairs = zip(micro, is_empty, strict=True)
            micro = [NO_SIZES if empty else sizes for sizes, empty in pairs]
        return conditioning, micro

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
        """Of the first encoder what lies behind the layer that is read.

        The second needs all of its layers for the pooled vector.
        """
        encoder: Any = self.parts["text_encoder"]
        last = encoder.config.num_hidden_layers
        layers = range(last - self.clip_skip + 1, last)
        globs = [f"text_encoder.text_model.encoder.layers.{layer}.**" for layer in layers]
        globs.append("text_encoder.text_model.final_layer_norm.*")
        return {f"behind layer {self.clip_skip} from the end, which is the one that is read": globs}

    def pipeline_inputs(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Embeddings of prompts that take equally many chunks, and of as many empty chunks."""
        conditioning = self.encode_prompts(prompts)
        states = only_length(conditioning)
        uncond = self.encode_prompts([""])
        empty = empty_like(states, only_length(uncond), self.options.chunk_convention)
        assert conditioning.pooled is not None
        assert uncond.pooled is not None
        return {
            "prompt_embeds": states,
            "negative_prompt_embeds": empty,
            "pooled_prompt_embeds": conditioning.pooled,
            "negative_pooled_prompt_embeds": uncond.pooled.repeat(len(states), 1),
            **self._sizes(prompts),
        }

    def _sizes(self, prompts: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Zero sizes for pictures without a prompt, where they were trained so."""
        if not self._has_zero_sizes:
            return {}
        none = (0, 0)
        names = ["negative_original_size", "negative_target_size"]
        if all(prompt == "" for prompt in prompts):
            names += ["original_size", "target_size"]
        return dict.fromkeys(names, none)
