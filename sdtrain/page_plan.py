"""Plan against reality: what a run intended, and what of it has been done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdtrain import checkpoint
from sdtrain import page_parts as parts
from sdtrain.planned import num_due
from sdtrain.run_folder import RunFolder
from sdtrain.trackers.jsonl import read_metrics
from sdtrain.trackers.pace import PACE, pace

Line = dict[str, Any]


def section(
    folder: RunFolder,
    facts: Line,
    training: Sequence[Line],
    sets: Mapping[str, Sequence[Line]],
    *,
    is_over: bool,
) -> str:
    """A table of intentions, what is due by now, and what is there.

    Args:
        folder: of the run.
        facts: what was known before it.
        training: lines of the metrics.
        sets: validation lines by set.
        is_over: nothing more will be trained, whatever was planned.
    """
    plan, total = facts.get("plan"), facts.get("total_samples")
    if not plan or not total:
        return ""
    seen = training[-1]["samples_seen"] if training else 0
    rows = [("Samples", f"{total:,}", "", f"{seen:,}")]
    done = training[-1]["step"] if training else 0
    rows.append(("Optimizer steps", f"{plan['steps']:,}", "", f"{done:,}"))
    evaluated = max((len(lines) for lines in sets.values()), default=0)
    if sets:
        rows.append(_cadence("Evaluations", plan, "validate_every", seen, total, evaluated))
    if plan["sample_every"]:
        drawn = len(list(folder.samples.glob("*/prompts.json")))
        rows.append(_cadence("Sets of pictures", plan, "sample_every", seen, total, drawn))
    kept = len(checkpoint.checkpoints(folder.checkpoints))
    rows.append(
        ("Checkpoints", f"every {plan['save_every']:,} samples", "", f"{kept:,} kept on disk")
    )
    rows += _images(facts, seen) + _time(folder, seen, seen if is_over else total)
    table = parts.table(("", "Planned", "Due by now", "Done"), rows, 1)
    phases = "".join(f"<p>{parts.typeset(words)}</p>" for words in plan.get("phases", []))
    return f'<h2>Plan against reality</h2><section class="card plan">{table}{phases}</section>'


def _cadence(
    name: str, plan: Line, key: str, seen: int, total: int, done: int
) -> tuple[str, str, str, str]:
    def count(until: int) -> int:
        return num_due(plan[key], plan["batch_size"], total, until)

    return name, f"{count(total):,}", f"{count(seen):,}", f"{done:,}"


def _images(facts: Line, seen: int) -> list[tuple[str, str, str, str]]:
    images = facts.get("images", {})
    if not images.get("train"):
        return []
    refused = images.get("refused", 0)
    return [
        ("Training images used", f"{images['train'] + refused:,}", "", f"{images['train']:,}"),
        ("Images refused", "0", "", f"{refused:,}"),
        ("Passes over the data", "", "", f"{seen / images['train']:.2f}"),
    ]


def _time(folder: RunFolder, seen: int, total: int) -> list[tuple[str, str, str, str]]:
    known = pace(read_metrics(folder.path / PACE))
    if not known:
        return []
    rows = []
    rate = known.get("samples_per_second")
    spent = duration(known["seconds"])
    left = ""
    if rate:
        left = duration((total - seen) / rate) if seen < total else "none"
        rows.append(("Samples a second, everything included", "", "", f"{rate:,.3g}"))
    rows.append(("Time", "", f"{left} left" if left else "", spent))
    return rows


def duration(seconds: float) -> str:
    """A time for people, such as `3 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes / 1440:.1f} days"
