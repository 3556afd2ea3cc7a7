"""Why a prompt says what it says: for people who look at single samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdprep.prompt_draws import Draws
from sdprep.prompt_policy import PromptPolicy
from sdprep.prompt_record import PromptRecord, RenderedPrompt
from sdprep.prompt_tags import aliased, candidates
from sdprep.prompts import render_prompt


@dataclass(frozen=True)
class ExplainedPrompt:
    """A rendered prompt, and what became of the record's tags.

    Attributes:
        rendered: the prompt.
        never: tags that the policy never writes: by category, or because triggers and score tags
            stand for them.
        left_out: tags that it may write and did not write this time.
        spelled: tags that were written under another name, with that name.
    """

    rendered: RenderedPrompt
    never: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    spelled: Mapping[str, str] | None = None


def explain_prompt(
    record: PromptRecord | Mapping[str, Any], policy: PromptPolicy, seed: int, visit: int
) -> ExplainedPrompt:
    """Render a prompt as `render_prompt` does, and say what became of the tags.

    Args:
        record: the image.
        policy: the knobs.
        seed: of the run.
        visit: how often this image has been drawn before.
    """
    if not isinstance(record, PromptRecord):
        record = PromptRecord.from_row(record)
    rendered = render_prompt(record, policy, seed, visit)
    if rendered.dropped:
        return ExplainedPrompt(rendered)
    names = candidates(record, policy)
    kept = names[: policy.num_keep]  # written as they are
    free = [name for name in rendered.tags if name not in kept]
    spelled = aliased(free, policy, Draws(seed, record.id, visit))
    return ExplainedPrompt(
        rendered,
        never=tuple(tag.name for tag in record.tags if tag.name not in names),
        left_out=tuple(name for name in names if name not in rendered.tags),
        spelled={a: b for a, b in zip(free, spelled, strict=True) if a != b},
    )
