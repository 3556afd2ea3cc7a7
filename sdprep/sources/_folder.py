"""A folder of images with text beside them; kohya's layout is read as it is.

`name.txt` holds tags, `name.caption` a caption, `name.json` or `name.jpg.json` both and more. A
folder `<repeats>_<class>` gives its images both. A JSON file at the top that maps image names to
`{caption, tags}` (kohya's metadata), or `metadata.jsonl`, `.csv` or `.parquet` beside the images
(load_dataset's imagefolder), fills in what sidecars do not say.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from sdprep.errors import DataError
from sdprep.sidecars import (
    MAX_SIDECAR_BYTES,
    BadText,
    decode_text,
    filled,
    parse_csv,
    parse_json,
    parse_json_lines,
    parse_parquet,
    split_tags,
    text_of_record,
    with_exact,
)
from sdprep.source_item import Finding, ItemText, Limits, SourceItem
from sdprep.walk import SIDECARS, File, Listing, stem_of, walk

MAX_REPEATS = 1000
"""A larger number before an underscore is a year or an id, not kohya's repeats."""

_METADATA = {
    "metadata.jsonl": parse_json_lines,
    "metadata.csv": parse_csv,
    "metadata.parquet": parse_parquet,
}
_LISTS = tuple(name.partition(".")[2] for name in _METADATA)
_KOHYA = re.compile(r"(\d+)_(.+)")
Role = Literal["tags", "caption"]


