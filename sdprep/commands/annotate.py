"""Scores, tags, boxes and captions: one loop, four names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sdprep.commands.common import Json, Set, Strict, Table, show_report

With = Annotated[list[str], typer.Option("--with", help="Plugin to run. Repeats.")]
WithAny = Annotated[
    list[str] | None, typer.Option("--with", help="Tagger to run. Repeats; none: only compose.")
]
Model = Annotated[str | None, typer.Option(help="Hub id or folder; short for --set model=….")]
As = Annotated[str | None, typer.Option("--as", help="Name of the column, to keep two runs apart.")]
Redo = Annotated[bool, typer.Option("--redo", help="Forget what the column holds; start afresh.")]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Try the failed images again.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Images per call of the model.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; for plugins with one.")]
Where = Annotated[str | None, typer.Option(help="SQL predicate: only these images.")]
ListFile = Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="List of tags.")]


@dataclass(frozen=True)
class _Job:
    """What was asked for on the command line."""

    table: Path
    names: list[str]
    settings: list[str]
    as_name: str | None
    how: dict[str, Any]


def _job(
    table: Path,
    names: list[str] | None,
    shorthands: dict[str, str | None],
    settings: list[str] | None,
    as_name: str | None,
    **how: Any,
) -> _Job:
    given = [f"{key}={value}" for key, value in shorthands.items() if value is not None]
    return _Job(table, names or [], [*(settings or []), *given], as_name, how)


def _run(kind: str, job: _Job) -> tuple[Any, list[dict[str, Any]]]:
    from sdprep.stages import annotate_stage, configs_from_options
    from sdprep.table import PhotoTable

    configs = configs_from_options(kind, job.names, job.settings, job.as_name)
    table = PhotoTable.open(job.table)
    return table, annotate_stage(table, configs, **job.how)


def _finish(reports: list[dict[str, Any]], json_: bool, strict: bool, **more: Any) -> None:
    from sdprep.commands.text import annotators_text, tags_text

    texts = [annotators_text(reports)] if reports else []
    if "tags" in more:
        texts.append(tags_text(more["tags"]))
    alone = reports[0] if len(reports) == 1 else {}
    show_report({**alone, "annotators": reports, **more}, json_, "\n".join(texts))
    if strict and any(report["failed"] for report in reports):
        raise typer.Exit(3)


def annotator_command(kind: str, help_: str) -> Callable[..., None]:
    """The command that runs plugins of one kind."""

    def command(
        table: Table,
        with_: With,
        model: Model = None,
        settings: Set = None,
        as_name: As = None,
        redo: Redo = False,
        retry_failed: Retry = False,
        batch_size: Batch = None,
        device: Device = None,
        where: Where = None,
        strict: Strict = False,
        json_: Json = False,
    ) -> None:
        how = {"redo": redo, "retry_failed": retry_failed, "batch_size": batch_size, "where": where}
        shorthands = {"model": model, "device": device}
        _, reports = _run(kind, _job(table, with_, shorthands, settings, as_name, **how))
        _finish(reports, json_, strict)

    command.__doc__ = help_
    return command


def tag(
    table: Table,
    with_: WithAny = None,
    aliases: ListFile = None,
    implications: ListFile = None,
    blacklist: ListFile = None,
    model: Model = None,
    settings: Set = None,
    as_name: As = None,
    redo: Redo = False,
    retry_failed: Retry = False,
    batch_size: Batch = None,
    device: Device = None,
    where: Where = None,
    strict: Strict = False,
    json_: Json = False,
) -> None:
    """Run taggers, then compose the final tags of every image."""
    from sdprep.stages import compose_stage, tags_config

    how = {"redo": redo, "retry_failed": retry_failed, "batch_size": batch_size, "where": where}
    shorthands = {"model": model, "device": device}
    opened, reports = _run("tagger", _job(table, with_, shorthands, settings, as_name, **how))
    composed = compose_stage(opened, tags_config(opened, aliases, implications, blacklist))
    _finish(reports, json_, strict, tags=composed)


def tags_lint(
    file: Annotated[Path, typer.Argument(help="Alias or implication list.")], json_: Json = False
) -> None:
    """Find chains, cycles, conflicts, shortcuts and stale entries in an alias list."""
    from sdprep.commands.text import lint_text
    from sdprep.tag_lint import lint
    from sdprep.tag_lists import read_tag_list

    found = lint(read_tag_list(file)).to_json()
    show_report(found, json_, lint_text(found))


def tags_stats(
    table: Table,
    count: Annotated[int, typer.Option(min=1, help="How many tags to list.")] = 50,
    json_: Json = False,
) -> None:
    """Count the composed tags of the images that are kept."""
    from sdprep.status import tag_counts
    from sdprep.table import PhotoTable

    found = tag_counts(PhotoTable.open(table), count)
    lines = [f"{entry['count']:>8,}  {entry['name']}" for entry in found["tags"]]
    show_report(found, json_, "\n".join(lines) or "no tags yet; run sdprep tag")
