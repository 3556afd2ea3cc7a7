"""Prompts, publishing, exports, whole recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdprep.commands.common import DryRun, Json, Set, Strict, Table, show_report


def prompts(
    table: Table,
    policy: Annotated[Path | None, typer.Option(help=r"TOML file with a \[policy].")] = None,
    compare: Annotated[Path | None, typer.Option(help="A second policy beside it.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 5,
    visit: Annotated[int, typer.Option(min=0, help="How often the image was drawn before.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the training run.")] = 0,
    stats: Annotated[bool, typer.Option("--stats", help="Histograms in place of texts.")] = False,
    to: Annotated[Path | None, typer.Option(help="Also draw the statistics as PNG.")] = None,
    json_: Json = False,
) -> None:
    """Show the exact text that the trainer will see."""
    from sdprep.commands.prompt_text import preview, statistics
    from sdprep.table import PhotoTable

    opened = PhotoTable.open(table)
    files = [policy, compare] if compare else [policy]
    found, text = (
        statistics(opened, files, seed, to) if stats else preview(opened, files, count, visit, seed)
    )
    show_report(found, json_, text)


def publish(
    table: Table,
    to: Annotated[
        Path | None,
        typer.Option(help="Folder to write; with --push alone, TABLE-prepared beside the table."),
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Send it to the Hub, too.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private/--public", help="Visibility of a repository that is made.")
    ] = True,
    format_: Annotated[str, typer.Option("--format", help="parquet or lance.")] = "parquet",
    policy: Annotated[Path | None, typer.Option(help=r"TOML file with a \[policy].")] = None,
    settings: Set = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Write the prepared data set: a folder that load_dataset opens, and a data set on the Hub."""
    from sdprep.commands.prompt_text import read_policy
    from sdprep.commands.text import publish_preview_text, publish_text
    from sdprep.publish import PublishConfig
    from sdprep.recipe import options
    from sdprep.stages import publish_preview, publish_stage
    from sdprep.table import PhotoTable

    given = {"to": str(to) if to else None, "push": push, "private": private, "format": format_}
    config = options(PublishConfig, settings or [], **given)
    opened = PhotoTable.open(table)
    if dry_run:
        found = publish_preview(opened, config)
        show_report(found, json_, publish_preview_text(found))
        return
    report = publish_stage(opened, config, read_policy(policy, opened))
    show_report(report, json_, publish_text(report))


def export(
    table: Table,
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    format_: Annotated[str, typer.Option("--format", help="kohya, webdataset or imagefolder.")],
    settings: Set = None,
    json_: Json = False,
) -> None:
    """Write images and text in the layout of another trainer."""
    from sdprep.commands.text import export_text
    from sdprep.export import export as write
    from sdprep.plugins import config_for
    from sdprep.recipe import options
    from sdprep.table import PhotoTable

    config = options(config_for("export", format_), settings or [], type=format_)
    report = write(PhotoTable.open(table), to, config).to_json()  # type: ignore[arg-type]
    show_report(report, json_, export_text(report))


def run(
    recipe: Annotated[Path, typer.Argument(help="TOML file.")],
    settings: Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    from_stage: Annotated[
        str | None, typer.Option("--from", help="Leave earlier stages out.")
    ] = None,
    strict: Strict = False,
    json_: Json = False,
) -> None:
    """Run all stages of a recipe; each does only what is missing."""
    from sdprep.commands.text import plan_text, stage_text
    from sdprep.pipeline import plan, run_recipe
    from sdprep.prep_recipe import PrepRecipe
    from sdprep.recipe import load_recipe

    loaded = load_recipe(recipe, PrepRecipe, settings or [])
    if dry_run:
        steps = plan(loaded)
        stages = [{"stage": name, **report} for name, report in steps]
        show_report({"dry_run": True, "stages": stages}, json_, plan_text(steps))
        return

    def tell(name: str, report: dict[str, Any]) -> None:
        if not json_:
            show_report(report, False, stage_text(name, report))

    done = run_recipe(loaded, recipe.read_text("utf-8-sig"), from_stage, tell)
    if json_:
        show_report({"stages": [{"stage": name, **report} for name, report in done]}, True, "")
    failed = sum(a["failed"] for _, report in done for a in report.get("annotators", []))
    rejected = sum(report.get("rejected", 0) for name, report in done if name == "ingest")
    if strict and (failed or rejected):
        raise typer.Exit(3)
