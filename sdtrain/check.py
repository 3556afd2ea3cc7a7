"""Everything about a run that can be known without training it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sdprep.buckets import fit
from sdtrain.buckets import Assignment, Slot, micro_batches
from sdtrain.cache.census import census
from sdtrain.check_facts import (
    device_bytes,
    num_groups_in_both,
    num_in_both,
    precision_conflicts,
    sketch,
)
from sdtrain.dataset import Rows, policy_words
from sdtrain.memory import checkpoint_bytes, memory
from sdtrain.planned import num_due, rates_at
from sdtrain.prior import PriorOrder
from sdtrain.probe_sets import num_images, usual_levels
from sdtrain.recipe import TrainRecipe
from sdtrain.resolution import expected_percent
from sdtrain.run_folder import versions
from sdtrain.setup import Setup, gpu_without_torch, open_setup
from sdtrain.stored_formats import conflicts, model_files, stored_formats
from sdtrain.tensor_hashes import part_hashes
from sdtrain.wording import FORWARDS_PER_TRAINING_SAMPLE

CHUNK_ROWS = 2_000
CURVE_POINTS = 9
SHOWN_PROMPTS = 3


def check(recipe: TrainRecipe) -> dict[str, Any]:
    """Open everything a recipe names, train nothing, and say what a run would do.

    Raises:
        UserError: what would stop the run.
    """
    setup = open_setup(recipe)
    setup.optimizer()  # some refuse what they are given
    return describe(setup)


def describe(setup: Setup, num_processes: int = 1) -> dict[str, Any]:
    """What a run would do, as JSON holds it.

    Args:
        setup: the run.
        num_processes: how many would train it together.
    """
    slots, chunks = _first_slots(setup), _chunks(setup)
    longest = max((int(count) for count in chunks["rows_by_chunks"]), default=1)
    return {
        "recipe": setup.recipe.resolved(),
        "versions": versions(),
        "device": str(setup.device),
        "gpu_without_torch": gpu_without_torch(),
        "world": _world(setup, num_processes),
        "model": _model(setup),
        "data": _data(setup),
        "buckets": _buckets(setup.data.train, setup.train, setup.recipe.data.run_samples),
        "chunks": chunks,
        "freeze": {
            "rows": [row.__dict__ for row in setup.plan.rows],
            "notes": setup.plan.notes,
        },
        "phases": _phases(setup),
        "length": _length(setup, slots),
        "learning_rate": _learning_rate(setup),
        "evaluation": _evaluation(setup),
        "cache": census(setup),
        "conflicts": _conflicts(setup),
        "dropped": _dropped(setup),
        "memory": memory(setup, longest),
        "device_bytes": device_bytes(setup.device),
        "checkpoint_bytes": checkpoint_bytes(setup),
        "prompts": _prompts(setup, slots[:SHOWN_PROMPTS]),
    }


def _world(setup: Setup, num_processes: int) -> dict[str, Any]:
    batch = setup.recipe.data.batch_size
    gpus = torch.cuda.device_count() if setup.device.type == "cuda" else 0
    return {
        "processes": num_processes,
        "gpus": gpus,
        "engine": setup.recipe.distributed.engine,
        "samples_per_process": [batch // num_processes, -(-batch // num_processes)],
    }


def _first_slots(setup: Setup) -> list[Slot]:
    stream = setup.order.slots()
    wanted = max(SHOWN_PROMPTS, min(setup.recipe.data.batch_size, setup.total_samples))
    return [next(stream) for _ in range(wanted)]


def _model(setup: Setup) -> dict[str, Any]:
    family = setup.family
    return {
        "family": family.name,
        "path": setup.recipe.model.path,
        "prediction_type": family.prediction_type,
        "fingerprint": setup.conditions()["model_fingerprint"],
        "files": model_files(setup.recipe.model.path, family.parts),
        "hashes": part_hashes(dict(sorted(setup.start_hashes.items()))),
        "stored": stored_formats(setup.recipe.model.path, family.parts),
        "resolution_px": setup.recipe.data.resolution_px or family.default_resolution_px,
        "bucket_multiple_px": family.bucket_multiple_px,
        "parameters": {
            part: sum(row.num_total for row in setup.plan.rows if row.part == part)
            for part in family.parts
        },
    }


def _conflicts(setup: Setup) -> list[str]:
    stored = stored_formats(setup.recipe.model.path, setup.family.parts)
    trained = {path.split(".")[0] for path in setup.plan.trained()}
    parts = [part for part in setup.family.parts if part in trained]
    found = precision_conflicts(setup.recipe.precision.mixed, setup.device)
    return [*found, *conflicts(stored, parts)]


def _dropped(setup: Setup) -> dict[str, int]:
    """Rows that are not used, by split: of the others, every one comes in every epoch."""
    unused = len(setup.data.train) - len(setup.train.kept)
    refused = len(setup.train.refused)
    splits = {"train": refused, "train beyond data.limit": unused - refused}
    if setup.data.validation is not None and setup.validation is not None:
        splits["validation"] = len(setup.data.validation) - len(setup.validation.kept)
    if setup.prior is not None:
        splits["prior"] = len(setup.prior.data.train) - len(setup.prior.assignment.kept)
    return splits


def _data(setup: Setup) -> dict[str, Any]:
    data = setup.data
    splits = {"train": _rows(data.train, setup.train)}
    if data.validation is not None and setup.validation is not None:
        splits["validation"] = _rows(data.validation, setup.validation)
    return {
        "origin": data.origin,
        "fingerprint": data.fingerprint,
        "splits": splits,
        "in_both_splits": num_in_both(data, setup.train, setup.validation),
        "groups_in_both_splits": num_groups_in_both(data, setup.train, setup.validation),
        "notes": data.notes,
        "policy": data.policy.model_dump(mode="json", by_alias=True),
        "policy_words": policy_words(data.policy),
        "policy_origin": data.policy_origin,
        "masks": _masks(setup),
        "prior": None if setup.prior is None else setup.prior.describe(),
    }


def _masks(setup: Setup) -> dict[str, Any] | None:
    """Which training rows have boxes of the labels that are masked; None if none are."""
    if setup.boxes is None:
        return None
    return {
        "boxes": list(setup.recipe.mask.boxes),
        "weight": setup.recipe.mask.weight,
        "rows": setup.boxes.rows_masked,
        "rows_by_label": setup.boxes.rows_by_label,
    }


def _rows(rows: Rows, assignment: Assignment) -> dict[str, Any]:
    return {
        "rows": len(rows),
        "kept": len(assignment.kept),
        "refused": assignment.reasons(),
        "examples": assignment.refused.examples(5),
    }


def _buckets(rows: Rows, assignment: Assignment, run_samples: int) -> list[dict[str, Any]]:
    """One line per bucket in use: rows, full and short runs, and what the crop costs."""
    table = []
    for index, bucket in enumerate(assignment.buckets):
        members = assignment.kept[assignment.bucket_of == index]
        if not len(members):
            continue
        lost = [
            fit(int(width), int(height), bucket).crop_fraction
            for height, width in rows.sizes_hw[members[:CHUNK_ROWS]]
        ]
        table.append(
            {
                "bucket": str(bucket),
                "rows": len(members),
                "runs_at_least": -(-len(members) // run_samples),
                "crop_percent_mean": round(100 * float(np.mean(lost)), 3),
                "crop_percent_max": round(100 * max(lost), 3),
            }
        )
    return table


def _chunks(setup: Setup) -> dict[str, Any]:
    """How many chunks the prompts of the first epoch take, repeats and a prior's among them.

    Of large sets, those of a part.
    """
    stream = setup.order.slots()
    looked_at = min(setup.order.epoch_samples, CHUNK_ROWS)
    texts = [next(stream).text for _ in range(looked_at)]
    counts = Counter(text.num_chunks for text in texts)
    cut = [text.num_cut for text in texts if text.num_cut]
    return {
        "looked_at": looked_at,
        "of": setup.order.epoch_samples,
        "rows_by_chunks": {str(chunks): counts[chunks] for chunks in sorted(counts)},
        "percent_by_chunks": {
            str(chunks): round(100 * counts[chunks] / looked_at, 2) for chunks in sorted(counts)
        },
        "cut": len(cut),
        "tokens_cut": sum(cut),
        "shortened": sum(text.num_removed > 0 for text in texts),
        "units_removed": sum(text.num_removed for text in texts),
        "without_text": sum(text.prompt == "" and not text.is_dropped for text in texts),
        "dropped": sum(text.is_dropped for text in texts),
        "empty": sum(text.prompt == "" for text in texts),
    }


def _phases(setup: Setup) -> list[dict[str, Any]]:
    """What trains in each phase; empty if everything trains throughout."""
    plan = setup.phases
    if plan is None:
        return []
    return [
        {
            "samples": phase.samples,
            "parts": list(phase.parts),
            "text": plan.describe(index),
            "table": plan.table(setup.plan, index).splitlines(),
        }
        for index, phase in enumerate(plan.phases)
    ]


def _length(setup: Setup, slots: Sequence[Slot]) -> dict[str, Any]:
    data = setup.recipe.data
    first = list(slots[: data.batch_size])
    return {
        "samples": setup.total_samples,
        "steps": setup.num_steps,
        "epochs": _epochs(setup),
        "batch_size": data.batch_size,
        "micro_batch_size": data.micro_batch_size,
        "forwards_in_first_step": len(micro_batches(first, data.micro_batch_size)),
        "last_step_samples": setup.total_samples % data.batch_size or data.batch_size,
        "checkpoint_every_samples": setup.every_samples(setup.recipe.checkpoint.every_samples, 10),
    }


def _epochs(setup: Setup) -> float:
    """How often the training rows are seen; a prior's are not counted."""
    order, total = setup.order, setup.total_samples
    if isinstance(order, PriorOrder):
        return (total - order.num_prior(total)) / order.train.epoch_samples
    return total / order.epoch_samples


