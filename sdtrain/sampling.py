"""Pictures of fixed prompts with fixed noise, so that only the model can change them.

The first noise of a picture is keyed by (seed, prompt). Nothing outside is touched: no ambient
randomness, no training mode, no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from sdprep.errors import DataError
from sdprep.seeding import integer
from sdtrain import checkpoint, samplers, variety
from sdtrain.course import meant
from sdtrain.family import Family
from sdtrain.noise import noise_for
from sdtrain.outputs import require_folder
from sdtrain.pixels import picture_of
from sdtrain.run_folder import RunFolder
from sdtrain.sample_files import draw_grid, save_pictures
from sdtrain.stable_eval import evaluation_mode
from sdtrain.trackers.jsonl import read_metrics

if TYPE_CHECKING:
    from sdtrain.recipe import SamplingSection, TrainRecipe
    from sdtrain.setup import Setup


@dataclass(frozen=True)
class Style:
    """How pictures are drawn.

    Args:
        seed: keys the first noise of every prompt.
        side_px: side of the square picture.
        num_inference_steps: steps of the sampler.
        guidance_scale: classifier-free guidance; at 1 or below there is none.
        sampler: one of `samplers.NAMES`; None is the kind that the model came with.
    """

    seed: int
    side_px: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str | None = None

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
            sampler=recipe.sampling.sampler,
        )


@dataclass(frozen=True)
class Drawing:
    """One picture, and the scaled latents (C, h, w) on the CPU that it was decoded from."""

    picture: Image.Image
    latents: torch.Tensor


def draw(setup: Setup, folder: RunFolder, samples_seen: int) -> dict[str, Any] | None:
    """Draw the recipe's prompts with the model as it is now, and renew the grid over time.

    `samples/<samples_seen>/` gets a PNG for each prompt and seed, `all.png` and `prompts.json`.

    Args:
        setup: the run.
        folder: its folder.
        samples_seen: the clock, which names the subfolder.

    Returns:
        a metrics line about the spread between seeds; None with a single seed.
    """
    wanted = setup.recipe.sampling
    style = Style.of(setup.recipe, setup.family)
    seeds = [style.seed + k for k in range(wanted.seeds)]

    def drawn() -> list[list[Drawing]]:
        return [drawings_of(setup.family, wanted.prompts, replace(style, seed=s)) for s in seeds]

    # A sharded model draws on all processes together, a whole one on the main one.
    ready = drawn() if setup.engine.is_sharded else None

    def save() -> dict[str, Any] | None:
        return _keep(wanted, style, seeds, ready or drawn(), folder, samples_seen)

    return setup.world.on_main(save)


def _keep(
    wanted: SamplingSection,
    style: Style,
    seeds: Sequence[int],
    drawn: Sequence[Sequence[Drawing]],
    folder: RunFolder,
    samples_seen: int,
) -> dict[str, Any] | None:
    """Write what was drawn, `drawn[seed][prompt]`; the metrics line."""
    by_prompt = list(zip(*drawn, strict=True))  # a prompt's seeds lie side by side
    save_pictures(
        folder.samples / str(samples_seen),
        [prompt for prompt in wanted.prompts for _ in seeds],
        [each.picture for of_prompt in by_prompt for each in of_prompt],
        title=f"{samples_seen:,} samples",
        seeds=list(seeds) * len(wanted.prompts) if len(seeds) > 1 else None,
    )
    draw_grid(folder.samples, samples_seen)
    if len(seeds) < 2:
        return None
    spreads = {
        prompt: variety.latent_spread(of_prompt)
        for prompt, of_prompt in zip(wanted.prompts, by_prompt, strict=True)
    }
    how = {**style.__dict__, "seeds": len(seeds)}
    return variety.metrics_line(samples_seen, how, spreads, read_metrics(folder.metrics))


def pictures_of(family: Family, prompts: Sequence[str], style: Style) -> list[Image.Image]:
    """One picture a prompt; see `drawings_of`."""
    return [drawing.picture for drawing in drawings_of(family, prompts, style)]


def drawings_of(family: Family, prompts: Sequence[str], style: Style) -> list[Drawing]:
    """One drawing a prompt; a prompt's picture does not depend on the others.

    The text goes through the family's own encoders, so a prompt means here what it means in
    training, the empty one included.
    """
    side = style.side_px // family.vae_scale_factor
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    drawings = []
    # Some samplers draw from the ambient generator whatever they are given: put it back.
    with evaluation_mode(family), torch.no_grad(), torch.random.fork_rng(devices):
        pipeline = family.pipeline()
        pipeline.scheduler = samplers.build(
            style.sampler, pipeline.scheduler, family.prediction_type
        )
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
            picture = picture_of(family.decode_latents(latents)[0])
            drawings.append(Drawing(picture, latents[0].detach().float().cpu()))
    if devices:
        torch.cuda.empty_cache()  # what decoding took is the training's again
    return drawings


# --- from a checkpoint ---------------------------------------------------------------------------


def checkpoint_folder(path: Path) -> Path:
    """A checkpoint, or the newest one of a run folder.

    Raises:
        DataError: it is neither.
    """
    path = meant(path)
    if (path / checkpoint.STATE).is_file():
        return path
    found = checkpoint.checkpoints(path / "checkpoints") or checkpoint.checkpoints(path)
    if not found:
        raise DataError(
            f"{path} is neither a checkpoint nor a run folder with one",
            "A checkpoint is RUN/checkpoints/SAMPLES, a folder with state.json.",
        )
    return found[-1]


def load_checkpoint(
    path: Path, device: str | None = None, *, ema: bool = False
) -> tuple[TrainRecipe, Family, int]:
    """The model of a checkpoint, with the recipe and the clock it was saved at.

    Args:
        path: the checkpoint.
        device: overrides the recipe's.
        ema: whether its averaged weights are taken.

    Raises:
        UserError: the base model is not where the recipe says, or does not fit.
        DataError: there is no average.
    """
    from sdprep.recipe import validate
    from sdtrain.recipe import TrainRecipe
    from sdtrain.run import load_trained
    from sdtrain.setup import open_model, pick_device

    state = checkpoint.read_state(path)
    recipe = validate(state["recipe"], TrainRecipe, str(path / checkpoint.STATE))
    family, _, _, plan = open_model(recipe, pick_device(device or recipe.precision.device))
    load_trained(plan, checkpoint.read_weights(path, ema=ema))
    return recipe, family, int(state["samples_seen"])


def sample_checkpoint(
    path: Path,
    prompts: Sequence[str],
    to: Path,
    *,
    seed: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    device: str | None = None,
    ema: bool = False,
) -> dict[str, Any]:
    """Draw prompts with a checkpoint; what is not given comes from its recipe.

    Args:
        path: a checkpoint, or a run folder for its newest.
        prompts: one picture each.
        to: folder, made if absent.
        seed: keys the first noise.
        num_inference_steps: steps of the sampler.
        guidance_scale: classifier-free guidance.
        sampler: one of `samplers.NAMES`.
        device: where to draw.
        ema: whether its averaged weights are taken.

    Returns:
        path, samples_seen and the pictures with their prompts.
    """
    require_folder(to)
    found = checkpoint_folder(path)
    recipe, family, samples_seen = load_checkpoint(found, device, ema=ema)
    given = {
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "sampler": sampler,
    }
    known: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    style = replace(Style.of(recipe, family), **known)
    pictures = pictures_of(family, prompts, style)
    names = save_pictures(
        to,
        prompts,
        pictures,
        title=f"{found} ({samples_seen:,} samples{', average' if ema else ''})",
    )
    drawn = [{"file": n, "prompt": p} for n, p in zip(names, prompts, strict=True)]
    return {"path": str(to), "samples_seen": samples_seen, "seed": style.seed, "pictures": drawn}
