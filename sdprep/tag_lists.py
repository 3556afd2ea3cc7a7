"""Alias and implication lists as people publish them: readers, and a linter.

Read are tagcomplete CSV, Danbooru's JSON, JSONL and CSV, e621's `csv.gz`, and TOML. About a fifth
of such lists is retired upstream, so tags are changed only by links that the linter passes.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import tomllib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sdprep.errors import DataError
from sdprep.schema import TAG_CATEGORIES
from sdprep.tag_rules import normalise_tag

ListKind = Literal["aliases", "implications"]

_CATEGORY_OF_NUMBER = {
    "0": "general",
    "1": "artist",
    "3": "copyright",
    "4": "character",
    "5": "meta",
}


@dataclass(frozen=True)
class TagLink:
    """One line's claim that `antecedent` is (or entails) `consequent`; both canonical."""

    antecedent: str
    consequent: str
    line: int
    status: str = "active"
    written: str = ""  # the antecedent as the file spells it


@dataclass(frozen=True)
class TagList:
    """What one file says.

    Attributes:
        categories: canonical name → category, where the file is a vocabulary; else empty.
        num_rows: data lines of the file.
        num_rows_with_links: those that hold at least one link.
        malformed: (line, what is wrong).
    """

    path: Path
    format: str
    kind: ListKind
    links: tuple[TagLink, ...]
    categories: dict[str, str]
    num_rows: int
    num_rows_with_links: int
    malformed: tuple[tuple[int, str], ...]


class _Reading:
    """What a reader has found so far."""

    def __init__(self) -> None:
        self.links: list[TagLink] = []
        self.categories: dict[str, str] = {}
        self.malformed: list[tuple[int, str]] = []
        self.rows = 0
        self.rows_with_links = 0

    def link(self, old: Any, new: Any, line: int, status: str = "active") -> None:
        """Keep one link, or say why it is none."""
        if not isinstance(old, str) or not isinstance(new, str):
            self.malformed.append((line, f"names must be text, found {old!r} -> {new!r}"))
        elif not normalise_tag(old) or not normalise_tag(new):
            self.malformed.append((line, f"a name is empty: {old!r} -> {new!r}"))
        else:
            self.links.append(TagLink(normalise_tag(old), normalise_tag(new), line, status, old))


def read_tag_list(path: str | Path, kind: ListKind | None = None) -> TagList:
    """Read a list of aliases or implications, whatever its format.

    Args:
        path: `.csv`, `.json`, `.jsonl`, `.toml`, each also with `.gz`.
        kind: what the links mean; by default `implications` if the file name says so.

    Raises:
        DataError: missing, unreadable, not UTF-8, or of no known format.
    """
    path = Path(path)
    kind = kind or ("implications" if "implication" in path.name.lower() else "aliases")
    text = _read_text(path)
    found = _Reading()
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix == ".toml":
        name = _read_toml(text, kind, path, found)
    elif suffix in (".json", ".jsonl", ".ndjson") or text.lstrip()[:1] in ("{", "["):
        name = _read_json(text, path, found)
    else:
        name = _read_csv(text, kind, path, found)
    return TagList(
        path=path,
        format=name,
        kind=kind,
        links=tuple(found.links),
        categories=found.categories,
        num_rows=found.rows,
        num_rows_with_links=found.rows_with_links,
        malformed=tuple(found.malformed),
    )


def lint_file(path: str | Path) -> dict[str, Any]:
    """What `sdprep tags lint FILE` reports; see `LintReport.to_json`."""
    from sdprep.tag_lint import lint

    return lint(read_tag_list(path)).to_json()


def read_names(path: str | Path) -> tuple[str, ...]:
    """Tags of a plain text file, one a line; empty lines and lines that begin `# ` are skipped."""
    lines = _read_text(Path(path)).splitlines()
    names = (normalise_tag(line) for line in lines if not line.startswith("# "))
    return tuple(name for name in names if name)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"there is no tag list {path}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}", "Save it as UTF-8.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _read_csv(text: str, kind: ListKind, path: Path, found: _Reading) -> str:
    rows = csv.reader(io.StringIO(text, newline=""))
    try:
        numbered = [(rows.line_num, row) for row in rows if row]
    except csv.Error as error:
        raise DataError(f"{path} line {rows.line_num} is not CSV: {error}") from None
    if not numbered:
        raise DataError(f"{path} is empty", "Expected tag lines, such as: long_hair,0,99,longhair")
    header = [cell.strip() for cell in numbered[0][1]]
    if "antecedent_name" in header:
        _read_danbooru_csv(header, numbered[1:], path, found)
        return "danbooru csv"
    if kind == "implications":
        raise DataError(
            f"{path} has no column antecedent_name, so it holds no implications",
            "Tagcomplete lists hold aliases only: pass it as aliases.",
        )
    if header[:2] in (["name", "type"], ["name", "category"], ["tag", "category"]):
        numbered = numbered[1:]
    for line, row in numbered:
        _read_tagcomplete_row(line, row, found)
    return "tagcomplete csv"


