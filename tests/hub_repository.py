"""What a Hub on the loopback keeps: files, commits, and why it refuses."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Entry:
    """One file of a commit: its bytes, and whether it lies in LFS."""

    content: bytes
    is_large: bool

    def git_id(self) -> str:
        shown = pointer(self.content) if self.is_large else self.content
        return hashlib.sha1(b"blob %d\0" % len(shown) + shown).hexdigest()

    def describe(self, path: str) -> dict[str, Any]:
        found = {"type": "file", "path": path, "size": len(self.content), "oid": self.git_id()}
        if self.is_large:
            sha256 = hashlib.sha256(self.content).hexdigest()
            found["lfs"] = {"oid": sha256, "size": len(self.content), "pointerSize": 130}
        return found


def pointer(content: bytes) -> bytes:
    sha256 = hashlib.sha256(content).hexdigest()
    lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{sha256}")
    return "\n".join([*lines, f"size {len(content)}", ""]).encode()


@dataclass
class Repository:
    private: bool
    commits: list[tuple[str, str, dict[str, Entry]]] = field(default_factory=list)

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, Entry]:
        return self.commits[-1][2]

    def at(self, revision: str) -> dict[str, Entry] | None:
        if revision == "main":
            return self.files
        return next((files for oid, _, files in self.commits if oid == revision), None)

    def commit(self, message: str, files: dict[str, Entry]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append((oid, message, files))
        return oid


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
