"""Arguments and options that many commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdprep.console import out, print_json

Table = Annotated[Path, typer.Argument(help="The table, a folder that ends in .lance.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="An option, as key=value. Repeats.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit 3 if any image failed.")]


def show_report(report: Any, as_json: bool, text: str) -> None:
    """Print a report on stdout: as JSON, or as text for people."""
    if as_json:
        print_json(report)
    else:
        out.print(text, markup=False)
