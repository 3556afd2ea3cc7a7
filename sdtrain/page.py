"""One page a run, all in one file: what it learnt, how sure that is, and what made it."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sdprep.console import warn
from sdprep.errors import DataError
from sdtrain import page_figures as figures
from sdtrain import page_parts as parts
from sdtrain.matrices import Measured
from sdtrain.page_style import STYLE
from sdtrain.paired import compare
from sdtrain.probe import PROBE_FILE, Probe
from sdtrain.run_folder import RunFolder
from sdtrain.stable_eval import verdict
from sdtrain.trackers.jsonl import read_metrics
from sdtrain.wording import half, percent, sentence

PAGE = "report.html"
REFRESH_SECONDS = 60
_WIDEST_GRID_PX = 1600
_TONES = {"learning": "good", "memorising": "warn", "getting worse": "warn", "diverging": "bad"}
_EXPLAINED = {
    "learning": "The loss on held-out images is lower than at the start.",
    "memorising": "Training images get better, held-out images worse: it learns by heart.",
    "diverging": "The loss rises on both held-out and training images.",
    "getting worse": "The loss on held-out images is higher than at the start.",
    "flat": "No change that these images could show.",
}

Line = dict[str, Any]


def refresh(folder: RunFolder, *, is_last: bool = False) -> None:
    """Renew a run's page, at most once a minute while it trains.

    Drawing must never end a training, so whatever goes wrong here is only told.
    """
    path = folder.path / PAGE
    if not is_last and path.exists() and time.time() - path.stat().st_mtime < REFRESH_SECONDS:
        return
    try:
        write_page(folder.path)
    except Exception as error:  # hours of training weigh more than a page
        warn(f"the page {path} could not be drawn: {error!r}")


def write_page(run: Path) -> Path:
    """Write `report.html` from what a run folder holds.

    Raises:
        DataError: it is no run folder.
    """
    folder = RunFolder(run)
    if not folder.recipe.is_file():
        raise DataError(f"{run} is no run folder: it has no {folder.recipe.name}")
    path = run / PAGE
    scratch = run / f".{PAGE}.new"
    scratch.write_text(_page(folder), encoding="utf-8", newline="\n")
    scratch.replace(path)
    return path


def _page(folder: RunFolder) -> str:
    metrics = read_metrics(folder.metrics)
    training = [line for line in metrics if line["kind"] == "train"]
    sets: dict[str, list[Line]] = {}
    for line in metrics:
        if line["kind"] == "validation":
            sets.setdefault(line["set"], []).append(line)
    facts = _facts(folder)
    name = escape(folder.path.resolve().name)
    body = [
        _header(name, facts, metrics),
        _verdict(folder, sets),
        _tiles(training, sets, facts),
        _evaluation(sets),
        _samples(folder),
        _training(training),
        _trained(facts),
        _data(facts),
        _details(folder, sets, facts),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name} – sdtrain</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _facts(folder: RunFolder) -> dict[str, Any]:
    if not folder.environment.is_file():
        return {}
    return dict(json.loads(folder.environment.read_text(encoding="utf-8")))


def _header(name: str, facts: Line, metrics: Sequence[Line]) -> str:
    seen = metrics[-1]["samples_seen"] if metrics else 0
    total = facts.get("total_samples") or seen
    state = "finished" if seen >= total else "in progress, or stopped"
    words = [escape(str(facts[key])) for key in ("model", "adapter") if facts.get(key)]
    words += [f"{seen:,} of {total:,} samples ({state})", f"started {escape(_when(facts))}"]
    share = 100 * min(1.0, seen / total) if total else 0
    bar = f'<div class="bar"><i style="width:{share:.2f}%"></i></div>'
    return f"<header><h1>{name}</h1><p>{' · '.join(words)}</p>{bar}</header>"


def _when(facts: Line) -> str:
    return str(facts.get("started", "at an unknown time")).replace("T", " ").removesuffix("+00:00")


def _verdict(folder: RunFolder, sets: Mapping[str, Sequence[Line]]) -> str:
    newest = [lines[-1] for lines in sets.values()]
    if not newest:
        return (
            '<section class="verdict"><h2>Not evaluated</h2><p>No images to judge by.</p></section>'
        )
    if not newest[0]["samples_seen"]:
        text = "Only the base model has been evaluated so far; changes appear with the next one."
        return f'<section class="verdict"><h2>Just begun</h2><p>{text}</p></section>'
    word = verdict(newest)
    held_out = sets.get("validation", [{}])[-1]
    lines = [_EXPLAINED.get(word, "")]
    if held_out:
        lines.append(_certainty(held_out))
    lines.append(_since_best(folder, sets.get("validation", [])))
    text = "".join(f"<p>{parts.typeset(line)}</p>" for line in lines if line)
    title = escape(word[0].upper() + word[1:])
    return f'<section class="verdict {_TONES.get(word, "")}"><h2>{title}</h2>{text}</section>'


def _certainty(line: Line) -> str:
    change = percent(line["change_percent"])
    if line["ci95_percent"] is None:
        return f"Held-out loss: {change}. One image or one noise level gives no interval."
    return (
        f"Held-out loss: {change} since the start, ± {half(line['ci95_percent'])} on these images "
        f"and ± {half(line['ci95_new_images_percent'])} on new images of this kind "
        f"(95 %). The probe resolves {line['resolves_percent']:.2g} %."
    )


def _since_best(folder: RunFolder, lines: Sequence[Line]) -> str:
    """Whether the newest evaluation is worse than the best one, paired on their matrices."""
    if len(lines) < 3:
        return ""
    best = min(lines, key=lambda line: line["mean"])
    if best is lines[-1]:
        return "The newest evaluation is the best one."
    place = folder.validation / best["probe_id"]
    probe = Probe.load(place / PROBE_FILE)
    then, now = (
        Measured(place / f"{line['samples_seen']}.npz", probe).load().weighted
        for line in (best, lines[-1])
    )
    at = f"the best evaluation ({best['samples_seen']:,} samples)"
    return sentence(compare(then, now), at, "The newest")


def _tiles(training: Sequence[Line], sets: Mapping[str, Sequence[Line]], facts: Line) -> str:
    tiles = []
    for name, lines in sets.items():
        line = lines[-1]
        note = f"± {half(line['ci95_percent'])} · loss {line['mean']:.5f}"
        tiles.append(
            (f"{figures.NAMES.get(name, name)}: loss", percent(line["change_percent"]), note)
        )
    if training:
        line = training[-1]
        rates = ", ".join(f"{rate:.3g}" for rate in dict.fromkeys(line["lr"].values()))
        tiles.append(("Optimizer steps", f"{line['step']:,}", f"rate now {rates}"))
    images = facts.get("images", {})
    if images.get("train"):
        epochs = training[-1]["samples_seen"] / images["train"] if training else 0
        note = f"{images.get('validation', 0):,} held out"
        tiles.append(
            ("Images to train on", f"{images['train']:,}", f"{note} · {epochs:.3g} epochs")
        )
    cells = "".join(
        f"<div><span>{escape(title)}</span><b>{parts.typeset(value)}</b><small>{escape(note)}</small></div>"
        for title, value, note in tiles
    )
    return f'<section class="tiles">{cells}</section>' if tiles else ""


def _evaluation(sets: Mapping[str, Sequence[Line]]) -> str:
    moved = {name: lines for name, lines in sets.items() if len(lines) > 1}
    if not moved:
        return ""
    limits = figures.limits_of([line for lines in moved.values() for line in lines])
    shown = [
        parts.figure(
            figures.NAMES.get(name, name),
            figures.change_figure(lines, limits),
            "Change of the loss since sample 0, in percent. The narrow band is the uncertainty on "
            "these very images, the wide one on new images of the same kind.",
        )
        for name, lines in moved.items()
    ]
    latest = {name: lines[-1] for name, lines in moved.items()}
    shown.append(
        parts.figure(
            "Where it learnt",
            figures.bins_figure(latest),
            "The newest evaluation by noise level: little noise decides about texture, much noise "
            "about composition.",
        )
    )
    return f'<h2>Evaluation</h2><section class="figures">{"".join(shown)}</section>'


def _training(lines: Sequence[Line]) -> str:
    if len(lines) < 2:
        return ""
    shown = [
        parts.figure(
            "Training loss",
            figures.loss_figure(lines, "loss", "loss", figures.SERIES[5]),
            "As it was minimised. Most of its jumps are the noise levels that a step happened to "
            "draw.",
        )
    ]
    if any(line.get("loss_debiased") is not None for line in lines):
        shown.append(
            parts.figure(
                "Training loss, debiased",
                figures.loss_figure(lines, "loss_debiased", "loss / usual loss", figures.SERIES[2]),
                "Each loss divided by what its noise level usually has. For the eye only.",
            )
        )
    shown.append(
        parts.figure("Learning rates", figures.rates_figure(lines), "By rule, over the run.")
    )
    return f'<h2>Training</h2><section class="figures">{"".join(shown)}</section>'


def _samples(folder: RunFolder) -> str:
    from PIL import Image

    path = folder.samples / "grid.png"
    if not path.is_file():
        return ""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((_WIDEST_GRID_PX, 8 * _WIDEST_GRID_PX))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return (
        '<h2>Samples</h2><section class="card samples">'
        f'<img src="{uri}" width="{picture.width}" alt="Samples over time, a row each time">'
        "</section>"
    )


def _trained(facts: Line) -> str:
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


def _data(facts: Line) -> str:
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


def _details(folder: RunFolder, sets: Mapping[str, Sequence[Line]], facts: Line) -> str:
    shown = []
    if sets:
        shown.append(f"<details><summary>Every evaluation</summary>{_evaluations(sets)}</details>")
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
