"""`sdtrain cache RECIPE` and `sdtrain cache verify RECIPE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdprep.console import megabytes, out, print_json, say
from sdprep.errors import DataError, UserError
from sdtrain.commands.common import Json, Set

VERIFY = "verify"


def cache(
    words: Annotated[
        list[str], typer.Argument(metavar="[verify] RECIPE", help="The recipe, a TOML file.")
    ],
    settings: Set = None,
    sample: Annotated[
        int, typer.Option(min=0, help="verify: entries of each cache to encode again.")
    ] = 16,
    repair: Annotated[
        bool, typer.Option("--repair", help="verify: drop bad entries, to be encoded anew.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Encode latents and text ahead of a run, or verify what is kept.

    `sdtrain cache RECIPE` encodes what is missing; stop it and run it again to go on.
    `sdtrain cache verify RECIPE` compares all checksums and encodes a sample again.
    """
    is_verify, recipe = _meant(words)
    if repair and not is_verify:
        raise UserError("--repair belongs to sdtrain cache verify RECIPE")
    from sdtrain.cache.fill import fill
    from sdtrain.cache.verify import verify
    from sdtrain.recipe import load_train_recipe
    from sdtrain.setup import open_setup

    setup = open_setup(load_train_recipe(recipe, settings or ()))
    if is_verify:
        _verified(verify(setup, sample=sample, repair=repair), repair, as_json)
        return
    found = fill(setup)
    if as_json:
        print_json(found)
        return
    for name in ("latents", "text"):
        if found[name] is not None:
            out.print(_filled(name, found[name]), markup=False)
    out.print(found["path"], markup=False)


def _meant(words: list[str]) -> tuple[bool, Path]:
    """Whether to verify, and the recipe."""
    if len(words) == 1 and words[0] != VERIFY:
        return False, Path(words[0])
    if len(words) == 2 and words[0] == VERIFY:
        return True, Path(words[1])
    raise UserError(
        f"sdtrain cache takes a recipe, found: {' '.join(words)}",
        "Use sdtrain cache RECIPE, or sdtrain cache verify RECIPE.",
    )


def _filled(name: str, counts: dict[str, Any]) -> str:
    return (
        f"{name}: {counts['wanted']:,} wanted, {counts['found']:,} found, {counts['missing']:,} "
        f"missing, {counts['encoded']:,} encoded; {counts['entries']:,} entries take "
        f"{megabytes(counts['bytes'])}"
    )


def _verified(found: dict[str, Any], repair: bool, as_json: bool) -> None:
    if as_json:
        print_json(found)
    bad = []
    for name in ("latents", "text"):
        if found[name] is None:
            continue
        part = found[name]
        bad += [f"{name}: {each['label']}: {each['why']}" for each in part["bad"]]
        if not as_json:
            most = part["most_difference"]
            moved = "" if most is None else f", largest difference {most:.2g}"
            out.print(
                f"{name}: {part['entries']:,} entries, {len(part['bad']):,} bad; "
                f"{part['encoded_again']:,} encoded again{moved}",
                markup=False,
            )
    if not bad:
        return
    words = f"{found['path']}: {len(bad)} bad entries\n  " + "\n  ".join(bad)
    if not repair:
        raise DataError(words, "sdtrain cache verify RECIPE --repair drops them.")
    say(words)
    say(f"{len(bad)} bad entries were dropped; sdtrain cache RECIPE encodes them anew")
