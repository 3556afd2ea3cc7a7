"""How many prompts of 35 tags one core renders in a second, beside a plain baseline.

The baseline states the default policy for tags in a few lines: every draw hashes its whole key, and
tokens are counted on the whole text. Both must give the same texts; the script checks that first.

    python tools/bench/render_prompts.py [--prompts 4000] [--tags FILE]

Expected: 10,000 or more prompts a second on one core that is not busy with something else. The
seconds are those of the processor, so that other programs disturb little.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

from sdprep.clip_tokens import token_ids
from sdprep.prompts import PromptPolicy, PromptRecord, PromptTag, render_prompt
from sdprep.seeding import uniform
from sdprep.tag_rules import spaced_tag

TARGET = 10_000
NUM_TAGS = 35
COLOURS = ("red", "blue", "green", "black", "white", "pink", "brown", "grey", "purple", "aqua")
THINGS = ("hair", "eyes", "dress", "hat", "shirt", "skirt", "bow", "ribbon", "gloves", "jacket")


def plain_prompt(record: PromptRecord, seed: int, visit: int) -> str:
    """The default policy for a record with tags, without aliases and too short to be cut."""

    def u(knob: str, *subject: str) -> float:
        return uniform("prompt", seed, record.id, visit, knob, *subject)

    if u("dropout") < 0.1:
        return ""
    names = [tag.name for tag in record.tags]
    law = NormalDist(32.0, 19.8)
    above = (1.0 - u("count")) * NormalDist().cdf((32.0 - 5) / 19.8)
    wanted = max(5, math.floor(law.mean - law.stdev * NormalDist().inv_cdf(above)))
    priority = [name for name in names if name == "watermark"]
    number = min(max(wanted, len(priority)), len(names))
    rest = sorted((u("choose", name), name) for name in names if name not in priority)
    chosen = priority + [name for _, name in rest[: number - len(priority)]]
    order = [name for _, name in sorted((u("order", name), name) for name in chosen)]
    style = int(u("style") * 3)
    pieces = []
    for name in order:
        spaces = style == 1 or (style == 2 and u("style.tag", name) < 0.8)
        pieces.append((name, spaced_tag(name) if spaces else name))
    if record.score:
        scores = [f"score_{rank}_up" for rank in range(1, record.score + 1)]
        scores.append(f"score_{record.score}")
        count = 1 + int(u("score.count") * min(3, len(scores)))
        drawn = sorted((u("score.choose", name), name) for name in scores)[:count]
        pieces = [(name, name) for _, name in drawn] + pieces
    only_commas = u("delimiter") < 0.8
    text = ""
    for name, written in pieces:
        comma = only_commas or u("delimiter.comma", name) < 0.8
        blank = u("delimiter.blank", name) < 0.8
        gap = (", " if blank else ",") if comma else " "
        text += (gap if text else "") + written
    assert len(token_ids(text)) <= 225, "the plain baseline does not cut"
    return text


def records(tags: list[str], number: int) -> list[PromptRecord]:
    """Images with 35 keyed tags each, a tenth of them with a watermark."""
    found = []
    for image in range(number):
        ranked = sorted(tags, key=lambda name: uniform("bench", image, name))[:NUM_TAGS]
        if image % 10 == 0:
            ranked[image % NUM_TAGS] = "watermark"
        found.append(PromptRecord(f"{image:032x}", tuple(map(PromptTag, ranked)), (), image % 10))
    return found


def rate(
    render: Callable[[PromptRecord, int], object], images: list[PromptRecord], n: int
) -> float:
    """Prompts a second of processor time: the best of three rounds."""
    best = math.inf
    for _ in range(3):
        started = time.process_time()
        for at in range(n):
            render(images[at % len(images)], at // len(images))
        best = min(best, time.process_time() - started)
    return n / best


def main() -> None:
    """Check that both renderers agree, time them, and print both rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4000, help="prompts per round")
    parser.add_argument("--tags", type=Path, help="a tagcomplete CSV; its 1,000 commonest tags")
    arguments = parser.parse_args()
    names = [f"{colour}_{thing}" for colour in COLOURS for thing in THINGS]
    if arguments.tags:
        from sdprep.tag_lists import read_tag_list

        names = list(read_tag_list(arguments.tags).categories)[:1000]
    images, policy, number = records(names, 200), PromptPolicy(), arguments.prompts
    for image in images:  # this also fills the caches
        for visit in range(3):
            ours = render_prompt(image, policy, 1, visit).text
            assert ours == plain_prompt(image, 1, visit), (image.id, visit)
    fast = rate(lambda image, visit: render_prompt(image, policy, 1, visit), images, number)
    plain = rate(lambda image, visit: plain_prompt(image, 1, visit), images, number // 10)
    print(f"{platform.machine()}, Python {platform.python_version()}, {NUM_TAGS} tags an image")
    print(f"render_prompt   {fast:>10,.0f} prompts/s  (target {TARGET:,})")
    print(f"plain baseline  {plain:>10,.0f} prompts/s")


if __name__ == "__main__":
    main()
