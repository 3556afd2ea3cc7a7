"""Facts of `sdtrain check` that are computed from more than one part of the set-up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from sdtrain.buckets import Assignment
from sdtrain.dataset import Rows, TrainingData

SKETCH_POINTS = 60
MOST_GROUP_ROWS = 50_000
"""Rows whose groups are compared: their texts are read for it, which takes seconds."""
_READ_ROWS = 1_000
_BARS = "▁▂▃▄▅▆▇█"


def num_in_both(data: TrainingData, train: Assignment, validation: Assignment | None) -> int:
    """Images that would be trained on and validated with; 0, or something is very wrong.

    The same file twice has the ids X and X#2, so what stands before the mark is compared.
    """
    if data.validation is None or validation is None:
        return 0
    held_out = {id_.split("#")[0] for id_ in data.validation.ids.at(validation.kept)}
    places = data.train.ids.rows_of(sorted(held_out))
    is_kept = np.zeros(len(data.train), bool)
    is_kept[train.kept] = True
    return sum(bool(is_kept[row]) for row in places.values())


def num_groups_in_both(
    data: TrainingData, train: Assignment, validation: Assignment | None
) -> int | None:
    """Groups of near duplicates that lie on both sides; None if that was not looked at.

    It is not where the set has no groups, or has more than `MOST_GROUP_ROWS` rows: then
    `sdprep split FOLDER --verify` says it.
    """
    if data.validation is None or validation is None:
        return None
    if len(train.kept) + len(validation.kept) > MOST_GROUP_ROWS:
        return None
    held_out = _groups(data.validation, validation.kept)
    return len(held_out & _groups(data.train, train.kept)) if held_out else None


def _groups(rows: Rows, kept: np.ndarray) -> set[str]:
    found = set()
    for start in range(0, len(kept), _READ_ROWS):
        for record in rows.records(kept[start : start + _READ_ROWS].tolist()):
            found.add(record.get("group_id"))
    return {group for group in found if group}


def device_bytes(device: torch.device) -> int | None:
    """Memory of a GPU; None where it is the computer's own."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def sketch(factor: Callable[[int], float], last_clock: int) -> str:
    """A curve of at most one as a line of bars, from the first step to the last.

    Args:
        factor: samples seen to the share of the peak rate.
        last_clock: samples seen before the last step.
    """
    points = min(SKETCH_POINTS, last_clock + 1)
    clocks = [round(at * last_clock / max(1, points - 1)) for at in range(points)]
    values = [factor(clock) for clock in clocks]
    top = max(*values, 1e-12) if len(values) > 1 else max(values[0], 1e-12)
    return "".join(_BARS[min(7, int(8 * max(0.0, value) / top))] for value in values)


def precision_conflicts(mixed: str, device: torch.device) -> list[str]:
    """What the recipe's number format and the device have against each other."""
    found = []
    if device.type == "cpu" and mixed != "no":
        found.append(f"precision.mixed = {mixed!r} on the CPU is slower than 'no' on most machines")
    if device.type == "cuda" and mixed == "bf16" and not torch.cuda.is_bf16_supported(False):
        found.append("this GPU computes no bf16 itself: take fp16")
    if device.type == "mps" and mixed == "fp16":
        found.append("loss scaling for fp16 is not supported on mps: take bf16 or no")
    return found
