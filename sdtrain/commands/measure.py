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
            "--checkpoint", help="RUN/checkpoints/SAMPLES, or a diffusers folder. Repeats."
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option(help="Folder for the loss matrices; default: the output plus -validate."),
    ] = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Evaluate checkpoints and the base model on the recipe's probe, and compare them."""
    from sdtrain import validate as validation
    from sdtrain.recipe import load_train_recipe

    loaded = load_train_recipe(recipe, settings or ())
    found = validation.validate_checkpoints(loaded, checkpoints, to)
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
    as_json: Json = False,
) -> None:
    """Say whether B is better than A on the same probe, and how sure that is."""
    from sdtrain.compare import compare_paths, text

    pairs = compare_paths(paths)
    if as_json:
        print_json({"comparisons": [pair.to_json() for pair in pairs]})
    else:
        out.print(text(pairs), markup=False)
