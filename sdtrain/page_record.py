"""What a run's page keeps for the record: what trained, the data, every number, the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sdtrain import page_figures as figures
from sdtrain import page_parts as parts
from sdtrain.run_folder import RunFolder
from sdtrain.wording import half, percent

Line = dict[str, Any]


def trained(facts: Line) -> str:
    """The freeze table."""
    rows = facts.get("freeze_rows") or []
    if not rows:
        return ""
    head = ("Part", "Rule", "Tensors", "Trained", "Of", "%", "Learning rate")
    lines = [
        (
            *(row["part"], row["rule"], f"{row['num_tensors']:,}", f"{row['num_trained']:,}"),
            *(f"{row['num_total']:,}", f"{row['percent']:.4f}"),
            f"{row['lr']:g}" if row["lr"] else "frozen",
        )
        for row in rows
    ]
    return f'<h2>What trained</h2><section class="card">{parts.table(head, lines, 2)}</section>'


def data_section(facts: Line) -> str:
    """Where the images came from."""
    data, images = facts.get("data", {}), facts.get("images", {})
    entries = {
        "Data set": facts.get("origin") or data.get("path"),
        "Revision": data.get("revision"),
        "Training images": f"{images['train']:,}" if "train" in images else None,
        "Held-out images": f"{images['validation']:,}" if "validation" in images else None,
        "Refused": images.get("refused"),
        "Fingerprint": data.get("fingerprint"),
        "Split certificate": "yes" if data.get("certificate") else "none came with the data set",
    }
    return f'<h2>Data</h2><section class="card">{parts.pairs(entries)}</section>'


def details(folder: RunFolder, sets: Mapping[str, Sequence[Line]], facts: Line) -> str:
    """What was measured, asked and installed, folded."""
    shown = []
    if sets:
        shown.append(f"<details><summary>Every evaluation</summary>{_evaluations(sets)}</details>")
    if any(lines[-1].get(kind) for lines in sets.values() for kind in ("tags", "sources")):
        shown.append(f"<details><summary>By tag and source</summary>{_groups(sets)}</details>")
    recipe = escape(folder.recipe.read_text(encoding="utf-8"))
    shown.append(f"<details><summary>Recipe, resolved</summary><pre>{recipe}</pre></details>")
    versions = {name: found for name, found in facts.get("versions", {}).items() if found}
    known = {
        "Device": facts.get("device"),
        "Platform": facts.get("platform"),
        "Python": facts.get("python"),
        "Command": " ".join(facts.get("command", [])),
        **versions,
    }
    shown.append(f"<details><summary>Environment</summary>{parts.pairs(known)}</details>")
    return f'<h2>Record</h2><section class="card">{"".join(shown)}</section>'


def _groups(sets: Mapping[str, Sequence[Line]]) -> str:
    """The tags and sources that moved most, of the newest evaluation of each set."""
    head = ("Set", "Kind", "Name", "Images", "Change", "These images", "New images", "Differs")
    rows = [
        (
            *(figures.NAMES.get(name, name), kind.removesuffix("s"), group["name"]),
            *(f"{group['images']:,}", percent(group["change_percent"])),
            *(f"± {half(group[key])}" for key in ("ci95_percent", "ci95_new_images_percent")),
            "yes" if group["differs"] else "cannot tell",
        )
        for name, lines in sets.items()
        for kind in ("tags", "sources")
        for group in lines[-1].get(kind, ())
    ]
    return parts.table(head, rows, 3)


def _evaluations(sets: Mapping[str, Sequence[Line]]) -> str:
    head = ("Samples", "Set", "Loss", "Change", "These images", "New images")
    lines = [
        (
            *(f"{line['samples_seen']:,}", figures.NAMES.get(name, name)),
            *(f"{line['mean']:.6f}", percent(line["change_percent"])),
            *(f"± {half(line[key])}" for key in ("ci95_percent", "ci95_new_images_percent")),
        )
        for name, series in sets.items()
        for line in series
    ]
    return parts.table(head, lines, 2)
