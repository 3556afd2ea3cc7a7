"""Commands that draw pictures and pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdprep.console import out, print_json
from sdtrain.commands.common import Json, Prompts


def sample(
    checkpoint: Annotated[
        Path, typer.Argument(help="RUN/checkpoints/SAMPLES, or a run for its newest.")
    ],
    prompts: Prompts,
    to: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    seed: Annotated[int | None, typer.Option(help="Keys the noise; default: the run's.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the sampler; default: the run's.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale; default: the run's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw prompts with a checkpoint."""
    from sdtrain.sampling import read_prompts, sample_checkpoint

    found = sample_checkpoint(
        checkpoint,
        read_prompts(prompts),
        to,
        seed=seed,
        num_inference_steps=steps,
        guidance_scale=guidance,
    )
    if as_json:
        print_json(found)
    else:
        out.print(found["path"], markup=False)


def grid(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT…", help="One row each.")],
    prompts: Prompts,
    to: Annotated[Path, typer.Option(help="The picture to write.")],
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", help="One column per prompt and seed. Repeats.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw the same prompts with several checkpoints, side by side."""
    from sdtrain.grid import draw_grid
    from sdtrain.sampling import read_prompts

    found = draw_grid(checkpoints, read_prompts(prompts), to, seeds or ())
    if as_json:
        print_json(found)
    else:
        out.print(found["path"], markup=False)


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