def _learning_rate(setup: Setup) -> dict[str, Any]:
    """The curve at a few points, and the largest change from one step to the next after warm-up."""
    schedule, batch = setup.schedule(), setup.recipe.data.batch_size
    points = sorted({round(i * (setup.num_steps - 1) / (CURVE_POINTS - 1)) for i in range(9)})
    clocks = [point * batch for point in points]
    peaks = {group.name: group.lr for group in setup.plan.groups}
    rates = [rates_at(setup, clock) for clock in clocks]
    worst, where = setup.worst_step_ratio
    return {
        "samples_seen": clocks,
        "factor": [schedule(clock) for clock in clocks],
        "sketch": sketch(schedule, (setup.num_steps - 1) * batch),
        "lr": {name: [each[name] for each in rates] for name in peaks},
        "worst_ratio": worst,
        "worst_ratio_at": where,
        "warmup_samples": setup.warmup_samples,
        "scaled_by": setup.recipe.lr_factor,
        "per_sample_root": {name: lr / batch**0.5 for name, lr in peaks.items()},
    }


def _evaluation(setup: Setup) -> dict[str, Any]:
    wanted = setup.recipe.validation
    every = setup.every_samples(wanted.every_samples, 40)
    images = num_images(setup)
    per_image = {
        name: usual_levels(count)
        if wanted.timesteps_per_image == "auto"
        else int(wanted.timesteps_per_image)
        for name, count in images.items()
    }
    forwards = {name: images[name] * per_image[name] for name in images}
    weights = 1 if setup.recipe.ema is None else 2
    batch, total = setup.recipe.data.batch_size, setup.total_samples
    times, each = num_due(every, batch, total, total), weights * sum(forwards.values())
    work = times * each / (FORWARDS_PER_TRAINING_SAMPLE * setup.total_samples)
    return {
        "every_samples": every,
        "times": times,
        "images": images,
        "timesteps_per_image": per_image,
        "forwards_each_time": each,
        "with_ema": weights == 2,
        "percent_of_training": 100 * work,
        "resolves_percent_expected": {
            name: expected_percent(int(n)) for name, n in forwards.items()
        },
        "has_validation_split": setup.validation is not None,
    }


def _prompts(setup: Setup, slots: Sequence[Slot]) -> list[dict[str, Any]]:
    shown = []
    for slot in slots:
        micro = setup.reader().batch([slot], [0.5]).micro[0]
        shown.append(
            {
                "id": slot.sample_id,
                "prompt": slot.text.prompt,
                "dropped": slot.text.is_dropped,
                "chunks": slot.text.num_chunks,
                "bucket": str(slot.bucket),
                "time_ids": micro.time_ids() if setup.family.is_told_sizes else None,
            }
        )
    return shown
