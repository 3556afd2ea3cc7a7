"""What Stable Diffusion 1.x and XL share: loading, the VAE, noise levels and paths."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sdprep.errors import UserError
from sdprep.recipe import Section
from sdprep.seeding import digest
from sdtrain.batch import MicroConditioning
from sdtrain.ddpm import DdpmObjective, objective_from_scheduler
from sdtrain.flow import FlowObjective
from sdtrain.formats import diffusers as diffusers_folder
from sdtrain.formats.schedulers import ddpm_scheduler, is_edm, is_flow
from sdtrain.paths import canonical_path, is_adapter
from sdtrain.tensor_hashes import tensor_hashes
from sdtrain.text import (
    ChunkText,
    Convention,
    Split,
    TextConditioning,
    encode_chunks,
    join_chunks,
    join_conditioning,
    lay_out,
    split_conditioning,
    tokenize,
    tokenizer_digest,
)
from sdtrain.token_counts import chunk_counter, cut_counter

FULL_SIZE_MULTIPLE_PX = 64
SMALLEST_FULL_SIZE_PX = 512
NOT_ABOUT_TEXT = frozenset(
    ("type", "family", "path", "revision", "config", "prediction_type", "zero_terminal_snr")
    + ("gradient_checkpointing",)
    + ("density", "shift", "logit_mean", "logit_std", "mode_scale")
    + ("uncond_zero_prob", "uncond_zero_sizes")  # what becomes of text after it was encoded
)
AUTOCAST_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TextOptions(Section):
    """Options that all families of this line have."""

    config: str | None = Field(
        None, description="Diffusers folder with a single file's sizes; default: the usual ones."
    )
    max_chunks: int = Field(
        3, ge=1, le=1000, description="Chunks of 75 tokens kept of a prompt; the rest is counted."
    )
    split: Split = Field("hard", description="Cut after 75 tokens, or behind the last comma.")
    chunk_convention: Convention = Field(
        "n77", description="Length of n chunks in tokens: n times 77, or n times 75 plus 2."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations twice: far less memory, a third slower."
    )


class DdpmOptions(TextOptions):
    """Options of the families that are trained with a thousand noise levels."""

    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="What the network says; default: what the checkpoint's scheduler names."
    )
    zero_terminal_snr: bool | None = Field(
        None,
        description="Whether the last noise level holds no signal (v_prediction only); "
        "default: as the checkpoint's scheduler.",
    )


class StableDiffusion:
    """A diffusers folder of this line, ready to train; the families add text and prediction.

    Args:
        folder: networks, tokenizers and scheduler as they were loaded.
        options: how prompts are cut and what the network predicts; `DdpmOptions`, unless a family
            has an `_objective` of its own.
        precision: autocast dtype, `no`, `bf16` or `fp16`.
    """

    name: str
    encoders: tuple[str, ...]
    presets: Mapping[str, Sequence[str]] = {}
    sign = 1
    is_told_sizes = False

    def __init__(
        self, folder: diffusers_folder.Folder, options: TextOptions, precision: str = "no"
    ) -> None:
        self.options, self.precision = options, precision
        self.parts = folder.networks
        self.trainable_parts = ("unet", *self.encoders)
        vae_config: Any = self.parts["vae"].config
        unet_config: Any = self.parts["unet"].config
        if options.gradient_checkpointing:
            unet: Any = self.parts["unet"]
            unet.enable_gradient_checkpointing()
            for name in self.encoders:
                encoder: Any = self.parts[name]
                new = getattr(encoder, "activation_checkpointing_enable", None)  # transformers 5.2x
                (new or encoder.gradient_checkpointing_enable)({"use_reentrant": False})
        self.vae_scale_factor = 2 ** (len(vae_config.block_out_channels) - 1)
        self.latent_channels = unet_config.in_channels
        self.default_resolution_px = unet_config.sample_size * self.vae_scale_factor
        finest = self.vae_scale_factor * 2 ** (len(unet_config.block_out_channels) - 1)
        is_full_size = self.default_resolution_px >= SMALLEST_FULL_SIZE_PX
        self.bucket_multiple_px = FULL_SIZE_MULTIPLE_PX if is_full_size else finest
        self.objective, scheduler = self._objective(folder, options)
        self.prediction_type = self.objective.prediction_type
        # From here on the scheduler says what is trained, in pictures and in what is saved.
        self.folder = replace(folder, scheduler=scheduler)

    def _require_layers(self, clip_skip: int) -> None:
        """Refuse to read a layer that an encoder does not have."""
        for name in self.encoders:
            encoder: Any = self.parts[name]
            layers = int(encoder.config.num_hidden_layers)
            if clip_skip > layers:
                raise UserError(
                    f"model.clip_skip = {clip_skip}, but {name} has {layers} layers",
                    "It counts from the end: 1 reads the last layer.",
                )

    def _objective(
        self, folder: diffusers_folder.Folder, options: Any
    ) -> tuple[DdpmObjective | FlowObjective, Any]:
        """What is trained, and a scheduler that samples it."""
        if is_flow(folder.scheduler):
            raise UserError(
                f"family {self.name} has noise levels of its own, and the checkpoint was trained "
                f"with flow matching ({type(folder.scheduler).__name__})",
                "Set model.family to one that does flow matching: sdtrain plugins.",
            )
        if is_edm(folder.scheduler):
            raise UserError(
                f"the checkpoint was trained with the noise levels of EDM "
                f"({type(folder.scheduler).__name__}), which no family here has",
                "Use a checkpoint that predicts epsilon or v, or the flow.",
            )
        objective = objective_from_scheduler(
            folder.scheduler.config, options.prediction_type, options.zero_terminal_snr
        )
        scheduler = ddpm_scheduler(
            folder.scheduler, objective.prediction_type, is_zero_snr=objective.is_zero_snr
        )
        return objective, scheduler

    def alpha_sigma(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of clean latents and noise: two (B,) float32."""
        return self.objective.alpha_sigma(u)

    def logsnr(self, u: Tensor) -> Tensor:
        """Log of the signal-to-noise ratio: (B,) float32."""
        return self.objective.logsnr(u)

    def target(self, clean: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """Noise, velocity or flow, shaped like `clean`, float32."""
        return self.objective.target(clean, noise, u)

    def model_time(self, u: Tensor) -> Tensor:
        """The step t that the network receives: (B,), whole or not."""
        return self.objective.model_time(u)

    def density(self, v: Tensor, area_px: Tensor) -> Tensor:
        """Where training draws its noise levels."""
        return self.objective.density(v, area_px)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.parts["unet"].parameters()).device

    def to(self, device: torch.device | str) -> StableDiffusion:
        """Move every network; returns self."""
        for network in self.parts.values():
            network.to(device)
        return self

    def autocast(self) -> torch.autocast:
        """The recipe's precision; parameters themselves stay float32."""
        dtype = AUTOCAST_DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "no")

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to scaled latents (B, C, h, w) float32, the posterior's mode."""
        return self.scale_latents(self.posterior(pixels)[0])

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Always in float32: SDXL's VAE overflows in float16."""
        vae: Any = self.parts["vae"]
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            found = vae.encode(pixels.float()).latent_dist
        return found.mode(), found.std

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Less the VAE's shift, times its scale; both may be those of each channel."""
        shift, scale = self._latent_scale(latents.device)
        return (latents - shift) * scale

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents to pixels (B, 3, H, W) float32 in [-1, 1]."""
        vae: Any = self.parts["vae"]
        shift, scale = self._latent_scale(latents.device)
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            pixels = vae.decode(latents.float() / scale + shift).sample
        return pixels.clamp(-1, 1)

    def _latent_scale(self, device: torch.device) -> tuple[Any, Any]:
        """Shift and scale: two numbers, or (C, 1, 1) where the VAE knows its channels apart."""
        config: Any = self.parts["vae"].config
        mean, std = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
        if mean is None or std is None:
            return getattr(config, "shift_factor", None) or 0, config.scaling_factor
        shift, deviation = (torch.tensor(x, device=device).view(-1, 1, 1) for x in (mean, std))
        return shift, config.scaling_factor / deviation

    def as_dropped(
        self,
        conditioning: TextConditioning,
        micro: Sequence[MicroConditioning],
        prompts: Sequence[str],
        draws: Tensor | None,
    ) -> tuple[TextConditioning, Sequence[MicroConditioning]]:
        """Nothing but its text, unless a family says so."""
        return conditioning, micro

    def num_chunks(self, prompt: str) -> int:
        """How many chunks a prompt takes."""
        return self._count_chunks(prompt)

    def prompt_layout(self, prompt: str) -> list[ChunkText]:
        """What the tokens stand for, chunk by chunk."""
        tokenizer = self.folder.tokenizers["tokenizer"]
        return lay_out(tokenizer, prompt, self.options.max_chunks, self.options.split)

    def num_tokens_cut(self, prompt: str) -> int:
        """Tokens beyond the last chunk that is kept."""
        return self._count_cut(prompt)

    @cached_property
    def _count_chunks(self) -> Callable[[str], int]:
        tokenizer = self.folder.tokenizers["tokenizer"]
        return chunk_counter(tokenizer, self.options.max_chunks, self.options.split)

    @cached_property
    def _count_cut(self) -> Callable[[str], int]:
        tokenizer = self.folder.tokenizers["tokenizer"]
        return cut_counter(tokenizer, self.options.max_chunks, self.options.split)

    def _tokenize(self, encoder: str, prompt: str) -> Tensor:
        """Chunks with the words of the first tokenizer, wrapped and padded by the encoder's own.

        SDXL's second one pads with "!", so transformers and diffusers make padding of every "!" in
        a prompt, and more tokens of "!!!" than the first. The encoder was trained on the word, as
        A1111 and ComfyUI feed it; and both encoders must be cut alike.
        """
        options, marks = self.options, self._tokenizer_of(encoder)
        words = self.folder.tokenizers["tokenizer"] if self._has_one_vocabulary else marks
        return tokenize(words, prompt, options.max_chunks, options.split, marks).ids

    def _tokenizer_of(self, encoder: str) -> Any:
        return self.folder.tokenizers[encoder.replace("text_encoder", "tokenizer")]

    @cached_property
    def _has_one_vocabulary(self) -> bool:
        first, *others = (self._tokenizer_of(encoder).get_vocab() for encoder in self.encoders)
        return all(other == first for other in others)

    def _encode(
        self, encoder: str, prompts: Sequence[str], layer: int, *, final_norm: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """One encoder over all chunks of all prompts.

        Returns:
            for each prompt its hidden states (L, D), and the pooled vectors (B, P) or None.
        """
        chunks = [self._tokenize(encoder, prompt) for prompt in prompts]
        counts = [len(ids) for ids in chunks]
        hidden, pooled = encode_chunks(
            self.parts[encoder], torch.cat(chunks), layer, final_norm=final_norm
        )
        convention = self.options.chunk_convention
        joined = [join_chunks(states, convention) for states in hidden.split(counts)]
        if pooled is not None:
            pooled = torch.stack([vectors[0] for vectors in pooled.split(counts)])
        return joined, pooled

    def split_conditioning(self, conditioning: TextConditioning) -> list[dict[str, Tensor]]:
        """Hidden states (L, D) of each prompt, and its pooled vector (P) where there is one."""
        return split_conditioning(conditioning)

    def join_conditioning(self, entries: Sequence[Mapping[str, Tensor]]) -> TextConditioning:
        """Grouped by length, as `encode_prompts` does."""
        return join_conditioning(entries)

    def text_fingerprint(self) -> str:
        """Changes with a weight of an encoder, its tokenizer, how prompts are cut, the precision.

        The weights are those of this moment, so an encoder that was trained has another one.
        """
        parts: list[str] = [self.name, self.precision, _text_options(self.options)]
        tensors = sorted(self.named_parameters(), key=lambda named: named[0])
        for encoder in self.encoders:
            network: Any = self.parts[encoder]
            tokenizer = self._tokenizer_of(encoder)
            parts += [encoder, tokenizer_digest(tokenizer), _plain(network.config.to_dict())]
            own = ((path, t) for path, t in tensors if path.split(".")[0] == encoder)
            parts += tensor_hashes(own).values()
        return digest("text encoders", *parts)

    def _predict(
        self,
        noisy_latents: Tensor,
        u: Tensor,
        conditioning: TextConditioning,
        added: Mapping[str, Tensor],
    ) -> Tensor:
        """The UNet, run once for each text length in the batch."""
        unet: Any = self.parts["unet"]
        device = noisy_latents.device
        timesteps = self.model_time(u).to(device, non_blocking=True)
        if len(conditioning.groups) == 1:
            states = conditioning.groups[0][1]
            return unet(noisy_latents, timesteps, states, added_cond_kwargs=added).sample
        outputs, order = [], []
        for slots, states in conditioning.groups:
            index = torch.tensor(slots).to(device, non_blocking=True)
            some = {key: value[index] for key, value in added.items()}
            outputs.append(
                unet(noisy_latents[index], timesteps[index], states, added_cond_kwargs=some).sample
            )
            order += slots
        back = torch.tensor(order).argsort().to(device, non_blocking=True)
        return torch.cat(outputs)[back]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Base parameters by canonical path; adapters leave no trace in them."""
        for part, network in self.parts.items():
            for name, parameter in network.named_parameters():
                if not is_adapter(name):
                    yield canonical_path(part, network, name), parameter

    def never_trained(self) -> Mapping[str, Sequence[str]]:
        """Nothing, unless a family says so."""
        return {}

    def pipeline(self) -> Any:
        """A diffusers pipeline over these very networks."""
        return self.folder.pipeline()

    def save(self, path: Path) -> None:
        """Write a complete diffusers folder.

        Raises:
            AssertionError: an adapter is still attached; merge it first.
        """
        for part, network in self.parts.items():
            live = [name for name, _ in network.named_parameters() if is_adapter(name)]
            assert not live, f"{part} has an adapter attached: merge it before saving"
        self.folder.save(path)


def _text_options(options: TextOptions) -> str:
    """Every option but those that say nothing about text; one that is new counts."""
    return _plain({k: v for k, v in options.model_dump().items() if k not in NOT_ABOUT_TEXT})


def _plain(config: Mapping[str, Any]) -> str:
    """A configuration without its notes: where it came from, and which release wrote it."""
    notes = ("transformers_version", "architectures", "dtype", "torch_dtype")
    kept = {k: v for k, v in config.items() if k not in notes and not k.startswith("_")}
    return json.dumps(kept, sort_keys=True, default=str)


def only_length(conditioning: TextConditioning) -> Tensor:
    """Hidden states (B, L, D) of prompts that all take the same number of chunks."""
    assert len(conditioning.groups) == 1, "prompts of one call must take equally many chunks"
    return conditioning.groups[0][1]
