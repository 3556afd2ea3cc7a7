"""What captioners ask for: prompt templates, drawn per image with keyed randomness."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Annotated, Any

import pyarrow as pa
from pydantic import AfterValidator, Field

from sdprep.errors import DataError
from sdprep.recipe import Section
from sdprep.seeding import integer, uniform
from sdprep.tag_rules import written_tag

CAPTION_COLUMNS = pa.schema(
    [
        pa.field("text", pa.string()),
        pa.field("prompt", pa.string()),  # exactly what was asked; NULL where nothing was
        pa.field("seed", pa.int64()),
        pa.field("finish_reason", pa.string()),  # stop | length, or what a server says
        pa.field("attempt", pa.int32()),  # how often --retry-failed came by before
    ]
)

PLACEHOLDERS = ("words", "length", "tags")
LENGTHS = ("very short", "short", "medium-length", "long", "very long")
WORDS = NormalDist(45, 30)
FEWEST_WORDS, MOST_WORDS = 20, 170
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_SKIPPED = ("meta", "rating")  # categories of tags that say nothing of what is to be seen


def _known_placeholders(value: str) -> str:
    for name in _PLACEHOLDER.findall(value):
        if name not in PLACEHOLDERS:
            known = ", ".join(f"{{{each}}}" for each in PLACEHOLDERS)
            raise ValueError(f"{{{name}}} is no placeholder; there are: {known}")
    return value


class Template(Section):
    """One way to ask for a caption."""

    prompt: Annotated[str, AfterValidator(_known_placeholders)] = Field(
        min_length=1,
        max_length=8000,
        description="Text; {words}, {length} and {tags} are filled in for each image.",
    )
    weight: float = Field(1.0, gt=0, le=1e6, description="How often, relative to the others.")


Templates = Annotated[
    tuple[Template, ...] | None,
    Field(
        min_length=1,
        description="Prompts to draw from, a list of {prompt, weight}; none: a mix of four styles.",
    ),
]
Prompt = Annotated[
    Annotated[str, Field(min_length=1, max_length=8000), AfterValidator(_known_placeholders)]
    | None,
    Field(description="The one prompt for all images, in place of `templates`."),
]
Seed = Annotated[int, Field(ge=0, lt=2**31, description="Of all draws of this captioner.")]


def _reference_mix() -> tuple[Template, ...]:
    """Descriptive, informal, training prompt and MidJourney 6:1:2:1; each in three lengths.

    Source: spec/prep.md, section 5 (after bigasp-training).
    """
    styles = (
        (6, "descriptive caption for this image in a formal tone"),
        (1, "descriptive caption for this image in a casual tone"),
        (2, "stable diffusion prompt for this image"),
        (1, "MidJourney prompt for this image"),
    )
    mix = []
    for weight, what in styles:
        for text in (f"a {what}.", f"a {what} within {{words}} words.", f"a {{length}} {what}."):
            mix.append(Template(prompt=f"Write {text}", weight=weight))
    return tuple(mix)


REFERENCE_MIX = _reference_mix()


def templates_of(prompt: str | None, templates: Sequence[Template] | None) -> tuple[Template, ...]:
    """The one prompt if there is one, else the templates, else the reference mix."""
    if prompt:
        return (Template(prompt=prompt),)
    return REFERENCE_MIX if templates is None else tuple(templates)


def draw_prompt(
    templates: Sequence[Template], seed: int, id_: str, row: Mapping[str, Any]
) -> tuple[int, str]:
    """The prompt of one image: number of its template, and the text.

    A template with {tags} is drawn only for images that have tags.

    Raises:
        DataError: all templates want tags and the image has none.
    """
    tags = tags_text(row)
    able = [at for at, each in enumerate(templates) if tags or "{tags}" not in each.prompt]
    if not able:
        raise DataError("the prompt wants {tags} and the image has none", "Run sdprep tag first.")
    point = uniform(seed, "caption_template", id_) * sum(templates[at].weight for at in able)
    chosen = able[-1]
    for at in able:
        point -= templates[at].weight
        if point < 0:
            chosen = at
            break
    values = {
        "words": str(draw_words(seed, id_)),
        "length": LENGTHS[integer(seed, "caption_length", id_) % len(LENGTHS)],
        "tags": tags,
    }
    prompt = templates[chosen].prompt
    return chosen, _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), prompt)


def draw_words(seed: int, id_: str) -> int:
    """A number of words: normal(45, 30), truncated to 20..170 rather than piled up at its ends."""
    low, high = WORDS.cdf(FEWEST_WORDS), WORDS.cdf(MOST_WORDS + 1)
    drawn = WORDS.inv_cdf(low + uniform(seed, "caption_words", id_) * (high - low))
    return min(max(int(drawn), FEWEST_WORDS), MOST_WORDS)


def tags_text(row: Mapping[str, Any]) -> str:
    """Tags of an image as people write them: the composed ones, else those beside it."""
    found = row.get("tags")
    if found is None:
        found = (row.get("text") or {}).get("tags") or []
    names = [tag["name"] for tag in found if tag.get("category") not in _SKIPPED]
    return ", ".join(filter(None, (written_tag(name, spaces=True) for name in names)))


def seed_of_try(seed: int, attempt: int, again: bool) -> int:
    """Each attempt has a seed of its own, and one more for its second try."""
    return seed + 2 * attempt + again


def dump(templates: Sequence[Template]) -> str | list[list[Any]]:
    """Templates as fingerprints name them; the reference mix by its name."""
    if tuple(templates) == REFERENCE_MIX:
        return "reference mix 1"
    return [[each.prompt, each.weight] for each in templates]
