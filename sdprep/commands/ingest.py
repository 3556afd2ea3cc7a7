"""Images in."""

from __future__ import annotations

from typing import Annotated

import typer

from sdprep.commands.common import Json, Set, Strict, Table, show_report


def ingest(
    source: Annotated[str, typer.Argument(help="Folder of images.")],
    table: Table,
    type_: Annotated[str, typer.Option("--type", help="Kind of source; auto looks.")] = "auto",
    storage: Annotated[str, typer.Option(help="auto, embed or link.")] = "auto",
    rehash: Annotated[bool, typer.Option("--rehash", help="Read every file again.")] = False,
    max_rejected: Annotated[
        float, typer.Option(min=0, max=1, help="Stop when more than this share is rejected.")
    ] = 0.2,
    settings: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is there.")] = False,
    strict: Strict = False,
    json_: Json = False,
) -> None:
    """Add images, and whatever text lies beside them."""
    from sdprep.commands.text import ingest_text
    from sdprep.stages import ingest_stage, preview_source, source_from
    from sdprep.table import PhotoTable

    found = source_from(source, type_, settings or [])
    if dry_run:
        report = preview_source(found)
        show_report(
            report, json_, f"{report['found']:,} images found, {report['ignored']:,} other files"
        )
        return
    how = {"storage": storage, "rehash": rehash, "max_rejected_share": max_rejected}
    report = ingest_stage(PhotoTable.open(table, create=True), found, **how)
    show_report(report, json_, ingest_text(report))
    if strict and report["rejected"]:
        raise typer.Exit(3)
