"""Select: reject the images that do not match an SQL predicate over the table's columns.

The predicate is DataFusion SQL, as Lance understands it: `width * height >= 262144`,
`score_technical.sharpness > 100 AND format = 'JPEG'`. A struct field is named with a dot.

One selection is in force at a time: another run replaces the earlier one, as in a recipe. To ask
for two things, join them with AND. Every image that ingest accepted is judged, whether or not
another stage rejected it, so the order of stages does not matter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pyarrow as pa
from pydantic import Field

from sdprep.console import warn
from sdprep.errors import UserError, nearest
from sdprep.recipe import Section
from sdprep.table import PhotoTable

COLUMN = "reject_select"


class SelectConfig(Section):
    """Which images to keep."""

    where: str = Field(
        min_length=1, description="SQL predicate over columns; what does not match is rejected."
    )
    reason: str | None = Field(
        None, min_length=1, description="Reason to write down; without it, the predicate itself."
    )


@dataclass(frozen=True)
class SelectReport:
    """What a selection did to the images that ingest accepted.

    Args:
        kept: images that match; every image, after a reset.
        rejected: images that do not, `unknown` ones included.
        unknown: of those, images whose result is NULL because a value is missing.
        remaining: images that no stage rejects now.
    """

    kept: int
    rejected: int
    unknown: int
    remaining: int


def select_table(
    table: PhotoTable, where: str | None = None, reason: str | None = None, reset: bool = False
) -> SelectReport:
    """Reject what does not match, in place of an earlier selection.

    A result of NULL (a score that was never computed, say) counts as not matching, with a reason
    of its own, and is counted in `unknown`.

    Args:
        table: the table to curate.
        where: SQL predicate; may be left out with `reset`.
        reason: written into `reject_select`; by default the predicate.
        reset: take back the selection in force (no other stage's rejections) first.

    Raises:
        UserError: no predicate, one that cannot be used, or one that rejects everything; the
            selection in force stays as it is.
    """
    if where is None and not reset:
        raise UserError(
            "select needs a predicate",
            'Give one, such as --where "width * height >= 262144", or --reset.',
        )
    with table.writer():
        if where is None:
            _write(table, {}, "")
            accepted = table.count("reject_ingest IS NULL")
            return SelectReport(accepted, 0, 0, table.count(table.kept_predicate()))
        matched, failed, unknown = _judge(table, where)
        if not matched and (failed or unknown):
            raise _nothing_left(where, len(failed), len(unknown))
        reasons = dict.fromkeys(failed, reason or f"not ({where.strip()})")
        reasons |= dict.fromkeys(unknown, reason or f"missing value in ({where.strip()})")
        _write(table, reasons, where)
        remaining = table.count(table.kept_predicate())
    if unknown:
        warn(
            f"{len(unknown)} images have no value for {where!r} and are rejected; "
            "annotate them, or allow for them with: ... OR COLUMN IS NULL"
        )
    lost = _lost_groups(table)
    if lost:
        warn(
            f"{lost} images were kept for their duplicates, and this selection rejects them; "
            "run sdprep dedup again, so that another one of each group is kept"
        )
    if matched and not remaining:
        warn("no image is left: every one that matches was rejected by another stage")
    return SelectReport(len(matched), len(reasons), len(unknown), remaining)


def _lost_groups(table: PhotoTable) -> int:
    """Images that others gave way to as duplicates, and that this selection rejects."""
    if not table.has("reject_duplicates"):
        return 0
    reasons = table.read(["reject_duplicates"], "reject_duplicates IS NOT NULL")
    kept = {reason.as_py().partition(":")[2] for reason in reasons["reject_duplicates"]}
    rejected = table.read(["id"], f"{COLUMN} IS NOT NULL")["id"].to_pylist()
    return len(kept.intersection(rejected))


def _judge(table: PhotoTable, where: str) -> tuple[list[str], list[str], list[str]]:
    """Ids for which the predicate is true, false and NULL."""
    _ids(table, where)  # as written first: its errors are the plainest
    accepted = "reject_ingest IS NULL"
    matched = _ids(table, where, f"({accepted}) AND (\n{where}\n)")
    # The parser stops silently at what it takes for the end. Brackets refuse `a, b` and `a; b`,
    # a function call refuses `a) OR (b`; the line breaks end a comment.
    failed = _ids(table, where, f"({accepted}) AND NOT coalesce(\n{where}\n, true)")
    decided = {*matched, *failed}
    unknown = [id_ for id_ in table.read(["id"], accepted)["id"].to_pylist() if id_ not in decided]
    return matched, failed, unknown


def _ids(table: PhotoTable, where: str, query: str | None = None) -> list[str]:
    try:
        if not where.strip():
            raise ValueError("it is empty")
        return table.read(["id"], query or where)["id"].to_pylist()
    except (UserError, OSError, ValueError) as error:
        text = str(error).removeprefix(f"cannot use the predicate {query or where!r}: ")
        raise _unusable(table, where, text) from None


def _write(table: PhotoTable, reasons: dict[str, str], where: str) -> None:
    if reasons or table.has(COLUMN):
        values = {COLUMN: pa.array(reasons.values(), pa.string())}
        notes = {"where": where} if where else {}
        table.write_fold(list(reasons), values, stage="select", notes=notes)


def _nothing_left(where: str, failed: int, unknown: int) -> UserError:
    missing = f", {unknown} of them because a value is missing" if unknown else ""
    return UserError(
        f"no image matches {where!r}: all {failed + unknown} would be rejected{missing}",
        "Nothing was changed. "
        + (
            "Has the annotator that fills this column run?"
            if unknown
            else "Check the bounds with: sdprep report"
        ),
    )


def _unusable(table: PhotoTable, where: str, text: str) -> UserError:
    """Say which column does not exist and which is nearest, or what else is wrong."""
    paths = _column_paths(table.schema)
    named = re.search(r"No field named ([^\s]+?)\.(?:\s|,|$)", text)
    inner = re.search(r"Field (\S+) not found in struct", text)
    if named or inner:
        word = (named or inner).group(1).replace('"', "")  # type: ignore[union-attr]
        near = _nearest_path(word, paths)
        suggestion = f" Did you mean {near}?" if near else ""
        return UserError(
            f"cannot use the predicate {where!r}: there is no column {word}.{suggestion}",
            f"Text goes in 'single quotes'. There are: {', '.join(paths)}.",
        )
    return UserError(
        f"cannot use the predicate {where!r}: {_plain(text)}",
        "It is SQL: comparisons joined by AND, OR, NOT; text in 'single quotes'. "
        f"Columns: {', '.join(paths)}.",
    )


def _column_paths(schema: pa.Schema) -> list[str]:
    paths = []
    for field in schema:
        if pa.types.is_struct(field.type):
            paths += [f"{field.name}.{inner.name}" for inner in field.type]
        else:
            paths.append(field.name)
    return paths


def _nearest_path(word: str, paths: list[str]) -> str | None:
    """The column most like `word`, also when the struct's name was left out."""
    by_last = {path.rpartition(".")[2]: path for path in reversed(paths)}
    last = word.rpartition(".")[2]
    near = nearest(last, list(by_last)) if "." not in word else None
    return nearest(word, paths) or (by_last[near] if near else None)


def _plain(text: str) -> str:
    """An engine's message without its source paths and layers."""
    text = text.partition("\n  ")[0]  # a hint that was added on the way here
    text = re.sub(r",? /\S+?\.rs:\d+:\d+", "", text)
    text = re.sub(
        r"(Invalid user input|External error|Arrow error|Query Execution error): ", "", text
    )
    parsed = re.search(r"sql parser error: (.*?)\)?$", text)
    return f"not valid SQL: {parsed.group(1)}" if parsed else text.strip()
