"""How a change of the loss is put into words, the same on the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sdtrain.paired import Comparison

SEED_NOISE_PERCENT = 0.03
"""Two trainings that differ only in their seed differ by this much (measured: 0.02 to 0.05)."""

FORWARDS_PER_TRAINING_SAMPLE = 3
"""A training step costs about three forwards: one forward, and a backward of twice its price."""


def amount(number: int, what: str) -> str:
    """How many of something: `1 image`, `1,234 images`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def percent(value: float | None) -> str:
    """A signed change in percent: two decimals, or more where two would say nothing."""
    if value is None or not math.isfinite(value):
        return "unknown"
    if value == 0:
        return "0 %"
    decimals = 2 if abs(value) >= 0.1 else 3 if abs(value) >= 0.01 else 4
    return f"{value:+.{decimals}f} %"


def span(interval: Sequence[float] | None) -> str:
    """An interval in percent, or that there is none."""
    if interval is None:
        return "no interval"
    return f"{percent(interval[0]).removesuffix(' %')} to {percent(interval[1])}"


def sentence(found: Comparison, a: str = "A", b: str = "B", direction: int | None = None) -> str:
    """Whether b is better than a, and how sure that is.

    Args:
        found: the comparison.
        a: what to call the first.
        b: what to call the second.
        direction: overrides the comparison's own, after a correction for many looks.
    """
    if found.ci95_percent is None:
        short = "image" if found.num_images < 2 else "noise level"
        return f"Cannot tell: with one {short} there is no interval."
    direction = found.direction if direction is None else direction
    text = _told(found, a, b, direction)
    return text[0].upper() + text[1:]


def _told(found: Comparison, a: str, b: str, direction: int) -> str:
    assert found.ci95_percent is not None, "the caller looked"
    if found.is_same:
        return f"{a} and {b} are the same here: not one loss differs."
    if direction == 0:
        many = ", and several comparisons were made" if found.direction else ""
        return (
            f"Cannot tell {a} and {b} apart: the change of {percent(found.change_percent)} may be "
            f"chance (95 % interval on these images {span(found.ci95_percent)}{many})."
        )
    word, side = ("better", "lower") if direction < 0 else ("worse", "higher")
    text = (
        f"{b} is {word} than {a}: its loss on these images is {abs(found.change_percent):.3g} % "
        f"{side} (95 % interval {span(found.ci95_percent)})"
    )
    new = found.ci95_new_images_percent
    if new is not None and new[0] * new[1] > 0 and (new[0] < 0) == (direction < 0):
        text += f", and it would be {side} on new images of this kind too ({span(new)})."
    elif new is not None:
        text += f". On new images of this kind it could go either way ({span(new)})."
    if abs(found.change_percent) < SEED_NOISE_PERCENT:
        text += f" Another training seed changes as much (about {SEED_NOISE_PERCENT} %)."
    return text


def moment(lines: Sequence[dict[str, Any]], word: str) -> str:
    """One evaluation of a run in one line: every set's change since the start, and the verdict."""
    clock = f"{lines[0]['samples_seen']:,} samples: "
    if not lines[0]["samples_seen"]:
        levels = [f"{line['set']} {line['mean']:.6f}" for line in lines]
        return clock + ", ".join(levels)
    return f"{clock}{'; '.join(_moved(line) for line in lines)}: {word}"


def _moved(line: dict[str, Any]) -> str:
    change, new = percent(line["change_percent"]), half(line["ci95_new_images_percent"])
    return f"{line['set']} {change} ± {half(line['ci95_percent'])} (new images ± {new})"


def half(interval: Sequence[float] | None) -> str:
    """Half the width of an interval, in percent."""
    return "unknown" if interval is None else f"{(interval[1] - interval[0]) / 2:.2g} %"


def resolution(lines: Sequence[dict[str, Any]]) -> str:
    """What the probes of a run can resolve, as far as an evaluation has shown."""
    known = [
        f"{line['set']} {line['resolves_percent']:.2g} %"
        for line in lines
        if line["resolves_percent"] is not None
    ]
    return f"these probes resolve a change of: {', '.join(known)}" if known else ""


def cost(shapes: Sequence[tuple[str, int, int]], times: int) -> str:
    """What one evaluation costs.

    Args:
        shapes: name, images and noise levels of each set.
        times: evaluations of the whole run.
    """
    if not shapes:
        return "no evaluation: the recipe asks for no images, or there are none"
    sets = ", ".join(
        f"{name} {amount(images, 'image')} x {levels} levels" for name, images, levels in shapes
    )
    forwards = sum(images * levels for _, images, levels in shapes)
    samples = round(forwards / FORWARDS_PER_TRAINING_SAMPLE)
    return (
        f"each of {times} evaluations: {sets} = {forwards:,} forwards, "
        f"about as much work as {samples:,} training samples"
    )
