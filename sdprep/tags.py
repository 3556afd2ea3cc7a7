"""The fold that makes the final tags and captions of every image.

Raw tags of all taggers go through thresholds and rules; what people said in the journal wins.
Everything is looked at per distinct raw name once, so the work per row is a few look-ups.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
from pydantic import Field, field_validator

from sdprep.console import say, warn
from sdprep.duplicate_groups import gave_way, unite_tags
from sdprep.errors import UserError
from sdprep.recipe import Section
from sdprep.schema import FOLDS, TAG_CATEGORIES
from sdprep.tag_composition import RawTag, TagEdits, compose_row, read_edits
from sdprep.tag_rules import ImplicationMode, TagRules, make_rules, normalise_tag

if TYPE_CHECKING:
    from sdprep.table import PhotoTable

__all__ = [
    "RawTag",
    "TagEdits",
    "TagRules",
    "TagsConfig",
    "compose_row",
    "compose_tags",
    "make_rules",
    "normalise_tag",
    "read_edits",
]

Probability = Annotated[float, Field(ge=0, le=1)]

THRESHOLDS: dict[str, dict[str, float]] = {
    "joytag": {"default": 0.4},
    "wd": {"general": 0.35, "character": 0.85, "rating": 0.0},
    "zero_shot": {"default": math.inf},  # a label without a threshold of its own stays out
}
"""Least probability by tagger and category; sources in spec/prep.md, section 3."""

_ROWS_AT_A_TIME = 10_000


class TagsConfig(Section):
    """How raw tags become final ones: the table `[tags]` of a recipe."""

    aliases: str | None = Field(None, description="File of other names of tags.")
    implications: str | None = Field(None, description="File of what tags entail.")
    implication_mode: ImplicationMode = Field(
        "add", description="Add what is entailed, keep only the most special tags, or leave it."
    )
    blacklist: str | None = Field(None, description="Text file of tags to drop, one a line.")
    drop: tuple[str, ...] = Field((), description="Tags to drop, besides those of the blacklist.")
    deprecated: str | None = Field(None, description="Text file of retired tags, one a line.")
    keep_canonical: bool = Field(
        True, description="Never rename a name that is a tag of its own in the list of aliases."
    )
    thresholds: dict[str, dict[str, Probability]] = Field(
        {}, description="Least probability by tagger, then by category or `default` (0 to 1)."
    )
    label_thresholds: dict[str, dict[str, Probability]] = Field(
        {},
        description="Least probability by tagger, then by tag as it stored it (0 to 1); goes "
        "before `thresholds`, and is the only way of a zero-shot label into prompts.",
    )
    box_tags: dict[str, str] = Field(
        {"a watermark": "watermark", "watermark": "watermark", "text": "text"},
        description="Tag that a detected box of this label stands for.",
    )
    box_min_score: Probability = Field(0.1, description="A box counts above this score (0 to 1).")

    @field_validator("thresholds")
    @classmethod
    def _known_categories(cls, value: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        for tagger, limits in value.items():
            for category in limits:
                if category not in (*TAG_CATEGORIES, "default"):
                    known = ", ".join((*TAG_CATEGORIES, "default"))
                    raise ValueError(f"{tagger}.{category} is no category; there are: {known}")
        return value

    def rules(self) -> TagRules:
        """Read and lint the lists; says aloud what of them is not used.

        Raises:
            DataError: a list cannot be read.
        """
        from sdprep.tag_lint import lint
        from sdprep.tag_lists import read_names, read_tag_list

        aliases, categories, entailed = {}, {}, {}
        if self.aliases:
            report = lint(
                read_tag_list(self.aliases, "aliases"), keep_canonical=self.keep_canonical
            )
            say(report.summary())
            aliases, categories = report.aliases(), report.source.categories
        if self.implications:
            report = lint(read_tag_list(self.implications, "implications"))
            say(report.summary())
            entailed = report.implications()
        return make_rules(
            aliases,
            entailed,
            mode=self.implication_mode,
            blacklist=(*self.drop, *(read_names(self.blacklist) if self.blacklist else ())),
            deprecated=read_names(self.deprecated) if self.deprecated else (),
            categories=categories,
        )

    def thresholds_of(self, tagger: str, plugin: str | None = None) -> dict[str, float]:
        """Least probability by category for a tagger column `tags_<tagger>`.

        A tagger without any keeps all that it stored.

        Args:
            plugin: what filled the column, where that is known; else the name tells, as `wd_eva`
                tells `wd`.

        Raises:
            UserError: a threshold for all labels of a zero-shot tagger.
        """
        family = max(
            (name for name in THRESHOLDS if tagger == name or tagger.startswith(f"{name}_")),
            key=len,
            default="",
        )
        if plugin in THRESHOLDS:
            family = plugin
        own = self.thresholds.get(tagger, {})
        if own and family == "zero_shot":
            raise UserError(
                f"tags.thresholds.{tagger}: zero-shot labels differ too much for one threshold",
                f'Measure one for each: [tags.label_thresholds.{tagger}] "a label" = 0.8',
            )
        return {**THRESHOLDS.get(family, {}), **own}


def compose_tags(table: PhotoTable, config: TagsConfig) -> dict[str, int]:
    """Write the columns `tags`, `caption` and `captions` of every image, in one commit.

    Reads all columns `tags_*` (source: what follows `tags_`), boxes that stand for a tag, the
    sidecar's caption, the captions of `caption_*`, and the journal.

    Returns:
        `added` (tags in all composed lists), `aliased`, `implied`, `blacklisted`, and the further
        counts of `compose_row`, plus `below_threshold` and `images`.
    """
    rules = config.rules()
    edits = read_edits(table.journal().fold())
    readers = _readers(table)
    _warn_unused(config, readers)
    limits = {
        name: config.thresholds_of(name.removeprefix("tags_"), _plugin(table, name))
        for name in readers
        if name.startswith("tags_")
    }
    with table.writer():
        rows = table.read(["id", *dict.fromkeys(readers.values())], "reject_ingest IS NULL")
        counts: Counter[str] = Counter(images=rows.num_rows)
        parts: list[tuple[pa.Array, pa.Array, pa.Array]] = []
        for batch in rows.to_batches(max_chunksize=_ROWS_AT_A_TIME):
            parts.append(_compose_batch(batch, readers, rules, config, limits, edits, counts))
        values = {}
        for place, name in enumerate(("tags", "caption", "captions")):
            arrays = [part[place] for part in parts]
            values[name] = (
                pa.chunked_array(arrays, type=FOLDS[name]).combine_chunks()
                if arrays
                else pa.array([], FOLDS[name])
            )
        notes = {"tags_config": json.dumps(config.model_dump(mode="json"), sort_keys=True)}
        ids = rows["id"].to_pylist()
        values["tags"] = _united(table, ids, values["tags"], rules, edits)
        table.write_fold(ids, values, stage="tags", notes=notes)
    order = ("added", "aliased", "implied", "blacklisted")
    extra = ("deprecated", "ancestors", "human", "below_threshold", "images")
    return {name: counts[name] for name in order + extra}


def _united(
    table: PhotoTable,
    ids: list[str],
    tags: pa.Array,
    rules: TagRules,
    edits: Mapping[str, TagEdits],
) -> pa.Array:
    """The tags, where images that stay have those of the duplicates that gave way to them, too."""
    if not table.has("reject_duplicates"):
        return tags
    reasons = table.read(["reject_duplicates"], "reject_ingest IS NULL")["reject_duplicates"]
    better = gave_way(ids, reasons.to_pylist())
    if not better:
        return tags
    lists = tags.to_pylist()
    removed = [
        (id_, name)
        for id_, edit in edits.items()
        for name, (is_added, _) in edit.last_words(rules).items()
        if not is_added
    ]
    for row, united in unite_tags(ids, lists, better, removed).items():
        lists[row] = united
    return pa.array(lists, FOLDS["tags"])


def _readers(table: PhotoTable) -> dict[str, str]:
    """Columns of raw material: the name of each, and the dotted path of the part we read.

    The sidecar's tags come first, in the order in which somebody wrote them.
    """
    found = {"text": "text.caption"}
    wanted = {"tags_": ("tags",), "boxes_": ("boxes",), "caption_": ("caption", "text")}
    for column in sorted(
        table.schema, key=lambda column: (column.name != "tags_sidecar", column.name)
    ):
        for prefix, parts in wanted.items():
            if column.name.startswith(prefix) and pa.types.is_struct(column.type):
                fields = [column.type.field(at).name for at in range(column.type.num_fields)]
                part = next((part for part in parts if part in fields), None)
                if part:
                    found[column.name] = f"{column.name}.{part}"
    return found


def _warn_unused(config: TagsConfig, readers: Mapping[str, str]) -> None:
    """Thresholds of a tagger that never ran do nothing: say so."""
    taggers = [name.removeprefix("tags_") for name in readers if name.startswith("tags_")]
    for key in ("thresholds", "label_thresholds"):
        for tagger in getattr(config, key):
            if tagger not in taggers:
                there = ", ".join(taggers) or "none"
                warn(f"tags.{key}.{tagger}: no such tagger has run; there are: {there}")


def _plugin(table: PhotoTable, column: str) -> str | None:
    """Which plugin filled a column, whatever it is called; None where its fingerprint is silent."""
    from sdprep.table import FINGERPRINT

    try:
        return json.loads(table.notes(column).get(FINGERPRINT, "")).get("name")
    except (ValueError, AttributeError):
        return None


def _compose_batch(
    batch: pa.RecordBatch,
    readers: Mapping[str, str],
    rules: TagRules,
    config: TagsConfig,
    limits: Mapping[str, Mapping[str, float]],
    edits: Mapping[str, TagEdits],
    counts: Counter[str],
) -> tuple[pa.Array, pa.Array, pa.Array]:
    columns = {name: batch.column(path).to_pylist() for name, path in readers.items()}
    all_tags, all_captions, main = [], [], []
    for row, id_ in enumerate(batch.column("id").to_pylist()):
        raw: list[RawTag] = []
        captions: list[dict[str, str]] = []
        for name, values in columns.items():
            value = values[row]
            if not value:
                continue
            if name in limits:
                tagger = name.removeprefix("tags_")
                labels = config.label_thresholds.get(tagger, {})
                raw += _above(value, tagger, limits[name], labels, counts)
            elif name.startswith("boxes_"):
                raw += _of_boxes(value, name.removeprefix("boxes_"), config)
            else:
                source = "sidecar" if name == "text" else name.removeprefix("caption_")
                captions.append({"text": value.strip(), "source": source})
        edit = edits.get(id_)
        tags, found = compose_row(raw, rules, edit)
        counts.update(found)
        counts["added"] += len(tags)
        captions = _with_human([each for each in captions if each["text"]], edit)
        all_tags.append([tag._asdict() for tag in tags])
        all_captions.append(captions)
        main.append(captions[0]["text"] if captions else None)
    return (
        pa.array(all_tags, FOLDS["tags"]),
        pa.array(main, FOLDS["caption"]),
        pa.array(all_captions, FOLDS["captions"]),
    )


def _above(
    tags: Sequence[Mapping[str, Any]],
    source: str,
    limits: Mapping[str, float],
    labels: Mapping[str, float],
    counts: Counter[str],
) -> Iterable[RawTag]:
    """Tags of one tagger at or above their threshold; of ratings only the most probable."""
    kept: list[RawTag] = []
    ratings: list[RawTag] = []
    for tag in tags:
        category, p = tag["category"], tag["p"]
        least = labels.get(tag["name"])
        if least is None:
            least = limits.get(category or "general", limits.get("default", 0.0))
        if p is not None and not p >= least:  # a NaN is below every threshold
            counts["below_threshold"] += 1
            continue
        certain = p is None or source in ("sidecar", "attributes")
        found = RawTag(tag["name"], category, None if certain else p, source)
        (ratings if category == "rating" else kept).append(found)
    kept.sort(key=lambda tag: 0.0 if tag.score is None else -tag.score)  # stable: file order
    best = sorted(ratings, key=lambda tag: (-(tag.score or 0.0), tag.name))[:1]
    return [*kept, *best]


def _of_boxes(
    boxes: Sequence[Mapping[str, Any]], source: str, config: TagsConfig
) -> Iterable[RawTag]:
    for box in boxes:
        tag = config.box_tags.get(box["label"])
        if tag is not None and box["score"] > config.box_min_score:
            yield RawTag(tag, None, box["score"], source)


def _with_human(captions: list[dict[str, str]], edit: TagEdits | None) -> list[dict[str, str]]:
    """A caption that a person wrote stands in place of all others."""
    if edit is None or not edit.has_caption:
        return captions
    return [{"text": edit.caption, "source": "human"}] if edit.caption else []