class FolderSource:
    """Images below one folder, ordered by key: the path in it, with forward slashes."""

    def __init__(
        self,
        path: Path,
        *,
        name: str | None = None,
        recursive: bool = True,
        roles: dict[str, Role] | None = None,
        kohya_folders: bool = True,
        limits: Limits | None = None,
    ) -> None:
        if not path.is_dir():
            found = "is a file" if path.exists() else "does not exist"
            raise DataError(f"the source folder {path} {found}", "Give the folder of your images.")
        self.root = Path(os.path.realpath(path))
        self.name, self.name_is_chosen = name or self.root.name or "root", name is not None
        self.place = self.root.as_posix()
        self.limits = limits or Limits()
        self.findings: list[Finding] = []
        self._recursive, self._kohya_folders = recursive, kohya_folders
        self._roles: dict[str, Role] = roles or {"txt": "tags", "caption": "caption"}
        self._listing: Listing | None = None

    def totals(self) -> tuple[int, int]:
        """Number of images and their bytes in all."""
        images = self._walked().images
        return len(images), sum(file.num_bytes for file in images)

    def locate(self, key: str) -> Path:
        """Where the file of a key lies."""
        return self.root / key

    def iter_samples(self) -> Iterator[SourceItem]:
        """All images with their text, by key."""
        listing = self._walked()
        self.findings = list(listing.findings)
        shared = Counter(stem_of(file.key) for file in listing.images)
        metadata, metadata_files = self._metadata(listing)
        metadata_files += self._metadata_lines(listing, metadata)
        used: set[str] = set(metadata_files)
        for file in listing.images:
            text = self._text(file, listing, shared, used)
            text = filled(text, metadata.get(file.key, ItemText()))
            if self._kohya_folders:
                text = filled(text, _kohya_text(self.root.name, file.key))
            yield SourceItem(
                file.key,
                file.path,
                num_bytes=file.num_bytes,
                mtime_ns=file.mtime_ns,
                text=text,
            )
        for sidecar in listing.sidecars.values():
            if sidecar.key not in used:
                extension = sidecar.key.rpartition(".")[2].lower()
                kind = f"unlisted .{extension}" if extension in _LISTS else "orphan_sidecar"
                self.findings.append(Finding("ignored", kind, sidecar.key))

    def _walked(self) -> Listing:
        if self._listing is None:
            kinds = (*SIDECARS, *_LISTS)
            self._listing = walk(self.root, recursive=self._recursive, sidecars=kinds)
        return self._listing

    # --- text beside images -------------------------------------------------------------------

    def _text(self, file: File, listing: Listing, shared: Counter[str], used: set[str]) -> ItemText:
        """Sidecars of one image: `a.jpg.txt` before `a.txt`, text files before JSON."""
        found: dict[str, tuple[File, bytes]] = {}
        for kind in SIDECARS:
            for stem in (file.key, stem_of(file.key)):
                sidecar = listing.sidecars.get((stem, kind))
                if sidecar is None:
                    continue
                is_first = sidecar.key not in used
                used.add(sidecar.key)
                if stem != file.key and shared[stem] > 1 and is_first:
                    self._warn("shared_sidecar", sidecar.key)
                data = self._read(sidecar)
                if data is not None:
                    found[kind] = (sidecar, data)
                break
        text = ItemText()
        for role in ("caption", "tags"):
            # Where both kinds of file have one role, the kind that is named after it comes first.
            for kind in ("caption", "txt") if role == "caption" else ("txt", "caption"):
                if kind in found and self._roles[kind] == role:
                    text = filled(text, self._plain(*found[kind], role))
        if "json" not in found:
            return text
        record = self._record(*found["json"])
        return filled(with_exact(text, record), record)

    def _plain(self, sidecar: File, data: bytes, role: str) -> ItemText:
        content, is_guess = decode_text(data)
        if is_guess:
            self._warn("text_cp1252", sidecar.key)
        if role == "caption":
            return ItemText(caption=content or None)
        return ItemText(tags=split_tags(content))

    def _record(self, sidecar: File, data: bytes) -> ItemText:
        try:
            record, is_guess = parse_json(data)
        except BadText as error:
            self._warn(str(error), sidecar.key)
            return ItemText()
        if is_guess:
            self._warn("text_cp1252", sidecar.key)
        if not isinstance(record, dict):
            self._warn("bad_json", sidecar.key)
            return ItemText()
        text, bad = text_of_record(record)
        for name in bad:
            self._warn(f"bad_{name}", sidecar.key)
        return text

    def _read(self, sidecar: File, limit: int = MAX_SIDECAR_BYTES) -> bytes | None:
        if sidecar.num_bytes > limit:
            self._warn("sidecar_too_large", sidecar.key)
            return None
        try:
            return sidecar.path.read_bytes()
        except OSError:
            self._warn("unreadable_sidecar", sidecar.key)
            return None

    def _warn(self, kind: str, key: str) -> None:
        finding = Finding("warning", kind, key)
        self.findings.append(finding)

    # --- kohya metadata -----------------------------------------------------------------------

    def _metadata(self, listing: Listing) -> tuple[dict[str, ItemText], list[str]]:
        """Text by image key from JSON files at the top that are no image's sidecar."""
        stems = {stem_of(file.key) for file in listing.images} | {f.key for f in listing.images}
        texts: dict[str, ItemText] = {}
        files = []
        for (stem, kind), file in listing.sidecars.items():
            if kind != "json" or stem in stems or "/" in file.key:
                continue
            records = self._records(file)
            if records is not None:
                files.append(file.key)
                self._match(records, listing.images, texts)
        return texts, files

    def _records(self, file: File) -> dict[str, Any] | None:
        """The content of a metadata file, or None if it is some other JSON."""
        data = self._read(file, limit=2**31)
        try:
            records, _ = parse_json(data or b"")
        except BadText:
            self._warn("bad_json", file.key)
            return None
        is_metadata = isinstance(records, dict) and records
        if not is_metadata or not all(isinstance(value, dict) for value in records.values()):
            return None
        has_text = any({"caption", "tags"} & value.keys() for value in records.values())
        return records if has_text else None

    def _match(
        self, records: dict[str, Any], images: list[File], texts: dict[str, ItemText]
    ) -> None:
        places: dict[str, list[str]] = {}
        for image in images:
            base = image.key.rpartition("/")[2]
            for name in dict.fromkeys((image.key, stem_of(image.key), base, stem_of(base))):
                places.setdefault(name, []).append(image.key)
        for name, record in records.items():
            inside = self._inside(name)
            if inside is None:
                self.findings.append(Finding("missing", "outside_root", name))
            elif inside not in places:
                self.findings.append(Finding("missing", "missing_file", name))
            else:
                text, bad = text_of_record(record)
                for part in bad:
                    self._warn(f"bad_{part}", name)
                exact = [key for key in places[inside] if inside in (key, stem_of(key))]
                for key in exact or places[inside]:
                    texts[key] = filled(texts.get(key, ItemText()), text)

    def _metadata_lines(self, listing: Listing, texts: dict[str, ItemText]) -> list[str]:
        """Add the text of `metadata` lists, whose `file_name` is relative to their folder."""
        keys = {file.key for file in listing.images}
        files = []
        for file in listing.sidecars.values():
            folder, slash, name = file.key.rpartition("/")
            if name not in _METADATA:
                continue
            files.append(file.key)
            for number, record in self._listed(file):
                image = record.get("file_name") if record else None
                if record is None or not isinstance(image, str):
                    place = f"{file.key}:{number}"
                    self.findings.append(Finding("missing", "bad_metadata_line", place))
                    continue
                inside = self._inside(posixpath.normpath(f"{folder}{slash}{image}"))
                if inside not in keys:
                    kind = "outside_root" if inside is None else "missing_file"
                    self.findings.append(Finding("missing", kind, f"{folder}{slash}{image}"))
                    continue
                text, bad = text_of_record(record)
                for part in bad:
                    self._warn(f"bad_{part}", inside)
                texts[inside] = filled(texts.get(inside, ItemText()), text)
        return files

    def _listed(self, file: File) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Number and record of each line or row of a metadata list."""
        data = self._read(file, limit=2**31)
        if data is None:
            return
        try:
            yield from _METADATA[file.key.rpartition("/")[2]](data)
        except BadText as error:
            self._warn(str(error), file.key)

    def _inside(self, name: str) -> str | None:
        """A metadata key as a path in the folder, or None if it leads out of it."""
        path = PurePosixPath(name.replace("\\", "/"))
        is_absolute = path.is_absolute() or re.match(r"[A-Za-z]:", name) is not None
        if is_absolute:
            if not path.is_relative_to(self.place):
                return None
            path = path.relative_to(self.place)
        return None if ".." in path.parts else path.as_posix()


def _kohya_text(root_name: str, key: str) -> ItemText:
    """Repeats and class from the nearest folder called `<repeats>_<class>`."""
    for part in reversed((root_name, *PurePosixPath(key).parts[:-1])):
        match = _KOHYA.fullmatch(part)
        if match and len(match[1]) <= 4 and int(match[1]) <= MAX_REPEATS:
            return ItemText(repeats=int(match[1]), class_name=match[2])
    return ItemText()
