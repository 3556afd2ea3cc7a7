"""One page a run, all in one file: what it learnt, how sure that is, and what made it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sdprep.console import warn
from sdprep.errors import DataError
from sdtrain import page_evidence, page_plan, page_record, page_samples
from sdtrain import page_figures as figures
from sdtrain import page_parts as parts
from sdtrain.matrices import Measured
from sdtrain.outputs import write_text_whole
from sdtrain.page_style import STYLE
from sdtrain.paired import compare
from sdtrain.probe import PROBE_FILE, Probe
from sdtrain.run_folder import RunFolder
from sdtrain.stable_eval import NO_INTERVAL, verdict
from sdtrain.trackers.jsonl import has_stopped_early, last_error, read_metrics
from sdtrain.wording import half, percent, sentence

PAGE = "report.html"
REFRESH_SECONDS = 60
_REFRESH = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">'
_TONES = {"learning": "good", "memorising": "warn", "getting worse": "warn", "diverging": "bad"}
_EXPLAINED = {
    "learning": "The loss on held-out images is lower than at the start.",
    "memorising": "Training images get better, held-out images worse: it learns by heart.",
    "diverging": "The loss rises on both held-out and training images.",
    "getting worse": "The loss on held-out images is higher than at the start.",
    "flat": "No change that these images could show.",
    NO_INTERVAL: "So small a probe cannot tell a change from chance.",
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
        write_page(folder.path, is_running=not is_last)
    except Exception as error:  # hours of training weigh more than a page
        warn(f"the page {path} could not be drawn: {error!r}")


def mend(folder: RunFolder) -> None:
    """Renew the page of a finished run that was killed before it did so itself."""
    path = folder.path / PAGE
    if path.is_file() and _REFRESH in path.read_text(encoding="utf-8"):
        refresh(folder, is_last=True)


def write_page(run: Path, *, is_running: bool = False) -> Path:
    """Write `report.html` from what a run folder holds.

    Args:
        run: the folder.
        is_running: whether the run goes on writing it; the page then loads itself anew.

    Raises:
        DataError: it is no run folder.
    """
    folder = RunFolder(run)
    if not folder.recipe.is_file():
        raise DataError(f"{run} is no run folder: it has no {folder.recipe.name}")
    path = run / PAGE
    write_text_whole(path, _page(folder, is_running))
    return path


def _page(folder: RunFolder, is_running: bool) -> str:
    metrics = read_metrics(folder.metrics)
    training = [line for line in metrics if line["kind"] == "train"]
    sets: dict[str, list[Line]] = {}
    for line in metrics:
        if line["kind"] == "validation":
            sets.setdefault(line["set"], []).append(line)
    facts = _facts(folder)
    name = escape(folder.path.resolve().name)
    conclusion = page_evidence.section(metrics)
    error = _error(metrics)
    has_looked = any(line["samples_seen"] for lines in sets.values() for line in lines)
    body = [
        _header(name, facts, metrics, is_running),
        error,
        conclusion,  # once there is one, it is what a reader came for
        (
            _verdict(folder, sets, "At the newest evaluation: " if conclusion or error else "")
            if has_looked or not error
            else ""
        ),
        _tiles(training, sets, facts),
        _evaluation(sets),
        page_samples.section(folder, metrics[-1]["samples_seen"] if metrics else 0),
        _variety([line for line in metrics if line["kind"] == "variety"]),
        _training(training, facts.get("plan", {}).get("lr", {})),
        page_plan.section(folder, facts, training, sets, is_over=has_stopped_early(metrics)),
        page_record.trained(facts),
        page_record.data_section(facts),
        page_record.details(folder, sets, facts),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{_REFRESH if is_running else ''}<title>{name} – sdtrain</title>"
        f"<style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _facts(folder: RunFolder) -> dict[str, Any]:
    if not folder.environment.is_file():
        return {}
    return dict(json.loads(folder.environment.read_text(encoding="utf-8")))


def _header(name: str, facts: Line, metrics: Sequence[Line], is_running: bool) -> str:
    seen = metrics[-1]["samples_seen"] if metrics else 0
    total = facts.get("total_samples") or seen
    state = "in training" if is_running else "in progress, or stopped"
    state = "ended by an error" if _error(metrics) else state
    state = (
        "stopped early" if has_stopped_early(metrics) else "finished" if seen >= total else state
    )
    words = [escape(str(facts[key])) for key in ("model", "adapter") if facts.get(key)]
    words += [f"{seen:,} of {total:,} samples ({state})", f"started {escape(_when(facts))}"]
    share = 100 * min(1.0, seen / total) if total else 0
    bar = f'<div class="bar"><i style="width:{share:.2f}%"></i></div>'
    return f"<header><h1>{name}</h1><p>{' · '.join(words)}</p>{bar}</header>"


def _error(metrics: Sequence[Line]) -> str:
    """What a run died of; nothing once it has gone on."""
    message = last_error(metrics)
    if message is None:
        return ""
    text = parts.typeset(message)
    return f'<section class="verdict bad"><h2>Ended by an error</h2><p>{text}</p></section>'


def _when(facts: Line) -> str:
    return str(facts.get("started", "at an unknown time")).replace("T", " ").removesuffix("+00:00")


def _verdict(folder: RunFolder, sets: Mapping[str, Sequence[Line]], prefix: str) -> str:
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
    title = escape(prefix + word if prefix else word[0].upper() + word[1:])
    return f'<section class="verdict {_TONES.get(word, "")}"><h2>{title}</h2>{text}</section>'


def _certainty(line: Line) -> str:
    change = percent(line["change_percent"])
    if line["ci95_percent"] is None:
        return f"Held-out loss: {change}. One image or one noise level gives no interval."
    if line["resolves_percent"] is None:
        return "Held-out loss: not one loss has changed since the start."
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
        Measured(place / f"{line['samples_seen']}.npz", probe).load() for line in (best, lines[-1])
    )
    at = f"the best evaluation ({best['samples_seen']:,} samples)"
    return sentence(compare(then.weighted, now.weighted, then.u), at, "the newest")


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


def _training(lines: Sequence[Line], plan: Mapping[str, Any]) -> str:
    if len(lines) < 2:
        return ""
    shown = []
    if any(line.get("loss") is not None for line in lines):  # none where masks left nothing
        shown.append(
            parts.figure(
                "Training loss",
                figures.loss_figure(lines, "loss", "loss", figures.SERIES[5]),
                "As it was minimised. Most of its jumps are the noise levels that a step happened "
                "to draw.",
            )
        )
    if any(line.get("loss_debiased") is not None for line in lines):
        shown.append(
            parts.figure(
                "Training loss, debiased",
                figures.loss_figure(lines, "loss_debiased", "loss / usual loss", figures.SERIES[2]),
                "Each loss divided by what its noise level usually has. For the eye only.",
            )
        )
    shown.append(
        parts.figure(
            "Learning rates",
            figures.rates_figure(lines, plan),
            "By rule, over the run. Thin and dashed: as planned; thick: as it was.",
        )
    )
    return f'<h2>Training</h2><section class="figures">{"".join(shown)}</section>'


def _variety(lines: Sequence[Line]) -> str:
    if len(lines) < 2:
        return ""
    figure = parts.figure(
        "Variety between seeds",
        figures.variety_figure(lines),
        "How different the pictures of one prompt are (mean distance of their VAE latents, two by "
        "two); 1 is as at the start. It fades first when a model learns by heart.",
    )
    return f'<section class="figures" style="margin-top:.8rem">{figure}</section>'
