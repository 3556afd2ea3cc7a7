"""Tar shards: members that share a name up to its first dot are one image and its text.

Nothing is unpacked to the disk and nothing is unpickled. Shards are read by offset, so they must
not be compressed.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sdprep.errors import DataError
from sdprep.formats import FORMAT_OF_EXTENSION
from sdprep.sidecars import (
    MAX_SIDECAR_BYTES,
    BadText,
    decode_text,
    filled,
    parse_json,
    split_tags,
    text_of_record,
    with_exact,
)
from sdprep.source_item import Finding, ItemText, Limits, SourceConfig, SourceItem

PICKLES = ("pickle", "pkl", "pyd", "pth", "pt")
_TEXTS = ("txt", "caption", "json", "cls")


class Config(SourceConfig):
    """Tar shards in a folder, or one of them."""

    type: Literal["webdataset"] = "webdataset"
    path: Path = Field(description="The folder of shards, or one shard.")
    txt: Literal["tags", "caption"] = Field("caption", description="What .txt members hold.")

    def build(self) -> WebDatasetSource:
        """Make the source; raises DataError where there is no shard."""
        return WebDatasetSource(self.path, name=self.name, txt=self.txt, limits=self.limits())


@dataclass(frozen=True)
class _Part:
    """Where a member's bytes lie in its shard."""

    name: str
    offset: int
    size: int


@dataclass
class _Shard:
    path: Path
    key: str  # path below the folder, with forward slashes
    mtime_ns: int
    samples: dict[str, dict[str, _Part]] = field(default_factory=dict)  # name -> kind -> member

    def read(self, part: _Part) -> bytes:
        """The bytes of a member; every call opens the shard anew, so threads do not meet."""
        with self.path.open("rb") as file:
            file.seek(part.offset)
            return file.read(part.size)


