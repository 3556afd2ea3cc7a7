"""Stable Diffusion 1.x: one CLIP text encoder, read at its last layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from sdtrain.batch import MicroConditioning
from sdtrain.families._full_size import SD15, standard_scheduler
from sdtrain.families._opening import open_model_files
from sdtrain.families._stable_diffusion import DdpmOptions, StableDiffusion, only_length
from sdtrain.families._tiny import TinySizes, write_tiny_folder
from sdtrain.formats.diffusers import Folder
from sdtrain.text import TextConditioning, empty_like, group_by_length

PIPELINE = "StableDiffusionPipeline"
PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
}


class Config(DdpmOptions):
    """Stable Diffusion 1.x."""

    type: Literal["sd15"] = "sd15"
    pipeline: ClassVar[str] = PIPELINE
    clip_skip: int = Field(
        1,
        ge=1,
        le=12,
        description="Layer of the text encoder, from the end, as A1111 counts; 1: the last. "
        "diffusers' clip_skip is one less.",
    )

    def build(
        self,
        path: str,
        *,
        precision: str = "no",
        device: str = "cpu",
        revision: str | None = None,
    ) -> StableDiffusion15:
        """Load a diffusers folder, Hub id or single file.

        Raises:
            UserError: there is no such folder, or it holds another kind of model.
            DataError: its weights are incomplete.
        """
        folder = open_model_files(
            path, PIPELINE, PARTS, SD15, config=self.config, revision=revision
        )
        family = StableDiffusion15(folder, self, precision)
        family.to(device)
        return family

    @staticmethod
    def write_tiny(path: Path, seed: int) -> None:
        """Write a tiny model of this family: 64 px, one layer a block."""
        sizes = TinySizes(
            pipeline=PIPELINE,
            scaling_factor=0.18215,
            text_encoders=("CLIPTextModel",),
            unet={
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "attention_head_dim": 4,
            },
        )
        write_tiny_folder(path, sizes, seed, standard_scheduler())


class StableDiffusion15(StableDiffusion):
    """See `Family`."""

    name = "sd15"
    encoders = ("text_encoder",)

    def __init__(self, folder: Folder, options: Config, precision: str = "no") -> None:
        super().__init__(folder, options, precision)
        self.clip_skip = options.clip_skip
        self._require_layers(self.clip_skip)

    def encode_prompts(
        self, prompts: Sequence[str], *, clip_skip: int | None = None
    ) -> TextConditioning:
        """Hidden states of one layer, after the encoder's final LayerNorm.

        Args:
            prompts: (B) rendered text.
            clip_skip: overrides the recipe's layer; 1 is the last.
        """
        layer = -(clip_skip or self.clip_skip)
        hidden, _ = self._encode("text_encoder", prompts, layer, final_norm=True)
        return TextConditioning(group_by_length(hidden))

    def predict(
        self,
        noisy_latents: Tensor,
        u: Tensor,
        conditioning: TextConditioning,
        micro: Sequence[MicroConditioning],
    ) -> Tensor:
        """The UNet's output (B, 4, h, w); this architecture is not told sizes."""
        return self._predict(noisy_latents, u, conditioning, {})

    def never_trained(self) -> Mapping[str, Sequence[str]]:
        """With clip_skip, the layers behind the one that is read."""
        encoder: Any = self.parts["text_encoder"]
        last = encoder.config.num_hidden_layers
        layers = range(last - self.clip_skip + 1, last)
        globs = [f"text_encoder.text_model.encoder.layers.{layer}.**" for layer in layers]
        return {f"behind the layer that clip_skip = {self.clip_skip} reads": globs} if globs else {}

    def pipeline_inputs(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Embeddings of prompts that take equally many chunks, and of as many empty chunks."""
        states = only_length(self.encode_prompts(prompts))
        uncond = only_length(self.encode_prompts([""]))
        empty = empty_like(states, uncond, self.options.chunk_convention)
        return {"prompt_embeds": states, "negative_prompt_embeds": empty}
