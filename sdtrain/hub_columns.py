"""Which columns of any Hugging Face data set hold the pictures and the texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdprep.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

    from sdtrain.recipe import DataSection

CAPTION_COLUMNS = ("caption", "captions", "text", "prompt", "description", "sentence", "label_text")
_WANTED = {
    "image_column": "pictures, or the bytes of their files",
    "caption_column": "strings or lists of strings, which texts must be",
}
SIDECARS = (".txt", ".caption")
NO_TEXT = "no text"
"""Column of empty texts that stands in where a set has none and needs none."""


def columns_of(
    dataset: Dataset, section: DataSection, notes: list[str], needs_text: bool
) -> tuple[str, str]:
    """Which column holds pictures and which holds text; what is guessed is noted.

    Args:
        dataset: one split.
        section: names columns that are not to be guessed.
        notes: gets what was guessed.
        needs_text: whether there must be a column of texts; else it may be `NO_TEXT`.

    Raises:
        DataError: one that is named does not fit, or the columns cannot be told apart.
    """
    from datasets import Image as ImageFeature

    features = dataset.features
    pictures = [name for name, kind in features.items() if isinstance(kind, ImageFeature)]
    files = [name for name, kind in features.items() if _is_file(kind)]
    fitting = pictures + files if section.image_column else pictures or files
    try:
        image = _column(section.image_column, "image_column", fitting, ("image",), features)
    except DataError:
        _refuse_folder(Path(section.path))
        raise
    texts = [name for name, kind in features.items() if _is_text(kind)]
    try:
        caption = _column(
            section.caption_column, "caption_column", texts, CAPTION_COLUMNS, features
        )
    except DataError:
        if needs_text:
            _refuse_folder(Path(section.path))
            raise
        caption = NO_TEXT
    if not needs_text:
        notes.append(f"pictures are taken from column {image}")
    elif section.image_column is None or section.caption_column is None:
        notes.append(f"pictures are taken from column {image}, texts from column {caption}")
    return image, caption


def _refuse_folder(path: Path) -> None:
    """Say what to do with pictures that have their texts in files beside them.

    Raises:
        DataError: it is a folder of such.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else []
    beside = [file for file in files if file.suffix.lower() in SIDECARS]
    if beside:
        table = f"{path.name or 'pictures'}.lance"
        raise DataError(
            f"{path} is a folder of pictures with texts beside them ({beside[0].name}, …), which "
            "is not a data set yet",
            f'Make one: sdprep ingest "{path}" "{table}"; sdprep dedup "{table}"; sdprep split '
            f'"{table}" --validation 0.1. Then set data.path = "{table}".',
        )


def _is_text(kind: Any) -> bool:
    from datasets import List, Value

    inner = kind.feature if isinstance(kind, List) else kind
    return isinstance(inner, Value) and inner.dtype in ("string", "large_string")


def _is_file(kind: Any) -> bool:
    """Whether a column may hold files of pictures, written by a program that did not say so."""
    from datasets import Value

    inner = kind.get("bytes") if isinstance(kind, dict) else kind
    return isinstance(inner, Value) and inner.dtype in ("binary", "large_binary")


def _column(
    named: str | None, option: str, fitting: list[str], usual: Sequence[str], features: Any
) -> str:
    what = "pictures" if option == "image_column" else "text"
    if named is not None:
        if named in fitting:
            return named
        if named in features:
            raise DataError(f"data.{option} = {named!r} holds no {what}: {features[named]}")
        near = nearest(named, fitting)
        hint = f"Did you mean {near}?" if near else f"There are: {', '.join(features)}."
        raise DataError(f"data.{option} = {named!r} is no column of the data set", hint)
    likely = [name for name in usual if name in fitting] or fitting
    if not likely or (len(likely) > 1 and likely[0] not in usual):
        kinds = {name: getattr(kind, "dtype", kind) for name, kind in features.items()}
        found = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        hint = f'Name it: data.{option} = "…".' if likely else f"No column has {_WANTED[option]}."
        raise DataError(
            f"cannot tell which column holds the {what}; the data set has: {found}", hint
        )
    return likely[0]