def _read_danbooru_csv(
    header: list[str], rows: list[tuple[int, list[str]]], path: Path, found: _Reading
) -> None:
    if "consequent_name" not in header:
        raise DataError(f"{path} has antecedent_name but no column consequent_name")
    for line, row in rows:
        found.rows += 1
        if len(row) != len(header):
            found.malformed.append((line, f"{len(row)} fields, expected {len(header)}"))
            continue
        cells = dict(zip(header, row, strict=True))
        status = cells.get("status") or "active"
        found.link(cells["antecedent_name"], cells["consequent_name"], line, status)
        found.rows_with_links += 1


def _read_tagcomplete_row(line: int, row: list[str], found: _Reading) -> None:
    found.rows += 1
    name = normalise_tag(row[0])
    if not name or not 3 <= len(row) <= 4:
        found.malformed.append((line, f"expected name,type,count,aliases; found {','.join(row)!r}"))
        return
    number = row[1].strip()
    if not number.isdigit():
        found.malformed.append((line, f"type must be a number, found {row[1]!r}"))
        return
    # Other boorus number other categories (species, lore): they are general to us.
    found.categories[name] = _CATEGORY_OF_NUMBER.get(number, "general")
    aliases = row[3].split(",") if len(row) == 4 and row[3].strip() else []
    found.rows_with_links += bool(aliases)
    for alias in aliases:
        found.link(alias, row[0], line)


def _read_json(text: str, path: Path, found: _Reading) -> str:
    text = _without_wrapping(text)
    is_array = text.lstrip().startswith("[")
    for line, entry in _json_entries(text, is_array, path, found):
        found.rows += 1
        if not isinstance(entry, dict) or not {"antecedent_name", "consequent_name"} <= set(entry):
            found.malformed.append((line, "no antecedent_name and consequent_name"))
            continue
        status = str(entry.get("status") or "active")
        found.link(entry["antecedent_name"], entry["consequent_name"], line, status)
        found.rows_with_links += 1
    return "danbooru json" if is_array else "danbooru jsonl"


def _without_wrapping(text: str) -> str:
    """The list in an answer of e621's API, `{"tag_aliases": [...]}`; other text as it is."""
    if not re.match(r'\s*\{\s*"tag_(?:aliases|implications)"\s*:', text):
        return text
    try:
        (entries,) = json.loads(text).values()
    except ValueError:
        return text
    return json.dumps(entries) if isinstance(entries, list) else text


def _json_entries(
    text: str, is_array: bool, path: Path, found: _Reading
) -> Iterator[tuple[int, Any]]:
    if is_array:
        try:
            yield from enumerate(json.loads(text), 1)
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                found.rows += 1
                found.malformed.append((number, f"not JSON: {error}"))


def _read_toml(text: str, kind: ListKind, path: Path, found: _Reading) -> str:
    """Tables [aliases] other = "tag", [implications] tag = ["entailed"], [tags] tag = "meta"."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path} is not TOML: {error}") from None
    unknown = sorted(set(data) - {"aliases", "implications", "tags"})
    tables = [data.get(name, {}) for name in (kind, "tags")]
    if unknown or kind not in data or not all(isinstance(table, dict) for table in tables):
        raise DataError(
            f"{path} must have a table [{kind}]; found {', '.join(data) or 'nothing'}",
            'Such as: [aliases] longhair = "long_hair", [implications] cat_ears = ["animal_ears"].',
        )
    for line, (name, category) in enumerate(tables[1].items(), 1):
        if category in TAG_CATEGORIES:
            found.categories[normalise_tag(name)] = category
        else:
            found.malformed.append((line, f"tags.{name} = {category!r}: no such category"))
    for line, (old, new) in enumerate(tables[0].items(), 1):
        found.rows += 1
        found.rows_with_links += 1
        for target in new if isinstance(new, list) else [new]:
            found.link(old, target, line)
    return "toml"
