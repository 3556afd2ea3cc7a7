"""What rendering needs to know of an image, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sdprep.errors import DataError
from sdprep.tag_rules import normalise_tag, written_tag


class PromptTag(NamedTuple):
    """A tag of a record: its canonical name and category."""

    name: str
    category: str = "general"


class PromptCaption(NamedTuple):
    """A caption of a record and where it came from."""

    text: str
    source: str = ""


@dataclass(frozen=True)
class PromptRecord:
    """What rendering needs to know of an image.

    Attributes:
        id: names the image in every key.
        tags: canonical, no name twice, none that would be written as nothing; their order matters
            to `num_keep` and to `shuffle = false` only.
        captions: all that there are; one is drawn by source weight.
        score: rank 1..9; None: no score tags.
    """

    id: str
    tags: tuple[PromptTag, ...] = ()
    captions: tuple[PromptCaption, ...] = ()
    score: int | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> PromptRecord:
        """A record of a row of the table or of a prepared data set; other columns are ignored.

        Args:
            row: `id`, and where there are any `tags` (names, or {name, category}), `caption`,
                `captions` ({text, source}), `score` (0 or NULL: no score tags).

        Raises:
            DataError: the score is no whole number from 0 to 9.
        """
        tags: dict[str, PromptTag] = {}
        for tag in _listed(row.get("tags")):
            raw, category = (tag, None) if isinstance(tag, str) else (tag["name"], tag["category"])
            name = normalise_tag(raw or "")
            if name and name not in tags and written_tag(name, False):
                tags[name] = PromptTag(name, category or "general")
        captions = [
            PromptCaption(each["text"], each["source"] or "")
            for each in _listed(row.get("captions"))
            if each["text"]
        ]
        main = row.get("caption")
        if main and all(main != each.text for each in captions):
            captions.insert(0, PromptCaption(main))
        score = _rank(row.get("score"), row["id"])
        return cls(str(row["id"]), tuple(tags.values()), tuple(captions), score)


@dataclass(frozen=True)
class RenderedPrompt:
    """A training text, and how it came about.

    Attributes:
        text: what the text encoders get.
        dropped: caption dropout made it `""`.
        mode: what it is made of; empty if there was nothing, or it was dropped.
        missing: the side that the policy asked for and the record does not have.
        tags: canonical names written, in order, without score tags and triggers.
        score_tags: those written.
        tokens: content tokens of CLIP.
        chunks: of 75 tokens, at least 1.
        num_removed: tags and words cut off at the end to fit `max_chunks`.
    """

    text: str
    dropped: bool
    mode: Literal["", "tags", "caption", "tags_caption", "caption_tags"] = ""
    missing: Literal["tags", "caption", "both"] | None = None
    tags: tuple[str, ...] = ()
    score_tags: tuple[str, ...] = ()
    tokens: int = 0
    chunks: int = 1
    num_removed: int = 0

    @property
    def truncated(self) -> bool:
        """Whether something had to go to fit `max_chunks`."""
        return self.num_removed > 0


def _listed(value: Any) -> Iterable[Any]:
    """A list out of a row: None and arrays of numpy or Arrow are taken too."""
    return () if value is None else value


def _rank(value: Any, id_: Any) -> int | None:
    if value is None or value != value:  # NaN: pandas' missing value
        return None
    if isinstance(value, bool) or int(value) != value or not 0 <= value <= 9:
        raise DataError(
            f"row {id_}: score {value!r} is no rank",
            "Ranks are 1 to 9; 0 or NULL gives no score tags.",
        )
    return int(value) or None
