"""Pictures of fixed prompts with fixed noise, so that only the model can change them.

The first noise of a picture is keyed by (seed, prompt). Nothing outside is touched: no ambient
randomness, no training mode, no gradient.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from sdprep.errors import DataError, UserError
from sdprep.seeding import integer
from sdtrain import checkpoint, contact_sheet
from sdtrain.family import Family
from sdtrain.noise import noise_for
from sdtrain.pixels import picture_of
from sdtrain.stable_eval import evaluation_mode

if TYPE_CHECKING:
    from sdtrain.recipe import TrainRecipe
    from sdtrain.setup import Setup

PROMPTS_FILE = "prompts.json"
SHEET, GRID = "all.png", "grid.png"
_SLUG_CHARACTERS = 48


@dataclass(frozen=True)
class Style:
    """How pictures are drawn.

    Args:
        seed: keys the first noise of every prompt.
        side_px: side of the square picture.
        num_inference_steps: steps of the sampler.
        guidance_scale: classifier-free guidance; at 1 or below there is none.
    """

    seed: int
    side_px: int
    num_inference_steps: int
    guidance_scale: float

    @classmethod
    def of(cls, recipe: TrainRecipe, family: Family) -> Style:
        """What a recipe asks for, at its training resolution."""
        wanted = recipe.data.resolution_px or family.default_resolution_px
        multiple = family.bucket_multiple_px
        return cls(
            seed=recipe.seed,
            side_px=max(1, round(wanted / multiple)) * multiple,
            num_inference_steps=recipe.sampling.num_inference_steps,
            guidance_scale=recipe.sampling.guidance_scale,
        )


def draw(setup: Setup, folder: Path, samples_seen: int) -> Path:
    """Draw the recipe's prompts with the model as it is now, and renew the grid over time.

    Args:
        setup: the run.
        folder: `samples/` of the run.
        samples_seen: the clock, which names the subfolder.

    Returns:
        the subfolder: one PNG a prompt, `all.png` with all of them, `prompts.json`.
    """
    prompts = setup.recipe.sampling.prompts
    pictures = pictures_of(setup.family, prompts, Style.of(setup.recipe, setup.family))
    place = folder / str(samples_seen)
    save_pictures(place, prompts, pictures, title=f"{samples_seen:,} samples")
    draw_grid(folder, samples_seen)
    return place


def pictures_of(family: Family, prompts: Sequence[str], style: Style) -> list[Image.Image]:
    """One picture a prompt; a prompt's picture does not depend on the others.

    The text goes through the family's own encoders, so a prompt means here what it means in
    training, the empty one included.
    """
    side = style.side_px // family.vae_scale_factor
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    pictures = []
    # Some samplers draw from the ambient generator whatever they are given: put it back.
    with evaluation_mode(family), torch.no_grad(), torch.random.fork_rng(devices):
        pipeline = family.pipeline()
        device = next(family.parts["vae"].parameters()).device
        for prompt in prompts:
            noise = noise_for(style.seed, "sample", prompt, 0, (family.latent_channels, side, side))
            key = integer(style.seed, "sampler", prompt)
            torch.manual_seed(key)
            with family.autocast():
                latents = pipeline(
                    **family.pipeline_inputs([prompt]),
                    latents=noise[None].to(device),
                    height=style.side_px,
                    width=style.side_px,
                    num_inference_steps=style.num_inference_steps,
                    guidance_scale=style.guidance_scale,
                    generator=torch.Generator("cpu").manual_seed(key),
                    output_type="latent",
                ).images
            # Not through the pipeline: the family decodes outside autocast, in float32.
            pictures.append(picture_of(family.decode_latents(latents)[0]))
    return pictures


# --- files ---------------------------------------------------------------------------------------


def save_pictures(
    place: Path, prompts: Sequence[str], pictures: Sequence[Image.Image], title: str
) -> list[str]:
    """Write pictures, their prompts and one sheet of all; returns the pictures' file names."""
    place.mkdir(parents=True, exist_ok=True)
    names = [f"{at:02d}-{slug(prompt)}.png" for at, prompt in enumerate(prompts)]
    for name, picture in zip(names, pictures, strict=True):
        picture.save(place / name)
    sheet = contact_sheet.sheet(list(pictures), [shown(prompt) for prompt in prompts], title)
    sheet.save(place / SHEET)
    entries = [{"file": n, "prompt": p} for n, p in zip(names, prompts, strict=True)]
    text = json.dumps(entries, indent=1, ensure_ascii=False)
    (place / PROMPTS_FILE).write_text(text + "\n", encoding="utf-8", newline="\n")
    return names


