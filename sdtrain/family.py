"""What the program asks of a model family; each one is a module in `families/`.

Everything outside a family sees the noise level only as `u` in [0, 1) and the conditioning only
as an opaque object: the family makes it and consumes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sdtrain.batch import MicroConditioning
from sdtrain.text import ChunkText

Conditioning = Any
Precision = str  # "no", "bf16" or "fp16": the autocast dtype of every trained or evaluated forward

Loss = Callable[..., Tensor]
"""`loss(prediction, target, *, u, logsnr, mask=None)` -> (B,) float32. See `losses/`."""


class Family(Protocol):
    """One architecture: its networks, its noise, its text and its files.

    Attributes:
        name: the recipe's word for it.
        parts: networks by canonical name: `unet`, `vae`, `text_encoder`, `text_encoder_2`.
        trainable_parts: names of the parts that rules may match; never the VAE.
        vae_scale_factor: pixels per latent along one side.
        latent_channels: channels of a latent.
        prediction_type: `epsilon`, `v_prediction` or `flow`.
        sign: +1 or -1; sign times the network's output estimates the target.
        default_resolution_px: side of the square that the checkpoint was made for.
        bucket_multiple_px: sides of a bucket are multiples of this.
        presets: shipped freeze rules by name: globs of canonical paths that it freezes.
        precision: autocast dtype of the forwards.
        is_told_sizes: whether the network receives `time_ids`.
    """

    name: str
    parts: dict[str, nn.Module]
    trainable_parts: tuple[str, ...]
    vae_scale_factor: int
    latent_channels: int
    prediction_type: str
    sign: int
    default_resolution_px: int
    bucket_multiple_px: int
    presets: Mapping[str, Sequence[str]]
    precision: Precision
    is_told_sizes: bool

    def alpha_sigma(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of clean latents and noise at `u`: two (B,) float32, on the device of `u`."""

    def logsnr(self, u: Tensor) -> Tensor:
        """2 ln(alpha / sigma): (B,) float32; infinities are legal."""

    def target(self, clean: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """What the network should say: noise, velocity or flow, shaped like `clean`, float32."""

    def model_time(self, u: Tensor) -> Tensor:
        """The time that the network receives at `u`: (B,)."""

    def density(self, v: Tensor, area_px: Tensor) -> Tensor:
        """Quantile function of the training noise levels: v in [0, 1) to u in [0, 1), float64.

        Args:
            v: (B,) float64.
            area_px: (B,) pixels of each picture; some densities go by them.
        """

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to scaled latents (B, C, h, w) float32; the VAE's mode."""

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's answer, unscaled: two (B, C, h, w) float32."""

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Unscaled latents as the network reads them: float32."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents to pixels (B, 3, H, W) float32 in [-1, 1]."""

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of rendered prompts; gradients flow only into encoders that train."""

    def split_conditioning(self, conditioning: Conditioning) -> list[dict[str, Tensor]]:
        """The conditioning of each prompt by itself, as named tensors without a batch dimension."""

    def join_conditioning(self, entries: Sequence[Mapping[str, Tensor]]) -> Conditioning:
        """The conditioning of a batch, of what `split_conditioning` made; floats stay as given."""

    def text_fingerprint(self) -> str:
        """Digest of all that conditioning depends on: tokenizers, encoders, layers, precision."""

    def predict(
        self,
        noisy_latents: Tensor,
        u: Tensor,
        conditioning: Conditioning,
        micro: Sequence[MicroConditioning],
    ) -> Tensor:
        """The network's output times `sign`: (B, C, h, w)."""

    def autocast(self) -> torch.autocast:
        """The context of every forward of `encode_prompts` and `predict`."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter that rules may match, by canonical path such as `unet.conv_in.weight`.

        Paths in text encoders always begin `text_encoder.text_model.`, whatever the installed
        transformers calls them, and adapter wrappers leave no trace in them.
        """

    def never_trained(self) -> Mapping[str, Sequence[str]]:
        """Globs of parameters that no gradient can reach, by the reason."""

    def as_dropped(
        self,
        conditioning: Conditioning,
        micro: Sequence[MicroConditioning],
        prompts: Sequence[str],
        draws: Tensor | None,
    ) -> tuple[Conditioning, Sequence[MicroConditioning]]:
        """What an empty prompt takes away besides its text.

        Args:
            conditioning: of the prompts, from `encode_prompts` or a cache.
            micro: (B) sizes.
            prompts: (B) rendered text.
            draws: (B,) float64 in [0, 1), one keyed draw per sample that covers all of its text;
                None in evaluation and for pictures, where nothing is drawn.

        Returns:
            both, as `predict` is to get them.
        """

    def num_tokens_cut(self, prompt: str) -> int:
        """How many tokens of a prompt lie beyond `max_chunks` and are not read."""

    def prompt_layout(self, prompt: str) -> list[ChunkText]:
        """What the tokens of a prompt stand for, chunk by chunk: for people to look at."""

    def num_chunks(self, prompt: str) -> int:
        """How many chunks of tokens a prompt takes, at most `max_chunks`."""

    def pipeline(self) -> Any:
        """A diffusers text-to-image pipeline that shares this family's networks.

        Its scheduler is its own, and knows what the network was trained to predict.
        """

    def pipeline_inputs(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Embeddings of prompts and of no prompt, as arguments of `pipeline()`.

        They come from `encode_prompts`, so pictures are drawn under the very text that trains.
        The prompts must take the same number of chunks.
        """

    def save(self, path: Path) -> None:
        """Write a complete diffusers folder."""
