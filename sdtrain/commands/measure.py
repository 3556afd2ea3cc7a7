"""Commands that measure checkpoints and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdprep.console import out, print_json
from sdtrain.commands.common import Json, Recipe, Set


def validate(
    recipe: Recipe,
    checkpoints: Annotated[
        list[Path],
        typer.Option(
            "--checkpoint",
            help="RUN/checkpoints/SAMPLES or best, a run for its newest, a diffusers folder, a "
            "single file, or a LoRA. Repeats.",
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option(help="Folder for the loss matrices; default: the output plus -validate."),
    ] = None,
    ema: Annotated[
        bool,
        typer.Option("--ema", help=r"Also measure the averaged weights, of runs with \[ema]."),
    ] = False,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Evaluate checkpoints and the base model on the recipe's probe, and compare them."""
    from sdtrain import validate as validation
    from sdtrain.recipe import load_train_recipe

    loaded = load_train_recipe(recipe, settings or ())
    found = validation.validate_checkpoints(loaded, checkpoints, to, ema=ema)
    if as_json:
        print_json(validation.to_json(found))
    else:
        out.print(validation.report(found), markup=False)


def compare(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="A [B …]",
            help="Run folders, checkpoints of runs, or .npz files; one run alone is compared "
            "with its own start.",
        ),
    ],
    to: Annotated[
        Path | None, typer.Option(help="Forest plot of the differences: .png, .svg or .pdf.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say whether B is better than A on the same probe, and how sure that is."""
    from sdtrain.compare import compare_paths, text

    pairs = compare_paths(paths)
    if to is not None:
        from sdtrain.forest import draw

        draw(pairs, to)
    if as_json:
        picture = {} if to is None else {"picture": str(to)}
        print_json({"comparisons": [pair.to_json() for pair in pairs], **picture})
    else:
        out.print(text(pairs), markup=False)


def lr_find(
    recipe: Recipe,
    start: Annotated[
        float | None, typer.Option("--from", min=0, help="Lowest rate; default: the recipe's / 30.")
    ] = None,
    end: Annotated[
        float | None, typer.Option("--upto", min=0, help="Highest; default: the recipe's × 100.")
    ] = None,
    steps: Annotated[int, typer.Option(min=20, help="Optimizer steps of the ramp.")] = 240,
    to: Annotated[
        Path | None,
        typer.Option(help="Run folder of the ramp; default: the output plus -lr-find."),
    ] = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Find learning-rate bounds with a ramp, and write recipes that use them."""
    from sdtrain.lr_find import find_lr, report
    from sdtrain.recipe import load_train_recipe

    loaded = load_train_recipe(recipe, settings or ())
    found = find_lr(loaded, start=start, end=end, steps=steps, to=to)
    if as_json:
        print_json(found)
    else:
        out.print(report(found), markup=False)


def loss_curve(
    recipe: Recipe,
    to: Annotated[Path, typer.Option(help="The picture to write; numbers go beside it.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="RUN/checkpoints/SAMPLES, or a run for its newest; default: the base model."
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images to measure.")] = 16,
    levels: Annotated[int, typer.Option(min=3, help="Noise levels per image.")] = 64,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Draw the loss against noise level and SNR, with the fit."""
    from sdtrain import loss_curve as curves
    from sdtrain.recipe import load_train_recipe

    loaded = load_train_recipe(recipe, settings or ())
    found = curves.loss_curve(loaded, checkpoint, images, levels, to)
    if as_json:
        print_json(found)
    else:
        out.print(curves.report(found), markup=False)
