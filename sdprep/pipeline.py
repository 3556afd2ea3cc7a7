"""A whole recipe: its stages in order, each doing only what is missing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sdprep.console import say
from sdprep.errors import RecipeError, UserError, nearest
from sdprep.hub_access import open_hub
from sdprep.lance_folder import has_version
from sdprep.prep_recipe import PrepRecipe
from sdprep.stages import (
    Report,
    annotate_stage,
    compose_stage,
    duplicates_stage,
    ingest_stage,
    publish_stage,
    select_stage,
    split_stage,
)
from sdprep.table import PhotoTable
from sdprep.table_policy import remember_policy

STAGES = ("ingest", "annotate", "tags", "select", "dedup", "split", "publish")
"""Selection comes before duplicates: the best of a group is the best of what is wanted."""


def run_recipe(
    recipe: PrepRecipe,
    recipe_text: str = "",
    from_stage: str | None = None,
    tell: Callable[[str, Report], None] = lambda name, report: None,
) -> list[tuple[str, Report]]:
    """Run all stages of a recipe in order; each does only what is missing.

    Args:
        recipe: what to do.
        recipe_text: its text, for the card of the published data set.
        from_stage: leave out the stages before this one.
        tell: called with every stage and its report as soon as it is done.

    Returns:
        (stage, report) of every stage that ran.
    """
    wanted = _from(from_stage)
    if recipe.publish is not None and recipe.publish.push:
        open_hub(recipe.publish.push)  # a token that is missing is told now, not at the end
    table = PhotoTable.open(recipe.table, create="ingest" in wanted and bool(recipe.source))
    remember_policy(table, recipe.policy)
    done = []
    for name, work in _work(recipe, recipe_text, table):
        if name in wanted:
            say(f"[bold]{name}[/bold]")
            report = work()
            tell(name, report)
            done.append((name, report))
    return done


def _from(from_stage: str | None) -> tuple[str, ...]:
    if from_stage is None:
        return STAGES
    if from_stage not in STAGES:
        near = nearest(from_stage, STAGES)
        hint = f"Did you mean {near}? " if near else ""
        raise UserError(f"no stage {from_stage!r}", f"{hint}Stages: {', '.join(STAGES)}.")
    return STAGES[STAGES.index(from_stage) :]


def _work(
    recipe: PrepRecipe, recipe_text: str, table: PhotoTable
) -> list[tuple[str, Callable[[], Report]]]:
    """The stages that the recipe asks for, in order."""
    work: list[tuple[str, Callable[[], Report]]] = []
    for config in recipe.source:
        source = config.build()
        work.append(("ingest", partial(ingest_stage, table, source, storage=recipe.storage)))
    jobs = [(kind, name, _seeded(each, recipe.seed)) for kind, name, each in recipe.annotators()]
    if jobs:
        work.append(("annotate", lambda: {"annotators": annotate_stage(table, jobs)}))
    if recipe.tags is not None or recipe.tag or recipe.caption:
        work.append(("tags", lambda: compose_stage(table, recipe.tags)))
    if recipe.select is not None:
        work.append(("select", lambda: select_stage(table, recipe.select)))
    if recipe.duplicates is not None:
        work.append(("dedup", lambda: duplicates_stage(table, recipe.duplicates)))
    if recipe.split is not None:
        split = _seeded(recipe.split, recipe.seed)
        work.append(("split", lambda: split_stage(table, split)))
    if recipe.publish is not None:
        publish = _seeded(recipe.publish, recipe.seed)
        work.append(("publish", lambda: publish_stage(table, publish, recipe.policy, recipe_text)))
    return work


def _seeded(config: Any, seed: int) -> Any:
    """A section with the recipe's seed, unless it has its own."""
    if "seed" in type(config).model_fields and "seed" not in config.model_fields_set:
        return config.model_copy(update={"seed": seed})
    return config


def plan(recipe: PrepRecipe) -> list[tuple[str, Report]]:
    """What a run would do, without doing it: stage by stage, with counts where they are known."""
    table = PhotoTable.open(recipe.table) if has_version(recipe.table) else None
    steps: list[tuple[str, Report]] = []
    for config in recipe.source:
        settings = config.model_dump(exclude_none=True, mode="json")
        if isinstance(path := getattr(config, "path", None), Path) and not path.exists():
            raise RecipeError(f"source {config.type}: there is no folder {path}")
        steps.append(("ingest", settings))
    for _, column, _ in recipe.annotators():
        steps.append(("annotate", {"column": column, **_left(table, column)}))
    for name in ("tags", "select", "duplicates", "split", "publish"):
        section = getattr(recipe, name)
        if section is not None:
            shown = section.model_dump(exclude_none=True, exclude_unset=True, mode="json")
            steps.append(("dedup" if name == "duplicates" else name, shown))
    return steps


def _left(table: PhotoTable | None, column: str) -> Report:
    if table is None:
        return {"images": "all that are ingested"}
    accepted = "reject_ingest IS NULL"
    open_rows = f"{accepted} AND {column} IS NULL" if table.has(column) else accepted
    return {"images": table.count(open_rows), "of": table.count(accepted)}
