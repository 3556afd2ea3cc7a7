"""The tags of a prompt: how many, which, in what order and in which spelling."""

from __future__ import annotations

import math
from itertools import repeat
from statistics import NormalDist

from sdprep.clip_tokens import count_tokens
from sdprep.prompt_draws import UNIT, Draws, weighted
from sdprep.prompt_policy import Length, PromptPolicy, TagStyle
from sdprep.prompt_record import PromptRecord
from sdprep.prompt_units import Unit
from sdprep.seeding import SEPARATOR
from sdprep.tag_rules import normalise_tag, written_tag

_NORMAL = NormalDist()
_SCORE_TAGS = frozenset(f"score_{rank}{end}" for rank in range(1, 10) for end in ("", "_up"))


def candidates(record: PromptRecord, policy: PromptPolicy) -> list[str]:
    """Names that may be written: no skipped categories, no triggers, no score tags of our own."""
    skip = policy.skip_categories
    names = [tag.name for tag in record.tags if tag.category not in skip]
    if policy.triggers:
        triggers = [normalise_tag(trigger) for trigger in policy.triggers]
        names = [name for name in names if name not in triggers]
    if record.score and policy.score.position != "none":
        names = [name for name in names if name not in _SCORE_TAGS]
    return names


def tag_units(names: list[str], caption: str, policy: PromptPolicy, draws: Draws) -> list[Unit]:
    """Count, keep, choose, order, alias and style."""
    keep = names[: policy.num_keep]
    priority = [name for name in policy.priority if name in names]
    forced = dict.fromkeys(keep + priority)
    rest = [name for name in names if name not in forced]
    number = _num_tags(policy.length, draws, caption, len(names)) - len(forced)
    if number < len(rest):
        rest = draws.ordered("choose", rest)[: max(number, 0)]
    chosen = dict.fromkeys([*forced, *rest])
    order = [name for name in names if name in chosen and name not in keep]
    if policy.shuffle:
        order = draws.ordered("order", order)
    texts = [*keep, *aliased(order, policy, draws)]
    order = [*keep, *order]
    texts = _styled(order, texts, policy.tag_style, draws)
    if "" in texts:  # nothing but commas or marks is left of a name
        pairs = [pair for pair in zip(order, texts, strict=True) if pair[1]]
        order, texts = [name for name, _ in pairs], [text for _, text in pairs]
    flags = [name in forced for name in order]
    return list(map(Unit._make, zip(order, texts, repeat("tag"), flags, strict=False)))


def _num_tags(law: Length, draws: Draws, caption: str, total: int) -> int:
    """The number of tags that the law asks for; may exceed what there is."""
    if law.law == "all":
        return total
    if law.law == "like_caption" and caption:
        return max(law.min, int(count_tokens(caption) / law.tokens_per_tag))
    u = draws.uniform("count")
    if law.law == "empirical":
        return weighted(u, sorted((int(n), weight) for n, weight in law.weights.items()))
    if law.law == "clamped_normal":
        inside = min(max(u, UNIT / 2), 1.0 - UNIT)  # the inverse is infinite at 0 and 1
        return max(law.min, int(law.mean + law.sd * _NORMAL.inv_cdf(inside)))
    # The upper tail, 1 - u of what lies above `min`, keeps its digits where the lower one has none.
    # An image without caption has no length to be like: the normal law stands in.
    tail = (1.0 - u) * _NORMAL.cdf((law.mean - law.min) / law.sd)
    if tail < 1e-300:  # `min` is far above the law, which then lies within a step of it
        return law.min
    value = law.mean - law.sd * _NORMAL.inv_cdf(min(tail, 1.0 - UNIT))
    return max(law.min, math.floor(value))


def aliased(names: list[str], policy: PromptPolicy, draws: Draws) -> list[str]:
    """Each name, or another name of the same tag; a draw of its own decides for each."""
    if not policy.aliases or policy.alias_p == 0:
        return names
    spelled = []
    for name in names:
        others = policy.aliases.get(name)
        if others and draws.uniform("alias", name) < policy.alias_p:
            name = draws.ordered("alias.name", [f"{name}{SEPARATOR}{other}" for other in others])[0]
            name = name.rpartition(SEPARATOR)[2]
        spelled.append(name)
    return spelled


def _styled(names: list[str], texts: list[str], style: TagStyle, draws: Draws) -> list[str]:
    """The texts with underscores or spaces; the draws are keyed by the names."""
    shares = ((0, style.underscores), (1, style.spaces), (2, style.mixed))
    kind = weighted(draws.uniform("style"), shares)
    if kind < 2:
        return [written_tag(text, kind == 1) for text in texts]
    own = draws.uniforms("style.tag", names)
    spaces_p = style.mixed_space_p
    return [written_tag(text, u < spaces_p) for text, u in zip(texts, own, strict=True)]
