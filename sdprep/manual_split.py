"""Sides chosen by hand: a column, a list of ids, a folder, or the split that a source came with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from sdprep.assignment import TRAIN, VALIDATION
from sdprep.errors import DataError, UserError, nearest
from sdprep.table import PhotoTable

SOURCE_SPLIT = "text.split"
WORDS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "val", "dev", "test", "eval"),
}
"""What a column may say; held-out names all mean validation here."""


def manual_labels(table: PhotoTable, manual: str) -> tuple[list[str | None], list[str]]:
    """The side that each image is asked to take.

    Args:
        table: all its rows are labelled, in order of arrival.
        manual: `source` (the split that came with the images), `ids:FILE` (one id a line, those
            are validation), `folder:NAME` (images found in that folder are validation), or the
            name of a column with words such as train and validation, or with true and false.

    Returns:
        train, validation or None (not mentioned) per row; warnings.

    Raises:
        UserError: no such column, file or folder, or words that name no side.
    """
    kind, colon, rest = manual.partition(":")
    if colon and kind == "ids":
        return _from_ids(table, Path(rest))
    if colon and kind == "folder":
        return _from_folder(table, rest), []
    return _from_column(table, SOURCE_SPLIT if manual == "source" else manual)


def _from_ids(table: PhotoTable, path: Path) -> tuple[list[str | None], list[str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list of ids {path}: {error}") from None
    wanted = {line.strip().lower() for line in lines if line.strip() and line.strip()[0] != "#"}
    ids = table.read(["id"])["id"].to_pylist()
    unknown = sorted(wanted.difference(ids))
    if not wanted or len(unknown) == len(wanted):
        found = f"{unknown[0]!r} is none" if unknown else "it is empty"
        raise DataError(
            f"no line of {path} is the id of an image in {table.path}: {found}",
            "One id a line, 32 hex characters, as `sdprep show` prints them.",
        )
    warnings = []
    if unknown:
        warnings = [f"{len(unknown)} lines of {path} are no ids here, such as {unknown[0]!r}"]
    return [VALIDATION if id_ in wanted else None for id_ in ids], warnings


def _from_folder(table: PhotoTable, name: str) -> list[str | None]:
    wanted = _parts(name)
    sources = table.read(["sources"])["sources"].to_pylist()
    folders = [[_parts(source["key"] or "")[:-1] for source in row or []] for row in sources]
    labels = [
        VALIDATION if wanted and any(folder[: len(wanted)] == wanted for folder in row) else None
        for row in folders
    ]
    if VALIDATION not in labels:
        tops = sorted({folder[0] for row in folders for folder in row if folder})
        near = nearest(name, tops)
        raise UserError(
            f"no image was found in a folder {name!r} of its source"
            + (f"; did you mean {near}?" if near else ""),
            f"Top folders: {', '.join(tops[:20]) or 'none'}.",
        )
    return labels


def _parts(path: str) -> list[str]:
    return [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]


def _from_column(table: PhotoTable, column: str) -> tuple[list[str | None], list[str]]:
    if column == "split":
        raise UserError(
            "the column split is what this stage writes; it cannot be its own source",
            "For the split that came with the images: source.",
        )
    _require(table, column)
    values = table.read([column])[column]
    if pa.types.is_boolean(values.type):
        words = {True: VALIDATION, False: TRAIN}
        return [words.get(value) for value in values.to_pylist()], []
    if not pa.types.is_string(values.type) and not pa.types.is_large_string(values.type):
        raise UserError(
            f"column {column} holds {values.type}; a manual split needs text or true and false"
        )
    sides = {word: side for side, words_of in WORDS.items() for word in words_of}
    spelt = [None if value is None else value.strip().lower() for value in values.to_pylist()]
    strange = Counter(word for word in spelt if word and word not in sides)
    if strange:
        shown = ", ".join(f"{word!r} ({count} images)" for word, count in strange.most_common(5))
        raise UserError(
            f"column {column} says {shown}, which names no side",
            f"Train: {', '.join(WORDS[TRAIN])}. Validation: {', '.join(WORDS[VALIDATION])}.",
        )
    labels = [sides.get(word) if word else None for word in spelt]
    return labels, _about(column, labels, values)


def _about(column: str, labels: Sequence[str | None], values: pa.ChunkedArray) -> list[str]:
    if not any(labels):
        raise UserError(
            f"column {column} is empty: it names no side for any image",
            "The images came without a split of their own."
            if column == SOURCE_SPLIT
            else "Fill it, or choose another.",
        )
    said = []
    if missing := pc.count(values, mode="only_null").as_py():
        said.append(f"{missing} images have no {column}; new ones go to train")
    if "test" in {str(value).strip().lower() for value in values.unique().to_pylist()}:
        said.append(f"{column} = test counts as validation")
    return said


def _require(table: PhotoTable, column: str) -> None:
    paths = []
    for field in table.schema:
        paths.append(field.name)
        if pa.types.is_struct(field.type):
            paths += [f"{field.name}.{inner.name}" for inner in field.type]
    if column not in paths:
        near = nearest(column, paths)
        raise UserError(
            f"{table.path} has no column {column}" + (f"; did you mean {near}?" if near else ""),
            f"Or ids:FILE, folder:NAME, source. Columns: {', '.join(paths)}.",
        )
