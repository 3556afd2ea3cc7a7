"""Tiny models that were really trained, and their loss at every noise level: images x 1000 x draws.

Used by stable_eval_error.py. Everything is written below one scratch folder and found again by
content, so a second call only reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdprep.buckets import Bucket
from sdprep.images import ImageRejected, open_image
from sdprep.seeding import integer, rng_for
from sdtrain.batch import Batch
from sdtrain.losses.mse import mse
from sdtrain.pixels import evaluation_view
from sdtrain.stable_eval import evaluation_mode
from sdtrain.step import denoising_loss

SIDE_PX = 64  # 16x16 latents at the tiny model's 4 pixels a latent
STORED_PX = 80
TIMESTEPS = 1000
CHUNK = 250

RECIPE = """
seed = 11
output = {output}
[model]
family = "sd15"
path = {model}
[data]
path = {data}
resolution_px = {side}
min_aspect = 1.0
max_aspect = 1.0
batch_size = 8
micro_batch_size = 8
workers = 0
[train]
samples = {samples}
rules = [{{ match = "unet.**", lr = {lr} }}]
[schedule]
type = "cosine"
warmup_samples = {warmup}
[precision]
mixed = "no"
device = {device}
[validation]
images = 0
train_probe_images = 0
[checkpoint]
every_samples = {samples}
"""


@dataclass(frozen=True)
class Picture:
    """One photo with its text."""

    path: Path
    prompt: str


def photos(folder: Path) -> list[Picture]:
    """Every JPEG and PNG below a folder that decodes; the text is what lies beside it."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".png")):
        if path.parent.name == "found_again":  # copies of other demo photos, and a broken file
            continue
        try:
            open_image(path.read_bytes())
        except ImageRejected:
            continue
        caption = path.with_suffix(".caption")
        text = caption.read_text(encoding="utf-8").strip() if caption.is_file() else ""
        found.append(Picture(path, text))
    return found


def write_data(folder: Path, pictures: Sequence[Picture]) -> Path:
    """A Hugging Face image folder of small copies."""
    if not (folder / "metadata.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for number, picture in enumerate(pictures):
            with Image.open(picture.path) as photo:
                small = photo.convert("RGB").resize((STORED_PX, STORED_PX))
            small.save(folder / f"{number:03d}.png")
            lines.append(json.dumps({"file_name": f"{number:03d}.png", "text": picture.prompt}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def trained(folder: Path, model: Path, data: Path, samples: int, lr: float, device: str) -> Path:
    """Train as `sdtrain run` does; the diffusers folder of what came out."""
    from sdtrain.recipe import load_train_recipe
    from sdtrain.trainer import train

    recipe = folder.with_suffix(".toml")
    names = {"output": str(folder), "model": str(model), "data": str(data), "device": device}
    quoted = {key: json.dumps(value) for key, value in names.items()}
    recipe.write_text(
        RECIPE.format(side=SIDE_PX, samples=samples, warmup=samples // 40 + 8, lr=lr, **quoted),
        encoding="utf-8",
    )
    if not (folder / "model").is_dir():
        train(load_train_recipe(recipe))
    return folder / "model"


def load(path: Path, device: str) -> Any:
    """The family of a diffusers folder."""
    from sdprep.plugins import config_for

    config: Any = config_for("family", "sd15")()
    return config.build(str(path), precision="no", device=device)


def mixed(base: Any, other: Any, share: float, nudge: Callable[[str, torch.Tensor], Any]) -> Any:
    """Put base + share x (other - base) + nudge into `base`'s UNet; returns what was there."""
    unet = base.parts["unet"]
    theirs = dict(other.parts["unet"].named_parameters())
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            parameter.lerp_(theirs[name], share).add_(nudge(name, parameter))
    return before


def put_back(family: Any, before: dict[str, torch.Tensor]) -> None:
    """Undo `mixed`."""
    with torch.no_grad():
        for name, parameter in family.parts["unet"].named_parameters():
            parameter.copy_(before[name])


def ten_steps_nudge(base: Any, after: Any) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """An independent random direction, in each tensor as long as what ten steps moved it."""
    mine = dict(base.parts["unet"].named_parameters())
    theirs = dict(after.parts["unet"].named_parameters())
    length = {name: float((theirs[name] - mine[name]).norm()) for name in mine}

    def nudge(name: str, parameter: torch.Tensor) -> torch.Tensor:
        draw = rng_for("nudge", name).standard_normal(tuple(parameter.shape)).astype(np.float32)
        direction = torch.from_numpy(np.atleast_1d(draw)).reshape(parameter.shape)
        return (direction / direction.norm() * length[name]).to(parameter.device)

    return nudge


def matrix(
    family: Any, pictures: Sequence[Picture], draws: int, cache: Path, levels: np.ndarray
) -> np.ndarray:
    """(images, levels, draws) float32 losses, each point with noise of its own key.

    Args:
        family: the model as it is.
        pictures: what is shown.
        draws: of noise at each point.
        cache: folder for results by content.
        levels: (T,) u of each timestep.
    """
    key = blake2b(digest_size=12)
    for _, parameter in sorted(family.parts["unet"].named_parameters()):
        key.update(parameter.detach().cpu().numpy().tobytes())
    key.update(repr([(p.path.name, p.prompt) for p in pictures]).encode())
    key.update(f"{draws} {SIDE_PX}".encode() + levels.tobytes())
    path = cache / f"{key.hexdigest()}.npy"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        rows = [_image_row(family, picture, draws, levels) for picture in pictures]
        np.save(path, np.stack(rows))
    found: np.ndarray = np.load(path)
    return found


def _image_row(family: Any, picture: Picture, draws: int, levels: np.ndarray) -> np.ndarray:
    with Image.open(picture.path) as photo:
        pixels, micro = evaluation_view(photo.convert("RGB"), Bucket(SIDE_PX, SIDE_PX))
    losses = np.empty((len(levels), draws), np.float32)
    with evaluation_mode(family), torch.no_grad():
        device = family.parts["unet"].device
        latents = family.encode_images(pixels[None].to(device))
        for draw in range(draws):
            generator = torch.Generator("cpu")
            generator.manual_seed(integer("bench noise", picture.path.name, picture.prompt, draw))
            noise = torch.randn((len(levels), *latents.shape[1:]), generator=generator)
            for start in range(0, len(levels), CHUNK):
                part = slice(start, min(start + CHUNK, len(levels)))
                count = part.stop - part.start
                batch = Batch(
                    ids=[picture.path.name] * count,
                    visits=[0] * count,
                    pixels=torch.empty(count, 0),
                    prompts=[picture.prompt] * count,
                    micro=[micro] * count,
                    noise=noise[part],
                    u=torch.from_numpy(levels[part]),
                )
                shown = latents.expand(count, -1, -1, -1)
                found = denoising_loss(family, batch.to(device), mse, latents=shown)
                losses[part, draw] = found.cpu().numpy()
    return losses
