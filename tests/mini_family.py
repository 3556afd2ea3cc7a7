"""A whole family in a hundred lines: real training at a millisecond a forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdprep.seeding import rng_for
from sdtrain import hand_over
from sdtrain import setup as setup_module
from sdtrain.batch import MicroConditioning
from sdtrain.ddpm import objective_from_scheduler
from sdtrain.freeze_plan import FreezePlan
from sdtrain.freezing import build_plan
from sdtrain.recipe import TrainRecipe
from sdtrain.tensor_hashes import tensor_hashes

WIDTH = 24
LETTERS = 128
CHUNK_LETTERS = 40
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.text = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, states: Tensor) -> Tensor:
        return hidden + nn.functional.silu(self.conv(hidden) + self.text(states)[:, :, None, None])


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, WIDTH, 3, padding=1)
        self.time = nn.Linear(2, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv_out = nn.Conv2d(WIDTH, 4, 3, padding=1)

    def forward(self, latents: Tensor, time: Tensor, states: Tensor) -> Tensor:
        angles = torch.stack([time.sin(), time.cos()], 1)
        hidden = self.conv_in(latents) + self.time(angles)[:, :, None, None]
        for block in self.blocks:
            hidden = block(hidden, states)
        return self.conv_out(hidden)


class TextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.EmbeddingBag(LETTERS, WIDTH, mode="mean")

    def forward(self, letters: Tensor, starts: Tensor) -> Tensor:
        return self.letters(letters, starts)


class MiniFamily:
    """See `sdtrain.family.Family`."""

    name, precision, prediction_type, sign = "mini", "no", "epsilon", 1
    trainable_parts = ("unet", "text_encoder")
    vae_scale_factor, latent_channels, default_resolution_px, bucket_multiple_px = 4, 4, 32, 8
    presets: Mapping[str, Sequence[str]] = {}
    is_told_sizes = False

    def __init__(self) -> None:
        self.parts: dict[str, nn.Module] = {
            "unet": Denoiser(),
            "vae": nn.Conv2d(3, 4, 4, stride=4),
            "text_encoder": TextEncoder(),
        }
        for path, parameter in self.named_parameters():
            draw = rng_for(3, "mini", path).standard_normal(tuple(parameter.shape), "float32")
            scale = (3 * parameter[0].numel()) ** -0.5 if parameter.dim() > 1 else 0.0
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(draw) * scale)
        objective = objective_from_scheduler(SCHEDULER)
        self.alpha_sigma, self.logsnr = objective.alpha_sigma, objective.logsnr
        self.target, self.model_time = objective.target, objective.model_time
        self.density = objective.density

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            mean = self.parts["vae"](pixels)
        return mean, torch.zeros_like(mean)

    def scale_latents(self, latents: Tensor) -> Tensor:
        return latents

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.posterior(pixels)[0]

    def split_conditioning(self, conditioning: Tensor) -> list[dict[str, Tensor]]:
        return [{"states": states} for states in conditioning]

    def join_conditioning(self, parts: Sequence[Mapping[str, Tensor]]) -> Tensor:
        return torch.stack([part["states"] for part in parts])

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        texts = [prompt or " " for prompt in prompts]
        starts = torch.tensor([0, *map(len, texts)]).cumsum(0)[:-1]
        letters = torch.tensor([ord(letter) % LETTERS for letter in "".join(texts)])
        return self.parts["text_encoder"](letters, starts)  # once, however many prompts

    def predict(
        self, noisy_latents: Tensor, u: Tensor, conditioning: Any, micro: list[MicroConditioning]
    ) -> Tensor:
        return self.parts["unet"](noisy_latents, self.model_time(u).float(), conditioning)

    def as_dropped(
        self, conditioning: Tensor, micro: Any, prompts: Sequence[str], draws: Tensor | None
    ) -> tuple[Tensor, Any]:
        return conditioning, micro

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.float32, enabled=False)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for part, network in self.parts.items():
            for name, parameter in network.named_parameters():
                yield f"{part}.{name}", parameter

    def never_trained(self) -> Mapping[str, Sequence[str]]:
        return {}

    def num_chunks(self, prompt: str) -> int:
        return 1 + min(2, len(prompt) // CHUNK_LETTERS)

    def num_tokens_cut(self, prompt: str) -> int:
        return 0

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        path.mkdir(parents=True)
        tensors = {name: p.detach().contiguous() for name, p in self.named_parameters()}
        save_file(tensors, path / "mini.safetensors")


def open_mini(
    recipe: TrainRecipe, device: torch.device
) -> tuple[Any, Any, dict[str, str], FreezePlan]:
    """In place of `sdtrain.setup.open_model`: this family, whatever the recipe's path says."""
    family: Any = MiniFamily()
    hashes = tensor_hashes(family.named_parameters())
    adapter = recipe.adapter.build()
    return family, adapter, hashes, build_plan(family, recipe.train.rules, adapter)


def install() -> None:
    """Let every recipe of this process train the mini family."""
    setup_module.open_model = hand_over.open_model = open_mini
