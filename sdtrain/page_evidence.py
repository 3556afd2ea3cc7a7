"""What the run came to by its own judgement, with every comparison that it rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sdtrain import page_parts as parts
from sdtrain.page_figures import NAMES
from sdtrain.wording import half, percent

_TONES = {"learning": "good", "finished": "good", "overfitting": "warn", "damaged": "bad"}
_WORDS = {-1: "fell", 0: "cannot tell", 1: "rose"}


def section(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The newest verdict of a run, in words and as a table; nothing before there is one."""
    found = [line for line in metrics if line["kind"] == "verdict"]
    if not found:
        return ""
    line = found[-1]
    word = str(line["verdict"])
    words = [str(line["reason"])]
    if line.get("stopped_early"):
        words.append(f"Stopped early: {line['stopped_early']}.")
    best = line.get("best")
    if best:
        words.append(f"Best evaluation: {best['samples_seen']:,} samples, loss {best['mean']:.5f}.")
    text = "".join(f"<p>{parts.typeset(each)}</p>" for each in words)
    rows = [
        (
            NAMES.get(each["set"], each["set"]),
            f"{each['since']:,} to {each['until']:,}",
            percent(each["change_percent"]),
            f"± {half(each['ci95_percent'])}",
            f"± {half(each['ci95_new_images_percent'])}",
            "–" if each["p_value"] is None else f"{each['p_value']:.2g}",
            f"{each['looks']:,}",
            _WORDS[each["direction"]],
        )
        for each in line["evidence"]
    ]
    head = (
        *("Images", "Samples", "Change of the loss", "These images", "New images"),
        *("p, corrected", "Looks", "So it"),
    )
    table = parts.table(head, rows, 1) if rows else ""
    title = escape(f"The whole run: {word}")
    return (
        f'<section class="verdict {_TONES.get(word, "")}"><h2>{title}</h2>{text}{table}</section>'
    )
