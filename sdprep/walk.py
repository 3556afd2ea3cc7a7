"""Walking a folder of images: what is there, and what is better left unopened."""

from __future__ import annotations

import os
import posixpath
import stat
from dataclasses import dataclass, field
from pathlib import Path

from sdprep.formats import FORMAT_OF_EXTENSION, sniff
from sdprep.source_item import Finding

SIDECARS = ("txt", "caption", "json")
JUNK = ("@eadir", "__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "#recycle", "lost+found")

_SPECIAL = (
    (stat.S_ISFIFO, "fifo"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


@dataclass(frozen=True)
class File:
    """A plain file and how it looked when the folder was listed."""

    key: str  # path in the folder, with forward slashes
    path: Path
    num_bytes: int
    mtime_ns: int


@dataclass
class Listing:
    """What a walk found; sidecars are keyed by (path without extension, extension)."""

    images: list[File] = field(default_factory=list)
    sidecars: dict[tuple[str, str], File] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def walk(root: Path, *, recursive: bool = True, sidecars: tuple[str, ...] = SIDECARS) -> Listing:
    """List the images and sidecars below `root`, sorted; nothing but plain files is opened.

    Args:
        root: an existing folder, without links in its path.
        recursive: go into subfolders.
        sidecars: extensions of text files to list; other files are counted as unlisted.
    """
    walker = _Walker(root, recursive, sidecars)
    folders = [(root, "")]
    while folders:
        folders += walker.list_one(*folders.pop())
    listing = walker.listing
    listing.images.sort(key=lambda file: file.key)
    listing.sidecars = dict(sorted(listing.sidecars.items()))
    listing.findings.sort(key=lambda finding: finding.key)
    return listing


@dataclass
class _Walker:
    root: Path
    recursive: bool
    sidecars: tuple[str, ...]
    listing: Listing = field(default_factory=Listing)

    def list_one(self, folder: Path, prefix: str) -> list[tuple[Path, str]]:
        """List one folder; returns the subfolders to go into."""
        deeper = []
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            self.listing.findings.append(Finding("skipped", "unreadable_folder", prefix or "."))
            return []
        for entry in found:
            key = prefix + os.fsencode(entry.name).decode("utf-8", "backslashreplace")
            refusal = self._refusal(entry, key)
            if refusal is not None:
                self.listing.findings.append(refusal)
            elif entry.is_dir():
                deeper.append((Path(entry.path), key + "/"))
            else:
                self._list_file(entry, key)
        return deeper

    def _refusal(self, entry: os.DirEntry[str], key: str) -> Finding | None:
        """Why an entry is neither opened nor entered, or None. Nothing is opened to tell."""
        name = entry.name.lower()
        if name.startswith(".") or name in JUNK:
            return Finding("ignored", "hidden", key)
        try:
            mode = entry.stat().st_mode
        except OSError:  # a link to nowhere, or to itself
            kind = "broken_link" if _is_dead(entry) else "link_loop"
            return Finding("skipped", kind, key)
        if entry.is_symlink():
            target = Path(os.path.realpath(entry.path))
            if not target.is_relative_to(self.root):
                return Finding("skipped", "outside_root", key)
            if stat.S_ISDIR(mode):
                # What it leads to is found at its own place; going in would find it twice.
                is_loop = Path(entry.path).is_relative_to(target)
                return Finding("skipped", "link_loop" if is_loop else "linked_folder", key)
        for is_special, kind in _SPECIAL:
            if is_special(mode):
                return Finding("skipped", kind, key)
        if stat.S_ISDIR(mode) and name.endswith(".lance"):
            return Finding("ignored", "table", key)
        if stat.S_ISDIR(mode) and not self.recursive:
            return Finding("ignored", "subfolder", key)
        return None

    def _list_file(self, entry: os.DirEntry[str], key: str) -> None:
        status = entry.stat()
        file = File(key, Path(entry.path), status.st_size, status.st_mtime_ns)
        extension = posixpath.splitext(key)[1][1:].lower()
        if extension in FORMAT_OF_EXTENSION or (not extension and _looks_like_image(file)):
            self.listing.images.append(file)
        elif extension in self.sidecars:
            place = (stem_of(key), extension)
            if place in self.listing.sidecars:  # a.txt beside a.TXT
                self.listing.findings.append(Finding("ignored", "orphan_sidecar", key))
            else:
                self.listing.sidecars[place] = file
        else:
            kind = f"unlisted .{extension}" if extension else "unlisted"
            self.listing.findings.append(Finding("ignored", kind, key))


def stem_of(key: str) -> str:
    """A key without the extension of its last part."""
    return posixpath.splitext(key)[0]


def _looks_like_image(file: File) -> bool:
    try:
        with file.path.open("rb") as opened:
            return sniff(opened.read(64)) is not None
    except OSError:
        return False


def _is_dead(entry: os.DirEntry[str]) -> bool:
    """Whether a link that cannot be followed leads to nothing, rather than round in a circle."""
    try:
        os.stat(entry.path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False
