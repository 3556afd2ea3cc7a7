"""Text that lies beside images: decoding it, and reading tags and captions out of it."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from sdprep.source_item import ItemText

MAX_SIDECAR_BYTES = 2**20
"""Larger text files are no captions."""

RATINGS = {
    "g": "general",
    "s": "sensitive",
    "q": "questionable",
    "e": "explicit",
    "safe": "general",
}

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_GAPS = re.compile(r"[\s,_]+")
_ROLES = ("caption", "tags", "rating", "license", "parent_id", "class_name", "split", "repeats")


class BadText(Exception):
    """A sidecar that cannot be understood; the message is the kind of finding."""


def decode_text(data: bytes) -> tuple[str, bool]:
    """Bytes of a text file as clean text, and whether the encoding had to be guessed.

    UTF-8, or UTF-16 with its mark; what is neither is taken for cp1252. The byte-order mark and
    control characters go, line ends become newlines, outer blanks are cut off.
    """
    is_guess = False
    try:
        is_wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = data.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError:
        text, is_guess = data.decode("cp1252", errors="replace"), True
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROL.sub("", text).strip(), is_guess


def split_tags(text: str) -> tuple[tuple[str, str | None], ...]:
    """Tags of a list with commas or one a line, as written but for outer blanks."""
    names = (name.strip() for name in re.split(r"[,\n]", text))
    return tuple((name, None) for name in names if name)


def parse_json(data: bytes) -> tuple[Any, bool]:
    """A JSON file, and whether its encoding had to be guessed.

    Raises:
        BadText: it is no JSON.
    """
    text, is_guess = decode_text(data)
    try:
        return json.loads(text), is_guess
    except (ValueError, RecursionError):
        raise BadText("bad_json") from None


def parse_json_lines(data: bytes) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number and record of each line that is not blank; None where it is no JSON object."""
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            try:
                record, _ = parse_json(line)
            except BadText:
                record = None
            yield number, record if isinstance(record, dict) else None


def parse_csv(data: bytes) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Line and record of each row under a header; None where a row has more fields than that.

    Raises:
        BadText: it is no CSV.
    """
    text, _ = decode_text(data)
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in rows:
            yield rows.line_num, None if None in row else {k: v for k, v in row.items() if v}
    except csv.Error:
        raise BadText("bad_csv") from None


def parse_parquet(data: bytes) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number, from 1, and record of each row.

    Raises:
        BadText: it is no Parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError):
        raise BadText("bad_parquet") from None
    number = 0
    for batch in table.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def text_of_record(record: Mapping[str, Any]) -> tuple[ItemText, list[str]]:
    """What a metadata record says about its image; keys that we do not know are left alone.

    Args:
        record: `caption` (or `text`), `tags` (list of names, list of {name, category}, or text with
            commas), `tags_json` (the same list as JSON text, which may say it more exactly),
            `rating`, `license`, `parent_id`, `class_name`, `split`, `repeats`.
    Returns:
        the text, and the names of fields whose values make no sense and were left out.
    """
    values = dict(record)
    values.setdefault("caption", values.get("text"))
    fields: dict[str, Any] = {}
    bad = []
    for name in _ROLES:
        value = values.get(name)
        if value is None or value == "" or value == []:
            continue
        try:
            fields[name] = _READERS.get(name, _string)(value)
        except (TypeError, ValueError):
            bad.append(name)
    text = ItemText(**{name: value for name, value in fields.items() if value not in ("", ())})
    try:
        exact = _tags(json.loads(values.get("tags_json") or "[]"))
    except (TypeError, ValueError, RecursionError):
        return text, [*bad, "tags_json"]
    return with_exact(text, ItemText(tags=exact)), bad


def filled(text: ItemText, more: ItemText) -> ItemText:
    """`text`, with its empty fields taken from `more`."""
    empty = {name: value for name, value in vars(more).items() if not getattr(text, name)}
    return replace(text, **empty)


def with_exact(text: ItemText, exact: ItemText) -> ItemText:
    """`text`, in the words of `exact` wherever both say the same.

    A text file cannot hold the commas in a tag, its category, or the lines of a caption that a
    trainer reads as one. Ratings are not written among tags. Where someone edited the text, it
    stays as edited.
    """
    written = [tag for tag in exact.tags if tag[1] != "rating"]
    if _spelt(text.tags) == _spelt(written):
        text = replace(text, tags=exact.tags)
    if text.caption and exact.caption and text.caption.split() == exact.caption.split():
        text = replace(text, caption=exact.caption)
    return text


def _spelt(tags: Iterable[tuple[str, str | None]]) -> list[str]:
    """Names apart from what exporting may change in them."""
    names = (" ".join(_GAPS.split(name)).strip().casefold() for name, _ in tags)
    return [name for name in names if name]


def _string(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(value)
    return _CONTROL.sub("", str(value)).strip()


def _tags(value: Any) -> tuple[tuple[str, str | None], ...]:
    if isinstance(value, str):
        return split_tags(_CONTROL.sub("", value))
    if not isinstance(value, list):
        raise TypeError(value)
    found = [_tag(entry) for entry in value]
    return tuple(tag for tag in found if tag[0])


def _tag(entry: Any) -> tuple[str, str | None]:
    if isinstance(entry, dict):
        name = entry["name"] if "name" in entry else entry.get("tag")
        category = entry.get("category")
        return _string(name), _string(category) if category is not None else None
    return _string(entry), None


def _rating(value: Any) -> str:
    name = _string(value).lower()
    name = RATINGS.get(name, name)
    if name not in RATINGS.values():
        raise ValueError(value)
    return name


def _repeats(value: Any) -> int:
    number = int(_string(value))
    if not 0 <= number < 2**31:
        raise ValueError(value)
    return number


_READERS = {"tags": _tags, "rating": _rating, "repeats": _repeats}
