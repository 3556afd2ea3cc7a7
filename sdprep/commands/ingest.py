"""Images in."""

from __future__ import annotations

from typing import Annotated

import typer

from sdprep.commands.common import DryRun, Json, Set, Strict, Table, show_report

Place = Annotated[str, typer.Argument(metavar="SOURCE", help="Folder of images.")]
Kind = Annotated[str, typer.Option("--type", help="Kind of source; auto looks.")]
Storage = Annotated[str, typer.Option(help="auto, embed or link.")]
Rehash = Annotated[bool, typer.Option("--rehash", help="Read every file again.")]
MinSide = Annotated[int | None, typer.Option(min=1, help="Shortest accepted side, in pixels.")]
FirstFrame = Annotated[bool, typer.Option("--first-frame", help="Take animations' first frame.")]
Share = Annotated[
    float | None, typer.Option(min=0, max=1, help="Stop when more than this share is rejected.")
]


def ingest(
    source: Place,
    table: Table,
    type_: Kind = "auto",
    storage: Storage = "auto",
    rehash: Rehash = False,
    min_side: MinSide = None,
    first_frame: FirstFrame = False,
    max_rejected: Share = None,
    settings: Set = None,
    dry_run: DryRun = False,
    strict: Strict = False,
    json_: Json = False,
) -> None:
    """Add images, and whatever text lies beside them."""
    from sdprep.commands.text import ingest_text
    from sdprep.errors import UserError
    from sdprep.ingest_report import TooManyRejected
    from sdprep.stages import ingest_stage, preview_source, source_from
    from sdprep.table import PhotoTable

    if storage not in ("auto", "embed", "link"):
        raise UserError(f"--storage {storage}: expected auto, embed or link")
    limits = {"min_side": min_side, "max_rejected": max_rejected, "first_frame": first_frame}
    given = {key: value for key, value in limits.items() if value not in (None, False)}
    found = source_from(source, type_, settings or [], given)
    if dry_run:
        report = preview_source(found)
        text = f"found {report['found']:,}, other files {report['ignored']:,}"
        show_report(report, json_, text)
        return
    try:
        report = ingest_stage(
            PhotoTable.open(table, create=True), found, storage=storage, rehash=rehash
        )
    except TooManyRejected as error:
        if json_:
            show_report({**error.report.to_json(), "error": error.message}, True, "")
        raise
    show_report(report, json_, ingest_text(report))
    if strict and report["rejected"]:
        raise typer.Exit(3)
