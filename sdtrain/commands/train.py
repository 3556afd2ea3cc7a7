"""Commands that train, or say what training would do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sdprep.console import out, print_json
from sdtrain.commands.common import Json, Recipe, Set


def run(
    recipe: Recipe,
    settings: Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done (sdtrain check).")
    ] = False,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|PATH", help="Where to go on from.")
    ] = "auto",
    accept_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Go on although this recipe key changed. Repeats."),
    ] = None,
    final: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Train on the held-out images too, for the length that this run was best at.",
        ),
    ] = None,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Do not write the finished model beside the run.")
    ] = False,
    num_processes: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Processes on this machine, one GPU each."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train; run the same command again to resume."""
    from sdtrain.recipe import load_train_recipe

    loaded = load_train_recipe(recipe, settings or ())
    if final is not None:
        from sdtrain.final import final_recipe

        loaded = final_recipe(loaded, final)
    if dry_run:
        _check(loaded, as_json, num_processes)
        return
    if num_processes is not None and num_processes > 1:
        from sdtrain.launch import launch

        arguments = ["run", str(recipe), "--resume", resume, *(["--json"] if as_json else [])]
        arguments += [word for setting in settings or () for word in ("--set", setting)]
        arguments += [word for key in accept_change or () for word in ("--accept-change", key)]
        arguments += ["--no-model"] if no_model else []
        arguments += ["--final", str(final)] if final is not None else []
        raise typer.Exit(launch(arguments, num_processes))
    _train(loaded, resume, accept_change or (), keeps_model=not no_model, as_json=as_json)


def _train(
    loaded: Any, resume: str, accept: Sequence[str], *, keeps_model: bool, as_json: bool
) -> None:
    from sdtrain.launch import end_with_parent
    from sdtrain.trainer import train
    from sdtrain.world import connected

    end_with_parent()
    with connected() as world:
        outcome = train(loaded, resume=resume, accept=accept, keeps_model=keeps_model, world=world)
        if not world.is_main:
            return
        if as_json:
            print_json(outcome.to_json())
        elif outcome.is_finished:
            out.print(f"{outcome.output}: {outcome.samples_seen:,} samples done", markup=False)


def check(recipe: Recipe, settings: Set = None, as_json: Json = False) -> None:
    """Say everything that can be known without training."""
    from sdtrain.recipe import load_train_recipe

    _check(load_train_recipe(recipe, settings or ()), as_json)


def _check(recipe: Any, as_json: bool, num_processes: int | None = None) -> None:
    from sdtrain.check import describe
    from sdtrain.check_text import check_text
    from sdtrain.setup import open_setup

    setup = open_setup(recipe)
    found = describe(setup, num_processes or 1)
    if as_json:
        print_json(found)
    else:
        out.print(check_text(found, setup.plan.table()), markup=False)


def inspect(
    recipe: Recipe,
    to: Annotated[Path, typer.Option(help="Folder for the pictures and the page.")],
    count: Annotated[int, typer.Option("-n", min=1, help="Optimizer steps to show.")] = 4,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Show the first batches as the model sees them."""
    from sdtrain.inspect import inspect as write
    from sdtrain.recipe import load_train_recipe
    from sdtrain.setup import open_setup

    found = write(open_setup(load_train_recipe(recipe, settings or ())), to, count)
    if as_json:
        print_json(found)
    else:
        out.print(found["path"], markup=False)


def sweep(
    recipe: Recipe,
    over: Annotated[
        list[str], typer.Option(metavar="KEY=A,B,…", help="Recipe key and its values. Repeats.")
    ],
    to: Annotated[
        Path | None, typer.Option(help="Folder of the runs; default: the output plus -sweep.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Runs at a time, one per GPU.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the runs.")] = False,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Run a small grid of recipes and compare them; run it again to go on."""
    from sdtrain import sweep as sweeping

    cells = sweeping.plan_cells(recipe, settings or (), over, to)
    if dry_run:
        found: dict[str, Any] = {"runs": [{"name": c.name, "path": str(c.output)} for c in cells]}
        words = "\n".join(f"{run['name']}  {run['path']}" for run in found["runs"])
    else:
        failed = sweeping.run_cells(recipe, cells, gpus)
        found = sweeping.compare_cells(cells, failed)
        words = sweeping.report(found)
    if as_json:
        print_json(found)
    else:
        out.print(words, markup=False)
    if not dry_run and failed:
        raise typer.Exit(2)
