"""What prompts are made of, read from a table: the same text columns that publishing writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdprep.console import warn
from sdprep.prepared_rows import captions_of, one_to_nine, score_column, tags_of
from sdprep.prompt_policy import PromptPolicy
from sdprep.table import PhotoTable

_COMPOSED = ("caption", "captions", "tags", "group_id", "split")


def prompt_rows(
    table: PhotoTable, score: str | None = None, where: str | None = None
) -> list[dict[str, Any]]:
    """Records of the kept images, in order of arrival, for `PromptRecord.from_row`.

    Args:
        table: composed or not; without composition, what came with the images.
        score: scorer whose rank is shown; else the first that publishing would take.
        where: SQL predicate, besides being kept.
    """
    column = score_column(table, score)
    names = ["id", "text", *(name for name in _COMPOSED if table.has(name))]
    names += [f"{column}.score"] if column else []
    kept = table.kept_predicate()
    rows = table.read(names, f"{kept} AND ({where})" if where else kept).to_pylist()
    return [prompt_row(row, row.get(f"{column}.score")) for row in rows]


def prompt_row(row: dict[str, Any], score: float | None) -> dict[str, Any]:
    """The text columns of one row as publishing writes them."""
    text = row.get("text") or {}
    return {
        "id": row["id"],
        "group_id": row.get("group_id"),
        "split": row.get("split"),
        "caption": row.get("caption") or text.get("caption"),
        "captions": captions_of(row, text),
        "tags": tags_of(row, text),
        "score": rank(score),
    }


def rank(score: float | None) -> int | None:
    """A score as prompts and the published column know it: 1..9; 0 stays 0, never trained on."""
    if isinstance(score, int) and score < 1:
        return 0
    return one_to_nine(score)


def spellings(table: PhotoTable) -> dict[str, tuple[str, ...]] | None:
    """Other names of tags, of the alias list that composed the table's tags; None without one."""
    import json

    path = json.loads(table.notes("tags").get("tags_config", "{}")).get("aliases")
    if path is None:
        return None
    if not Path(path).is_file():
        warn(f"the alias list {path} is gone: prompts will not draw other names of tags")
        return None
    from sdprep.tag_lint import lint
    from sdprep.tag_lists import read_tag_list

    return lint(read_tag_list(path, "aliases")).spellings()


def with_spellings(
    policy: PromptPolicy, table: PhotoTable, rows: Sequence[dict[str, Any]]
) -> PromptPolicy:
    """The policy, knowing the other names of the tags that occur in some rows."""
    known = spellings(table)
    if known is None:
        return policy
    return policy.with_aliases(known, (tag["name"] for row in rows for tag in row["tags"] or []))
