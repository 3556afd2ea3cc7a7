"""Commands that draw pictures and pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdprep.console import out, print_json
from sdtrain.commands.common import Average, Json, Prompts

Device = Annotated[str | None, typer.Option(help="Such as cuda:1 or cpu; default: the recipe's.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps of the sampler; default: the run's.")]
_SAMPLER = "ddim, ddpm, pndm, euler, euler_a, heun, dpmpp_2m(_karras|_sde) or unipc"


def sample(
    checkpoint: Annotated[
        Path, typer.Argument(help="RUN/checkpoints/SAMPLES, or a run for its newest.")
    ],
    prompts: Prompts,
    to: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    seed: Annotated[int | None, typer.Option(help="Keys the noise; default: the run's.")] = None,
    steps: Steps = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale; default: the run's.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help=f"{_SAMPLER}; default: the run's.")] = None,
    device: Device = None,
    ema: Average = False,
    as_json: Json = False,
) -> None:
    """Draw prompts with a checkpoint."""
    from sdtrain.sample_files import read_prompts
    from sdtrain.sampling import sample_checkpoint

    found = sample_checkpoint(
        checkpoint,
        read_prompts(prompts),
        to,
        seed=seed,
        num_inference_steps=steps,
        guidance_scale=guidance,
        sampler=sampler,
        device=device,
        ema=ema,
    )
    if as_json:
        print_json(found)
    else:
        out.print(found["path"], markup=False)


def grid(
    prompts: Prompts,
    to: Annotated[Path, typer.Option(help="The picture; with --follow, a folder.")],
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[CHECKPOINT]…",
            help="One row each: RUN, RUN/checkpoints/N, a diffusers folder, or the word base.",
        ),
    ] = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Repeats; with two or more, variety is measured."),
    ] = None,
    guidance: Annotated[
        list[float] | None, typer.Option(min=0, help="Guidance scale. Repeats.")
    ] = None,
    sampler: Annotated[list[str] | None, typer.Option(help=f"{_SAMPLER}. Repeats.")] = None,
    steps: Steps = None,
    embedding: Annotated[
        str | None,
        typer.Option(help="CLIP or SigLIP that variety is measured in; default: VAE latents."),
    ] = None,
    page: Annotated[
        bool, typer.Option(help="Write a page to zoom and compare in beside the picture.")
    ] = True,
    follow: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Draw each new checkpoint of a run.")
    ] = None,
    every: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds between looks of --follow; default 30.")
    ] = None,
    device: Device = None,
    ema: Average = False,
    as_json: Json = False,
) -> None:
    """Draw the same prompts with several models, side by side, as a picture and a page."""
    from sdprep.errors import UserError
    from sdtrain.grid import Axes, draw_grid
    from sdtrain.sample_files import read_prompts

    if bool(checkpoints) == bool(follow):
        raise UserError("grid needs either CHECKPOINT… or --follow RUN, and not both")
    if follow is None and every is not None:
        raise UserError("--every is for --follow")
    if follow is not None and not page:
        raise UserError("--no-page is not for --follow, which always writes its page")
    if follow is not None and ema:
        raise UserError("--ema is not for --follow, which draws the weights that train")
    axes = Axes(read_prompts(prompts), seeds or (), guidance or (), sampler or (), steps)
    if follow is None:
        assert checkpoints is not None
        found = draw_grid(
            *(checkpoints, axes, to),
            has_page=page,
            embedding=embedding,
            device=device,
            ema=ema,
        )
    else:
        from sdtrain.follow import Follower
        from sdtrain.follow import follow as keep_following

        follower = Follower(follow, axes, to, embedding=embedding, device=device)
        found = keep_following(follower, every or 30.0)
    if as_json:
        print_json(found)
    else:
        for path in (found["path"], found["page"]):
            if path:
                out.print(path, markup=False)


def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: Json = False,
) -> None:
    """Write a run's page anew: report.html, all in one file."""
    from sdtrain.page import write_page

    path = write_page(run_folder)
    if as_json:
        print_json({"path": str(path)})
    else:
        out.print(str(path), markup=False)
