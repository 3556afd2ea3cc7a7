"""How a record becomes training text: every knob, its default and its bounds.

The same class is the `[policy]` of a preparation recipe, a `--policy` file, the `[prompt]` of a
training recipe (which overrides what it names) and the policy inside a published data set.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sdprep.recipe import Section, load_recipe, validate
from sdprep.tag_rules import normalise_tag

Probability = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Length(Section):
    """How many tags a prompt gets; score and trigger tags are not counted."""

    law: Literal["truncated_normal", "clamped_normal", "empirical", "like_caption", "all"] = Field(
        "truncated_normal",
        description="truncated_normal: a normal law cut off below `min` (no pile at the edge); "
        "clamped_normal: bigASP v1, values below `min` become `min`; empirical: `weights`; "
        "like_caption: tokens of the caption / `tokens_per_tag`; all: every tag.",
    )
    mean: float = Field(32.0, ge=0, le=1000, description="Mean of the normal law, tags.")
    sd: float = Field(19.8, gt=0, le=1000, description="Standard deviation of that law, tags.")
    min: int = Field(5, ge=0, le=1000, description="Fewest tags, where the image has as many.")
    weights: dict[str, Weight] = Field(
        {}, description='empirical: weight of each number of tags, such as { "5" = 1, "20" = 3 }.'
    )
    tokens_per_tag: float = Field(
        2.5, gt=0, le=75, description="like_caption: tokens that a tag is worth (bigASP v2)."
    )

    @model_validator(mode="after")
    def _empirical_has_weights(self) -> Length:
        wrong = [key for key in self.weights if not (key.isascii() and key.isdigit())]
        if wrong:
            raise ValueError(f"length.weights.{wrong[0]}: a number of tags is expected as key")
        if self.law == "empirical" and not sum(self.weights.values()) > 0:
            raise ValueError(
                'the law empirical needs length.weights, such as { "5" = 1, "20" = 3 }'
            )
        return self


class Score(Section):
    """Which of an image's score tags a prompt shows."""

    count: Literal["uniform", "weighted"] = Field(
        "uniform",
        description="Number of score tags: each of 1..min(3, s+1) alike, or by `weights`.",
    )
    weights: tuple[Weight, Weight, Weight] = Field(
        (3.0, 2.0, 1.0), description="weighted: weights of 1, 2 and 3 score tags (bigASP v2)."
    )
    set: Literal["up_and_exact", "up", "exact"] = Field(
        "up_and_exact", description="score_1_up..score_s_up and score_s, or only one kind of them."
    )
    position: Literal["front", "back", "shuffled", "none"] = Field(
        "front", description="Where score tags stand, also beside a caption; none: no score tags."
    )
    drop_p: Probability = Field(0.0, description="Chance that a prompt shows no score tag.")

    @model_validator(mode="after")
    def _weights_add_up(self) -> Score:
        if not self.weights[0] > 0:
            raise ValueError("score.weights: the first must be > 0")
        return self


class Pick(Section):
    """Mode pick: tags or caption, one of the two."""

    p_tags: Probability = Field(0.1, description="Chance that the tags are taken (bigASP v2: .1).")


class Concat(Section):
    """Modes concat and concat_random: tags and caption in one text."""

    order: Literal["tags_caption", "caption_tags"] = Field(
        "tags_caption", description="What comes first; concat_random draws it."
    )
    sep: str = Field(", ", max_length=32, description="Text between the two.")


class TagStyle(Section):
    """How tags are written: with underscores, with spaces, or each tag its own way."""

    underscores: Weight = Field(1.0, description="Weight of prompts that keep underscores.")
    spaces: Weight = Field(1.0, description="Weight of prompts that write spaces.")
    mixed: Weight = Field(1.0, description="Weight of prompts where each tag draws for itself.")
    mixed_space_p: Probability = Field(0.8, description="mixed: chance of spaces, per tag.")

    @model_validator(mode="before")
    @classmethod
    def _one_style(cls, value: Any) -> Any:
        if isinstance(value, str) and value in ("underscores", "spaces", "mixed"):
            return {name: float(name == value) for name in ("underscores", "spaces", "mixed")}
        return value

    @model_validator(mode="after")
    def _weights_add_up(self) -> TagStyle:
        if not self.underscores + self.spaces + self.mixed > 0:
            raise ValueError("tag_style: one of underscores, spaces, mixed must be > 0")
        return self


class Delimiter(Section):
    """What stands between tags."""

    comma_p: Probability = Field(0.8, description="Chance of a prompt with commas only.")
    mixed_comma_p: Probability = Field(
        0.8, description="In the other prompts: chance of a comma, per gap; else a space."
    )
    blank_p: Probability = Field(0.8, description="Chance of a blank after a comma, per gap.")


