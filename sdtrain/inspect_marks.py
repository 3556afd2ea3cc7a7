"""Drawings inside the page of `sdtrain inspect`: noise levels of a step, chunks of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sdtrain.inspect_style import FORWARDS

LEFT, WIDTH, BASE, RADIUS = 14, 1000, 52, 5.5
CHUNK = 77


def colour(forward: int) -> str:
    """Of one forward of a step, counted from 1."""
    return FORWARDS[(forward - 1) % len(FORWARDS)]


def levels(step: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """The noise levels of a step along a line from clean to noise, one dot a sample.

    The ticks part the strata, of which each has one sample.
    """
    parts = [
        f'<line class="axis" x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{BASE}" y2="{BASE}"/>',
        *(
            f'<line x1="{_x(edge):.1f}" x2="{_x(edge):.1f}" y1="14" y2="{BASE}"/>'
            for edge in step["strata"] or ()
        ),
        f'<text x="{LEFT}" y="{BASE + 16}">u = 0, clean</text>',
        f'<text x="{LEFT + WIDTH}" y="{BASE + 16}" text-anchor="end">u = 1, noise</text>',
    ]
    last, height = -1.0, 0
    for sample in sorted(samples, key=lambda each: each["u"]):
        x = _x(sample["u"])
        height = height + 1 if x - last < 2 * RADIUS else 0  # dots that would overlap are piled
        last = x
        about = f"slot {sample['slot']}: u {sample['u']:.4f}, forward {sample['forward']}"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{BASE - 8 - 11 * (height % 4)}" r="{RADIUS}" '
            f'fill="{colour(sample["forward"])}"><title>{escape(about)}</title></circle>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH + 2 * LEFT} {BASE + 22}" role="img" '
        f'aria-label="noise levels of the step">{"".join(parts)}</svg>'
    )


def _x(u: float) -> float:
    return LEFT + WIDTH * u


def chunks(layout: Sequence[Mapping[str, Any]]) -> str:
    """A prompt token by token, with everything that is wrapped around each chunk of it."""
    return "".join(_chunk(number, chunk) for number, chunk in enumerate(layout, 1))


def _chunk(number: int, chunk: Mapping[str, Any]) -> str:
    count, padding = len(chunk["tokens"]), chunk["num_padding"]
    text = "".join(f"<span>{escape(token)}</span>" for token in chunk["tokens"] if token)
    if not chunk["is_read"]:
        return (
            f'<div class="chunk cut"><h3>cut off: {count} tokens that the model does not read</h3>'
            f'<div class="text">{text}</div></div>'
        )
    share = 100 / CHUNK
    bar = (
        f'<div class="bar"><b style="width:{share:.2f}%"></b>'
        f'<i style="width:{count * share:.2f}%"></i><b style="width:{share:.2f}%"></b></div>'
    )
    pads = f"<em>{padding} padding</em>" if padding else ""
    return (
        f'<div class="chunk"><h3>chunk {number}: {count} of 75 tokens, {padding} padding</h3>{bar}'
        f'<div class="text"><em>BOS</em>{text}<em>EOS</em>{pads}</div></div>'
    )
