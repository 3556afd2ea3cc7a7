"""Tiny models and batches that many tests share; the models are written once a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sdprep.plugins import config_for
from sdtrain.batch import Batch, MicroConditioning
from sdtrain.noise import noise_for, stratified_u
from sdtrain.text import TextConditioning
from sdtrain.tiny import write_tiny

SEED = 7


def tiny_folder(root: Path, family: str) -> Path:
    """A tiny model below `root`, written on first use."""
    path = root / family
    return path if path.is_dir() else write_tiny(family, path, SEED)


def load_tiny(folder: Path, **options: Any) -> Any:
    """The family of a tiny folder; its name is the folder's."""
    return config_for("family", folder.name)(**options).build(str(folder))


def tiny_batch(
    family: Any, count: int = 3, *, height: int = 32, width: int = 32, seed: int = 0
) -> Batch:
    """A batch of smooth random pictures with prompts of one chunk; one of them is empty."""
    ids = [f"sample-{index}" for index in range(count)]
    factor = family.vae_scale_factor
    shape = (family.latent_channels, height // factor, width // factor)
    pixels = torch.stack([noise_for(seed, "pixels", name, 0, (3, 4, 4)) for name in ids])
    pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear").tanh()
    texts = ["", "a photo of a cat", "red car, wrc, gravel", "1girl, solo"]
    micro = MicroConditioning((48 + height, 64 + width), (5, 11), (height, width))
    return Batch(
        ids=ids,
        visits=[0] * count,
        pixels=pixels,
        prompts=[texts[index % len(texts)] for index in range(count)],
        micro=[micro] * count,
        noise=torch.stack([noise_for(seed, "noise", name, 0, shape) for name in ids]),
        u=stratified_u(seed, 0, count),
    )


@torch.no_grad()
def as_trained(family: Any, batch: Batch) -> tuple[torch.Tensor, TextConditioning]:
    """Latents and frozen text of a batch as training sees them: made alone, rounded to float16."""
    vae = family.parts["vae"]
    means = [vae.encode(pixels[None]).latent_dist.mode()[0] for pixels in batch.pixels]
    latents = torch.stack(means).half().float() * vae.config.scaling_factor
    texts = [family.encode_prompts([prompt]) for prompt in batch.prompts]
    hidden = [text.groups[0][1][0].half().float() for text in texts]
    groups: dict[int, list[int]] = {}
    for slot, states in enumerate(hidden):
        groups.setdefault(len(states), []).append(slot)
    joined = [(slots, torch.stack([hidden[slot] for slot in slots])) for slots in groups.values()]
    if texts[0].pooled is None:
        return latents, TextConditioning(joined)
    return latents, TextConditioning(joined, torch.cat([t.pooled for t in texts]).half().float())