def draw_grid(folder: Path, until: int | None = None) -> Path | None:
    """Renew `grid.png`: a row for each moment, a column for each prompt.

    Args:
        folder: `samples/` of a run.
        until: leave out later moments, which belong to a course that was given up.

    Returns:
        the picture's path; None if there are no samples yet.
    """
    moments = [int(path.parent.name) for path in folder.glob(f"*/{PROMPTS_FILE}")]
    moments = sorted(each for each in moments if until is None or each <= until)
    if not moments:
        return None
    entries = {each: _entries(folder / str(each)) for each in moments}
    prompts = list(dict.fromkeys(prompt for each in entries.values() for prompt in each))
    rows = [
        (f"{each:,}", [entries[each].get(prompt) for prompt in prompts])
        for each in contact_sheet.spread(moments)
    ]
    path = folder / GRID
    scratch = path.with_name(f".{GRID}.new")
    picture = contact_sheet.grid(rows, [shown(prompt) for prompt in prompts], "samples seen")
    picture.save(scratch, "PNG")
    scratch.replace(path)
    return path


def _entries(place: Path) -> dict[str, Path]:
    listed = json.loads((place / PROMPTS_FILE).read_text(encoding="utf-8"))
    return {entry["prompt"]: place / entry["file"] for entry in listed}


def slug(prompt: str) -> str:
    """A prompt as a part of a file name."""
    plain = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_SLUG_CHARACTERS].strip("-")
    return plain or ("prompt" if prompt else "empty-prompt")


def shown(prompt: str) -> str:
    """A prompt as people read it."""
    return prompt or "(empty prompt)"


# --- from a checkpoint ---------------------------------------------------------------------------


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line; an empty line is the empty prompt.

    Raises:
        UserError: the file cannot be read or is empty.
    """
    try:
        prompts = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts {path}: {error}") from None
    if not prompts:
        raise UserError(f"{path} is empty", "Write one prompt a line; an empty line is none.")
    return [prompt.strip() for prompt in prompts]


def checkpoint_folder(path: Path) -> Path:
    """A checkpoint, or the newest one of a run folder.

    Raises:
        DataError: it is neither.
    """
    if (path / checkpoint.STATE).is_file():
        return path
    found = checkpoint.checkpoints(path / "checkpoints") or checkpoint.checkpoints(path)
    if not found:
        raise DataError(
            f"{path} is neither a checkpoint nor a run folder with one",
            "A checkpoint is RUN/checkpoints/SAMPLES, a folder with state.json.",
        )
    return found[-1]


def load_checkpoint(path: Path, device: str | None = None) -> tuple[TrainRecipe, Family, int]:
    """The model of a checkpoint, with the recipe and the clock it was saved at.

    Args:
        path: the checkpoint.
        device: overrides the recipe's.

    Raises:
        UserError: the base model is not where the recipe says, or does not fit.
    """
    from sdprep.recipe import validate
    from sdtrain.recipe import TrainRecipe
    from sdtrain.run import load_trained
    from sdtrain.setup import open_model, pick_device

    state = checkpoint.read_state(path)
    recipe = validate(state["recipe"], TrainRecipe, str(path / checkpoint.STATE))
    family, _, _, plan = open_model(recipe, pick_device(device or recipe.precision.device))
    load_trained(plan, checkpoint.read_trained(path))
    return recipe, family, int(state["samples_seen"])


def sample_checkpoint(
    path: Path,
    prompts: Sequence[str],
    to: Path,
    *,
    seed: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> dict[str, Any]:
    """Draw prompts with a checkpoint; what is not given comes from its recipe.

    Args:
        path: a checkpoint, or a run folder for its newest.
        prompts: one picture each.
        to: folder, made if absent.
        seed: keys the first noise.
        num_inference_steps: steps of the sampler.
        guidance_scale: classifier-free guidance.

    Returns:
        path, samples_seen and the pictures with their prompts.
    """
    found = checkpoint_folder(path)
    recipe, family, samples_seen = load_checkpoint(found)
    given = Style.of(recipe, family)
    style = Style(
        seed=given.seed if seed is None else seed,
        side_px=given.side_px,
        num_inference_steps=num_inference_steps or given.num_inference_steps,
        guidance_scale=given.guidance_scale if guidance_scale is None else guidance_scale,
    )
    pictures = pictures_of(family, prompts, style)
    names = save_pictures(to, prompts, pictures, title=f"{found} ({samples_seen:,} samples)")
    drawn = [{"file": n, "prompt": p} for n, p in zip(names, prompts, strict=True)]
    return {"path": str(to), "samples_seen": samples_seen, "seed": style.seed, "pictures": drawn}
