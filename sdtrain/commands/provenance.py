"""Commands that say how a model was made, and pass it on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdprep.console import out, print_json
from sdtrain.commands.common import Json

Model = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A checkpoint, a run for its newest, a model folder, or a .safetensors file.",
    ),
]


def show(checkpoint: Model, as_json: Json = False) -> None:
    """Say how a model was made: recipe, data, what was trained, evaluations, versions."""
    from sdtrain.provenance import read_provenance
    from sdtrain.provenance_text import provenance_text

    found = read_provenance(checkpoint)
    if as_json:
        print_json(found.to_json())
    else:
        out.print(provenance_text(found), markup=False, soft_wrap=True)


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="As for sdtrain show.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="As for sdtrain show.")],
    as_json: Json = False,
) -> None:
    """Say what two models or runs did differently, and how far their tensors are apart."""
    from sdtrain.provenance import difference, read_provenance
    from sdtrain.provenance_text import difference_text

    found = difference(read_provenance(first), read_provenance(second))
    if as_json:
        print_json(found)
    else:
        out.print(difference_text(found), markup=False, soft_wrap=True)


def push(
    checkpoint: Model,
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Model on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private/--public", help="Visibility of a repository that is made.")
    ] = True,
    license: Annotated[
        str | None, typer.Option(help="Licence named on the card, such as openrail++.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Send a trained model to the Hub, with a card that says how it was made."""
    from sdtrain.push import push_model

    found = push_model(checkpoint, repo, private=private, license=license)
    if as_json:
        print_json(found)
    else:
        out.print(found["url"], markup=False)