class WebDatasetSource:
    """Images of some shards, in the order of shards and members."""

    def __init__(
        self,
        path: Path,
        *,
        name: str | None = None,
        txt: str = "caption",
        limits: Limits | None = None,
    ) -> None:
        self.root = Path(os.path.realpath(path))
        is_shard = self.root.is_file() and self.root.suffix.lower() == ".tar"
        if not is_shard and not self.root.is_dir():
            found = "is no .tar file" if self.root.exists() else "does not exist"
            raise DataError(f"the source {path} {found}", "Give a folder of .tar shards, or one.")
        self._paths = [self.root] if is_shard else _shards(self.root)
        if not self._paths:
            raise DataError(
                f"{path} holds no .tar shard",
                "Compressed ones must be unpacked first; a folder of images has --type folder.",
            )
        self.name, self.name_is_chosen = name or self.root.stem or "root", name is not None
        self.place = self.root.as_posix()
        self.limits = limits or Limits()
        self.findings: list[Finding] = []
        self._txt = txt
        self._index: list[_Shard] | None = None
        self._index_findings: list[Finding] = []

    def totals(self) -> tuple[int, int]:
        """Number of images and their bytes in all; reads the headers of the shards only."""
        sizes = [part.size for shard in self._indexed() for _, part in _images(shard)]
        return len(sizes), sum(sizes)

    def iter_samples(self) -> Iterator[SourceItem]:
        """All images with their text."""
        shards = self._indexed()
        self.findings = list(self._index_findings)
        for shard in shards:
            for stem, image in _images(shard):
                yield SourceItem(
                    f"{shard.key}/{image.name}",
                    load=partial(shard.read, image),
                    num_bytes=image.size,
                    mtime_ns=shard.mtime_ns,
                    text=self._text(shard, stem),
                )

    # --- the index ----------------------------------------------------------------------------

    def _indexed(self) -> list[_Shard]:
        if self._index is None:
            self._index = [self._indexed_shard(path) for path in self._paths]
        return self._index

    def _indexed_shard(self, path: Path) -> _Shard:
        inside = path.relative_to(self.root).as_posix() if path != self.root else path.name
        shard = _Shard(path, inside, path.stat().st_mtime_ns)
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    self._add(shard, member)
        except (tarfile.TarError, OSError, ValueError, EOFError):  # what was read so far counts
            self._index_findings.append(Finding("missing", "broken_shard", shard.key))
        return shard

    def _add(self, shard: _Shard, member: tarfile.TarInfo) -> None:
        folder, slash, base = member.name.rpartition("/")
        stem, _, kind = base.partition(".")
        kind = kind.lower()
        key = f"{shard.key}/{member.name}"
        if member.isdir():
            return
        finding: Finding | None = None
        if not member.isreg() or member.issparse():
            finding = Finding("skipped", "no_plain_member", key)
        elif member.offset_data + member.size > shard.path.stat().st_size:
            finding = Finding("missing", "truncated", key)
        elif not stem:
            finding = Finding("ignored", "hidden", key)
        elif kind in PICKLES:
            finding = Finding("warning", "pickle_member", key)
        elif kind not in _TEXTS and kind not in FORMAT_OF_EXTENSION:
            finding = Finding("ignored", f"unlisted .{kind}" if kind else "unlisted", key)
        elif kind in shard.samples.get(f"{folder}{slash}{stem}", {}):
            finding = Finding("warning", "duplicate_member", key)
        if finding is not None:
            self._index_findings.append(finding)
            return
        part = _Part(member.name, member.offset_data, member.size)
        shard.samples.setdefault(f"{folder}{slash}{stem}", {})[kind] = part

    # --- text -----------------------------------------------------------------------------------

    def _text(self, shard: _Shard, stem: str) -> ItemText:
        """Caption and tags of the text members, and what the JSON says besides."""
        contents: dict[str, str] = {}
        for kind in ("txt", "caption", "cls"):
            data = self._read(shard, stem, kind)
            contents[kind], is_guess = decode_text(data or b"")
            if is_guess:
                self._warn("text_cp1252", shard, stem, kind)
        record = self._record(shard, stem)
        if "caption" in record and record.get("text") == contents["txt"]:
            contents["txt"] = ""  # a copy of what the record says with more care
        text = ItemText(caption=contents["caption"] or None, class_name=contents["cls"] or None)
        if self._txt == "tags":
            text = filled(text, ItemText(tags=split_tags(contents["txt"])))
        else:
            text = filled(text, ItemText(caption=contents["txt"] or None))
        exact, bad = text_of_record(record)
        for name in bad:
            self._warn(f"bad_{name}", shard, stem, "json")
        return filled(with_exact(text, exact), exact)

    def _record(self, shard: _Shard, stem: str) -> dict[str, Any]:
        data = self._read(shard, stem, "json")
        if data is None:
            return {}
        try:
            record, is_guess = parse_json(data)
        except BadText:
            record, is_guess = None, False
        if is_guess:
            self._warn("text_cp1252", shard, stem, "json")
        if not isinstance(record, dict):
            self._warn("bad_json", shard, stem, "json")
            return {}
        return record

    def _read(self, shard: _Shard, stem: str, kind: str) -> bytes | None:
        part = shard.samples[stem].get(kind)
        if part is None:
            return None
        if part.size > MAX_SIDECAR_BYTES:
            self._warn("sidecar_too_large", shard, stem, kind)
            return None
        return shard.read(part)

    def _warn(self, problem: str, shard: _Shard, stem: str, kind: str) -> None:
        self.findings.append(Finding("warning", problem, f"{shard.key}/{stem}.{kind}"))


def _shards(folder: Path) -> list[Path]:
    """Shards below a folder, by path; links and hidden files are left alone."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() == ".tar")
    files = (path for path in found if path.is_file() and not path.is_symlink())
    return sorted(path for path in files if not path.name.startswith("."))


def _images(shard: _Shard) -> Iterator[tuple[str, _Part]]:
    """Name and image of each sample; a sample with two images is two, with one text."""
    for stem, parts in shard.samples.items():
        for kind, part in parts.items():
            if kind in FORMAT_OF_EXTENSION:
                yield stem, part
