"""The `sdtrain` command: every verb, where it lives, and an example of it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from sdprep.console import run_app
from sdprep.errors import UserError
from sdtrain.commands import cache, draw, files, measure, provenance, train
from sdtrain.disk import in_words

app = typer.Typer(
    name="sdtrain",
    help="Fine-tune Stable Diffusion models, with validation that can be trusted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(name: str, command: Callable[..., Any], example: str, to: typer.Typer = app) -> None:
    to.command(name, epilog=f"Example: {example}")(command)


_add(
    "run",
    train.run,
    "sdtrain run recipe.toml --set train.samples=64 (run it again to resume)",
)
_add("check", train.check, "sdtrain check recipe.toml")
_add("inspect", train.inspect, "sdtrain inspect recipe.toml -n 2 --to look/")
_add("cache", cache.cache, "sdtrain cache recipe.toml && sdtrain cache verify recipe.toml")
_add(
    "validate",
    measure.validate,
    "sdtrain validate recipe.toml --checkpoint runs/a/checkpoints/64",
)
_add("compare", measure.compare, "sdtrain compare runs/first runs/second")
_add("sweep", train.sweep, "sdtrain sweep recipe.toml --over train.lr=1e-6,3e-6,1e-5")
_add("loss-curve", measure.loss_curve, "sdtrain loss-curve recipe.toml --to curve.png")
_add("lr-find", measure.lr_find, "sdtrain lr-find recipe.toml --from 1e-8 --upto 1e-4")
_add("sample", draw.sample, "sdtrain sample runs/first --prompts prompts.txt --to pictures/")
_add(
    "grid",
    draw.grid,
    "sdtrain grid base runs/a/checkpoints/16 runs/a --prompts prompts.txt --seed 1 --seed 2 "
    "--to grid.png (or: --follow runs/a --to look/)",
)
_add("report", draw.report, "sdtrain report runs/first")
_add(
    "export",
    files.export,
    "sdtrain export runs/first --format single-file --to first.safetensors --dtype fp16",
)
_add("show", provenance.show, "sdtrain show runs/first")
_add("diff", provenance.diff, "sdtrain diff runs/first runs/second")
_add("push", provenance.push, "sdtrain push runs/first user/first --private")
_add("tiny", files.tiny, "sdtrain tiny FAMILY models/tiny (families: sdtrain plugins)")
_add("plugins", files.plugins, "sdtrain plugins --json")


def _app() -> None:
    """The commands; what a disk refuses is said in words, whichever of them was writing."""
    try:
        app()
    except Exception as error:
        refused = None if isinstance(error, UserError) else in_words(error)
        if refused is None:
            raise
        raise refused from error


def main() -> None:
    """Entry point of the console script."""
    # bitsandbytes tells everyone who imports it what it has not got.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    # transformers warns about torchvision, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        run_app(_app)
    except SystemExit as end:
        world = sys.modules.get("sdtrain.world")  # there only if the command trained
        if world is not None:
            world.end_process(end.code)
        raise


if __name__ == "__main__":
    main()
