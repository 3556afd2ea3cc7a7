"""The exact text that a model is trained on: one pure function of record, policy, seed and visit.

Both programs render here and nowhere else. Every decision is a draw under a key of its own, so
changing one knob or adding one tag leaves all other draws unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from sdprep.clip_tokens import clean_text, num_chunks
from sdprep.prompt_draws import Draws, weighted
from sdprep.prompt_policy import PromptPolicy, load_policy
from sdprep.prompt_record import PromptCaption, PromptRecord, PromptTag, RenderedPrompt
from sdprep.prompt_tags import candidates, tag_units
from sdprep.prompt_units import Unit, fitted, gaps_of

__all__ = [
    "Draws",
    "PromptCaption",
    "PromptPolicy",
    "PromptRecord",
    "PromptTag",
    "RenderedPrompt",
    "load_policy",
    "render_prompt",
    "validation_prompt",
]


def render_prompt(
    record: PromptRecord | Mapping[str, Any], policy: PromptPolicy, seed: int, visit: int
) -> RenderedPrompt:
    """Render the training text of one image for one visit.

    The order is: dropout, mode, count, priority and keep, choose, order, alias, style, score,
    triggers, join, fit. A record with neither tags nor caption gives the triggers alone (`""`
    without any) and says so in `missing`.

    Args:
        record: the image; a row is read with `PromptRecord.from_row`.
        policy: the knobs.
        seed: of the run.
        visit: how often this image has been drawn before.
    """
    if not isinstance(record, PromptRecord):
        record = PromptRecord.from_row(record)
    draws = Draws(seed, record.id, visit)
    if draws.uniform("dropout") < policy.dropout_p:
        return RenderedPrompt("", dropped=True)
    names = candidates(record, policy)
    caption = _caption(record, policy, draws) if _wants_caption(policy, names) else ""
    sides, missing = _sides(policy, draws, bool(names), bool(caption))
    blocks = [
        tag_units(names, caption, policy, draws)
        if side == "tags"
        else [Unit("caption", caption, "caption", False)]
        for side in sides
    ]
    if sides:
        blocks = [block for block in blocks if block] or [[]]  # a length law may ask for no tags
        _add_scores(blocks, record.score, policy, draws)
    _add_triggers(blocks, policy)
    units = [unit for block in blocks for unit in block]
    gaps = gaps_of(blocks, policy, draws)
    units, text, tokens, num_removed = fitted(units, gaps, policy.max_chunks)
    return RenderedPrompt(
        text,
        dropped=False,
        mode="_".join(sides),  # type: ignore[arg-type]
        missing=missing,  # type: ignore[arg-type]
        tags=tuple([unit.subject for unit in units if unit.kind == "tag"]),
        score_tags=tuple([unit.subject for unit in units if unit.kind == "score"]),
        tokens=tokens,
        chunks=num_chunks(tokens, policy.max_chunks),
        num_removed=num_removed,
    )


def validation_prompt(
    record: PromptRecord | Mapping[str, Any], policy: PromptPolicy, seed: int = 0
) -> str:
    """The text of an image in validation: visit 0 under `policy.frozen()`, so never noisy."""
    return render_prompt(record, policy.frozen(), seed, 0).text


# --- mode and sides ------------------------------------------------------------------------------


def _wants_caption(policy: PromptPolicy, names: list[str]) -> bool:
    return policy.mode != "tags" or not names or policy.length.law == "like_caption"


def _caption(record: PromptRecord, policy: PromptPolicy, draws: Draws) -> str:
    """One caption, drawn by the weight of its source; empty if there is none."""
    weights = [policy.caption_weights.get(each.source, 1.0) for each in record.captions]
    texts = [clean_text(each.text).strip(", ") for each in record.captions]
    known = [
        (each.source, text, weight)
        for each, text, weight in zip(record.captions, texts, weights, strict=True)
        if text and weight > 0
    ]
    if len(known) < 2:
        return known[0][1] if known else ""
    # The least of exponential waiting times with these rates: adding a caption moves no other draw.
    waits = [
        (-math.log1p(-draws.uniform("caption", source, text)) / weight, source, text)
        for source, text, weight in known
    ]
    return min(waits)[2]


def _sides(
    policy: PromptPolicy, draws: Draws, has_tags: bool, has_caption: bool
) -> tuple[tuple[str, ...], str | None]:
    """What the text is made of, in order, and the side that was asked for in vain."""
    wanted: tuple[str, ...] = ("tags",)
    if policy.mode == "caption":
        wanted = ("caption",)
    elif policy.mode == "pick":
        wanted = ("tags",) if draws.uniform("mode") < policy.pick.p_tags else ("caption",)
    elif policy.mode == "concat":
        wanted = tuple(policy.concat.order.split("_"))
    elif policy.mode == "concat_random":
        wanted = ("tags", "caption") if draws.uniform("mode") < 0.5 else ("caption", "tags")
    if not has_tags and not has_caption:
        return (), "both"
    there = tuple(side for side in wanted if (has_tags if side == "tags" else has_caption))
    if there == wanted:
        return wanted, None
    missing = next(side for side in wanted if side not in there)
    return there or ("caption" if missing == "tags" else "tags",), missing


# --- score tags and triggers ---------------------------------------------------------------------


def _add_scores(
    blocks: list[list[Unit]], rank: int | None, policy: PromptPolicy, draws: Draws
) -> None:
    """Put score tags before, behind or among the rest."""
    score = policy.score
    if not rank or score.position == "none":
        return
    if score.drop_p and draws.uniform("score.drop") < score.drop_p:
        return
    names = _score_set(rank, score.set)
    most = min(3, len(names))
    weights = score.weights if score.count == "weighted" else (1.0, 1.0, 1.0)
    shares = list(enumerate(weights[:most], 1))
    number = weighted(draws.uniform("score.count"), shares)
    chosen = draws.ordered("score.choose", names)[:number]
    units = [Unit(name, name, "score", True) for name in chosen]
    if score.position == "front":
        blocks[0][:0] = units
    elif score.position == "back":
        blocks[-1] += units
    else:
        _scatter(blocks, units, policy, draws)


def _scatter(
    blocks: list[list[Unit]], units: list[Unit], policy: PromptPolicy, draws: Draws
) -> None:
    """Give each score tag a place of its own among the tags (or beside the caption)."""
    body = next((block for block in blocks if block and block[0].kind == "tag"), blocks[0])
    first = sum(unit.kind == "tag" for unit in body[: policy.num_keep])
    num_slots = len(body) - first + 1
    slots = draws.uniforms("score.position", [unit.subject for unit in units])
    placed = sorted(zip(slots, units, strict=True), reverse=True)
    for u, unit in placed:  # from the end, so that earlier places stay valid
        body.insert(first + int(u * num_slots), unit)


@lru_cache(maxsize=64)
def _score_set(rank: int, kind: str) -> tuple[str, ...]:
    ups = tuple(f"score_{each}_up" for each in range(1, rank + 1))
    exact = (f"score_{rank}",)
    return {"up_and_exact": ups + exact, "up": ups, "exact": exact}[kind]


def _add_triggers(blocks: list[list[Unit]], policy: PromptPolicy) -> None:
    texts = [text for trigger in policy.triggers if (text := trigger.strip(", \t\r\n"))]
    if texts:
        if not blocks:
            blocks.append([])
        blocks[0][:0] = [Unit(text, text, "trigger", True) for text in texts]
