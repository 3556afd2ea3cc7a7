"""Looking at a table, and undoing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdprep.commands.common import Json, Table, show_report


def status(table: Table, json_: Json = False) -> None:
    """Where things stand: what is done, left, rejected and why."""
    from sdprep.commands.text import status_text
    from sdprep.status import status as find
    from sdprep.table import PhotoTable

    found = find(PhotoTable.open(table))
    show_report(found, json_, status_text(found))


def history(table: Table, json_: Json = False) -> None:
    """Finished stages, oldest first, with the command that made them."""
    from dataclasses import asdict

    from sdprep.commands.text import history_text
    from sdprep.history import history as find
    from sdprep.table import PhotoTable

    stages = [asdict(stage) for stage in find(PhotoTable.open(table))]
    show_report({"stages": stages}, json_, history_text(stages))


def undo(
    table: Table,
    column: Annotated[
        str | None, typer.Argument(help="Take back its last change; none: the last stage.")
    ] = None,
    json_: Json = False,
) -> None:
    """Take back the last change of one column, and of no other."""
    from sdprep.history import undo as take_back
    from sdprep.table import PhotoTable

    stage = take_back(PhotoTable.open(table), column)
    names = [column] if column else list(stage.columns)
    report = {"stage": stage.name, "command": stage.command, "columns": names}
    show_report(report, json_, f"took back {', '.join(names)} as {stage.command!r} left it")


def show(
    table: Table,
    id_: Annotated[
        str | None, typer.Argument(metavar="ID", help="Id, its start, or a file name.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="Picture to write; without ID a sheet of what was decided.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images on the sheet or in the list.")] = 40,
    flagged: Annotated[
        bool, typer.Option("--flagged", help="Captions that the monitors flag, worst first.")
    ] = False,
    json_: Json = False,
) -> None:
    """Everything that is known about one image, or a picture of what was decided."""
    from sdprep.commands.text import row_text
    from sdprep.errors import UserError
    from sdprep.status import find_row, save_picture
    from sdprep.table import PhotoTable

    opened = PhotoTable.open(table)
    if flagged:
        _show_flagged(opened, id_, to, count, json_)
        return
    if id_ is None:
        if to is None:
            raise UserError("show needs an ID, or --to PNG for a sheet of what was decided")
        from sdprep.contact_sheet import draw_sheet

        report = draw_sheet(opened, to, count)
        show_report(report, json_, f"drew {report['shown']} of {report['images']} images: {to}")
        return
    row = find_row(opened, id_)
    if to:
        save_picture(opened, row, to)
    show_report(row, json_, row_text(row))


def _show_flagged(table: Any, id_: str | None, to: Path | None, count: int, json_: bool) -> None:
    from sdprep.caption_check import review_queue
    from sdprep.commands.text import flagged_text
    from sdprep.errors import UserError

    if id_ is not None:
        raise UserError("show takes an ID or --flagged, not both")
    found = review_queue(table, count)
    text = flagged_text(found)
    if to:
        from sdprep.contact_sheet import draw_pictures

        lines = {row["id"]: [row["file"], ", ".join(row["flags"])] for row in found["rows"]}
        draw_pictures(table, to, lines)
        found["path"] = str(to)
        text += f"\n\ndrew {len(lines)} images: {to}"
    show_report(found, json_, text)


def plugins(json_: Json = False) -> None:
    """Every source, scorer, tagger, detector, captioner and export, with its options."""
    from sdprep.plugins import PREP_KINDS, describe, describe_text

    found = describe(PREP_KINDS)
    show_report(found, json_, describe_text(found))
