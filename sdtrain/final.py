"""Train once more on everything, for the length that a run with held-out images has found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdprep.console import warn
from sdprep.errors import DataError, UserError
from sdprep.recipe import load_recipe, validate
from sdtrain.course import BEST, meant
from sdtrain.recipe import TrainRecipe
from sdtrain.run_folder import RunFolder
from sdtrain.trackers.jsonl import read_metrics

MAY_DIFFER = (
    *("output", "sampling", "checkpoint", "validation", "tracking", "cache", "distributed"),
)
"""Sections that do not touch what a given number of samples does to the model."""


def final_recipe(recipe: TrainRecipe, run: Path) -> TrainRecipe:
    """The recipe of the last training: train and validation together, as long as `run` was best.

    The rates are those that the run had at each moment, so its schedule keeps its length and only
    the end comes earlier.

    Args:
        recipe: that of the run, or one like it.
        run: a finished run folder that was evaluated on held-out images.

    Raises:
        UserError: it was trained otherwise, or found no length.
    """
    length = best_length(run)
    found = load_recipe(RunFolder(run).recipe, TrainRecipe)
    _must_be_alike(recipe, found, run)
    data = recipe.resolved()
    data["output"] = str(recipe.output.with_name(f"{recipe.output.name}-final"))
    data["data"]["splits"] = "all"
    train = {key: value for key, value in data["train"].items() if key != "epochs"}
    planned = planned_length(run)
    data["train"] = {**train, "samples": length, "schedule_samples": planned}
    data["validation"] = {**data["validation"], "images": 0, "probe": None, "stop": None}
    warn(
        f"the held-out images are trained on as well, for {length:,} samples, where {run} was best "
        f"(of {planned:,}); nothing is left that could tell whether this run overfits. Judge it by "
        f"its pictures, and {run} by its numbers"
    )
    return validate(data, TrainRecipe, f"the recipe of --final {run}")


def best_length(run: Path) -> int:
    """Samples at the best evaluation of a run.

    Raises:
        DataError: it is no run, or was not evaluated on held-out images.
        UserError: it was best before any training.
    """
    folder = RunFolder(run)
    pointer = folder.checkpoints / BEST
    last = next((x for x in reversed(read_metrics(folder.metrics)) if x["kind"] == "verdict"), None)
    best: Any = (last or {}).get("best")
    if best is None and pointer.is_file():
        best = {"samples_seen": int(meant(pointer).name)}
    if not folder.recipe.is_file() or best is None:
        raise DataError(
            f"--final {run}: it has no best evaluation on held-out images",
            "Name the folder of a finished run whose data set has a validation split.",
        )
    if not best["samples_seen"]:
        raise UserError(
            f"--final {run}: its held-out loss was lowest before any training",
            "Find a rate that learns first: sdtrain lr-find RECIPE.",
        )
    return int(best["samples_seen"])


def planned_length(run: Path) -> int:
    """Samples that a run was planned for, which its schedule was made for."""
    facts = json.loads(RunFolder(run).environment.read_text(encoding="utf-8"))
    return int(facts.get("schedule_samples") or facts["total_samples"])


def _must_be_alike(recipe: TrainRecipe, found: TrainRecipe, run: Path) -> None:
    """A length found under other rates or on other data says nothing here."""
    ours, theirs = recipe.resolved(), found.resolved()
    differing = [
        key
        for key in sorted({*ours, *theirs} - {*MAY_DIFFER, "data", "train"})
        if ours.get(key) != theirs.get(key)
    ]
    for section, free in (("data", ("workers", "micro_batch_size", "splits")), ("train", ())):
        mine, its = ours[section], theirs[section]
        differing += [
            f"{section}.{key}"
            for key in sorted({*mine, *its} - set(free))
            if mine.get(key) != its.get(key)
        ]
    if differing:
        raise UserError(
            f"--final {run}: it was trained with another {', '.join(differing)}",
            f"Use its own recipe: sdtrain run {RunFolder(run).recipe} --final {run}",
        )
