"""What the commands of `sdtrain` share: the names and types of their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[Path, typer.Argument(help="The recipe, a TOML file.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a recipe key; KEY= takes it out. Repeats."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Average = Annotated[
    bool,
    typer.Option("--ema", help=r"Take the averaged weights of checkpoints of a run with \[ema]."),
]
Prompts = Annotated[
    Path, typer.Option(help="Text file, one prompt a line; an empty line is the empty prompt.")
]