class PromptPolicy(Section):
    """How the training text of an image is rendered. Defaults are bigASP v1 unless noted."""

    mode: Literal["tags", "caption", "pick", "concat", "concat_random"] = Field(
        "tags", description="What the text is made of; a missing side gives way to the other."
    )
    pick: Pick = Field(Pick(), description="Options of mode pick.")
    concat: Concat = Field(Concat(), description="Options of modes concat and concat_random.")
    length: Length = Field(Length(), description="How many tags.")
    priority: tuple[str, ...] = Field(
        ("watermark",), description="Tags that are always kept where an image has them."
    )
    shuffle: bool = Field(True, description="Shuffle the tags; false keeps the record's order.")
    num_keep: int = Field(
        0, ge=0, description="First tags of the record that stay first, in tags (not tokens)."
    )
    triggers: tuple[str, ...] = Field(
        (), description="Words put first as they are; dropped only with the whole text."
    )
    skip_categories: tuple[str, ...] = Field(
        ("rating",), description="Categories of tags that are never written."
    )
    alias_p: Probability = Field(
        0.2, description="Chance, per tag that has other names, to be written as one of them."
    )
    aliases: dict[str, tuple[str, ...]] = Field(
        {}, description="Other names of tags; filled in at publishing, for the tags that occur."
    )
    score: Score = Field(Score(), description="Score tags.")
    tag_style: TagStyle = Field(
        TagStyle(), description="underscores, spaces or mixed, or weights of the three."
    )
    delimiter: Delimiter = Field(Delimiter(), description="What stands between tags.")
    caption_weights: dict[str, Weight] = Field(
        {}, description="Weight of captions by their source; 1 where not named, 0: never."
    )
    dropout_p: Probability = Field(
        0.1, description='Chance that the text is "" (bigASP: .10 published, .05 in its code).'
    )
    max_chunks: int = Field(
        3, ge=1, le=100, description="Longest text, in chunks of 75 CLIP tokens."
    )

    @field_validator("priority")
    @classmethod
    def _canonical(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name in map(normalise_tag, value) if name))

    def with_aliases(
        self, spellings: Mapping[str, Iterable[str]], occurring: Iterable[str]
    ) -> PromptPolicy:
        """The policy, knowing the other names of the tags that occur in a data set.

        Rendering is a pure function of record and policy, so the names travel in the policy.

        Args:
            spellings: tag → other names, of a linted list (`LintReport.spellings`).
            occurring: canonical names of the data set's tags.
        """
        known = {
            name: tuple(sorted(spellings[name]))
            for name in sorted(set(occurring))
            if spellings.get(name)
        }
        return self.model_copy(update={"aliases": known})

    def overridden(self, by: PromptPolicy) -> PromptPolicy:
        """The policy with every knob that `by` sets explicitly, at any depth."""
        merged = _merge(
            self.model_dump(mode="json"), by.model_dump(mode="json", exclude_unset=True)
        )
        return validate(merged, PromptPolicy, "the prompt policy")

    def frozen(self) -> PromptPolicy:
        """The policy without noise, for validation prompts.

        No dropout of text or score tags and no aliases. Of each random style the likeliest is
        taken, ties going to spaces and to `", "`. The choice and order of tags stay keyed draws.
        """
        style = self.tag_style
        spaces = style.mixed_space_p >= 0.5
        if style.mixed <= max(style.spaces, style.underscores):
            spaces = style.spaces >= style.underscores
        comma = self.delimiter.comma_p >= 0.5 or self.delimiter.mixed_comma_p >= 0.5
        certain = {"comma_p": float(comma), "mixed_comma_p": float(comma)}
        certain["blank_p"] = float(self.delimiter.blank_p >= 0.5)
        return self.model_copy(
            update={
                "dropout_p": 0.0,
                "alias_p": 0.0,
                "score": self.score.model_copy(update={"drop_p": 0.0}),
                "tag_style": TagStyle(underscores=1.0 - spaces, spaces=float(spaces), mixed=0.0),
                "delimiter": Delimiter(**certain),
            }
        )


def load_policy(path: str | Path) -> PromptPolicy:
    """Read a policy file: TOML whose root, or whose table `[policy]`, is a prompt policy.

    Raises:
        RecipeError: every mistake, with file and key.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        data = {}  # load_recipe says what is wrong
    if isinstance(data.get("policy"), dict):
        return validate(data["policy"], PromptPolicy, f"{path} [policy]")
    return load_recipe(path, PromptPolicy)


def _merge(base: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `by`; tables of knobs are merged, maps of data replaced."""
    merged = dict(base)
    for key, value in by.items():
        is_table = isinstance(value, dict) and key not in ("aliases", "caption_weights", "weights")
        merged[key] = _merge(merged[key], value) if is_table else value
    return merged
