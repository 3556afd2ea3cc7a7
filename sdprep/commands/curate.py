"""Duplicates, selection, split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdprep.commands.common import Json, Table, show_report


def dedup(
    table: Table,
    near: Annotated[bool, typer.Option("--near/--no-near", help="Also near duplicates.")] = True,
    keep: Annotated[
        str, typer.Option(help="best rejects the rest of a group; all rejects none.")
    ] = "best",
    accept_large_groups: Annotated[
        bool,
        typer.Option("--accept-large-groups", help="Go on though a group is very big."),
    ] = False,
    json_: Json = False,
) -> None:
    """Find exact and near duplicates; keep the best of each group."""
    from sdprep.commands.text import dedup_text
    from sdprep.duplicates import DuplicatesConfig
    from sdprep.recipe import validate
    from sdprep.stages import duplicates_stage
    from sdprep.table import PhotoTable

    given = {"near": near, "keep": keep, "accept_large_groups": accept_large_groups}
    config = validate(given, DuplicatesConfig, "the command line")
    report = duplicates_stage(PhotoTable.open(table), config)
    show_report(report, json_, dedup_text(report))


def select(
    table: Table,
    where: Annotated[str | None, typer.Option(help="SQL predicate; the rest is rejected.")] = None,
    reason: Annotated[str | None, typer.Option(help="Reason to write down.")] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Take the last selection back.")] = False,
    json_: Json = False,
) -> None:
    """Reject the images that do not match; they stay in the table, with the reason."""
    from sdprep.errors import UserError
    from sdprep.select import SelectConfig
    from sdprep.stages import select_stage
    from sdprep.table import PhotoTable

    if where is None and not reset:
        raise UserError("select needs --where EXPR or --reset")
    config = SelectConfig(where=where, reason=reason) if where else None
    report = select_stage(PhotoTable.open(table), config, reset=reset)
    show_report(report, json_, f"{report['kept']:,} images match, {report['rejected']:,} rejected")


def split(
    table: Annotated[Path, typer.Argument(help="The table; to verify, also a published folder.")],
    validation: Annotated[
        float | None, typer.Option(help="Share of the images, such as 0.05; automatic without.")
    ] = None,
    validation_count: Annotated[int | None, typer.Option(help="Number of images.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
    stratify: Annotated[
        str, typer.Option(help="Same mix on both sides: of source,bucket,score; or none.")
    ] = "source,bucket,score",
    manual: Annotated[
        str | None, typer.Option(help="A column, ids:FILE, folder:NAME or source decides.")
    ] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Forget the sides stored so far.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the split; change nothing.")
    ] = False,
    json_: Json = False,
) -> None:
    """Assign train and validation by group, so that no near duplicate is on both sides."""
    from sdprep.commands.text import split_text, verify_text
    from sdprep.recipe import validate
    from sdprep.split import SplitConfig
    from sdprep.stages import split_stage
    from sdprep.table import PhotoTable

    if verify:
        from sdprep.certificate import verify as verify_split

        found = verify_split(table).to_json()
        show_report(found, json_, verify_text(found))
        if found["problems"]:
            raise typer.Exit(2)
        return
    given = {"validation": validation, "validation_count": validation_count, "manual": manual}
    given = {key: value for key, value in given.items() if value is not None}
    parts = [part.strip() for part in stratify.split(",") if part.strip() not in ("", "none")]
    config = validate({**given, "seed": seed, "stratify": parts}, SplitConfig, "the command line")
    report = split_stage(PhotoTable.open(table), config, redo=redo)
    show_report(report, json_, split_text(report))
