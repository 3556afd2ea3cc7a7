"""What a push has to do: a prepared folder compared with a repository on the Hub, by digests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdprep.console import progress
from sdprep.errors import DataError, UserError
from sdprep.schema import MANIFEST, SPLITS, read_manifest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MEGABYTE = 1_000_000
_BLOCK = 4 * MEGABYTE
_LANCE = tuple(f"{split}.lance/" for split in SPLITS)
_SHARD = re.compile(rf"data/({'|'.join(SPLITS)})-\d{{5,}}\.parquet")
_COMES_WITH_A_REPOSITORY = {".gitattributes", ".gitignore", "README.md", "LICENSE", "LICENSE.md"}


class LocalFile:
    """One file of the prepared folder, as it was when the push began.

    Args:
        folder: of the data set.
        name: path in it, with forward slashes.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.name = folder / name, name
        self._stamp = self._look()
        self.num_bytes = self._stamp[0]

    def _look(self) -> tuple[int, int]:
        stat = self.path.stat()
        return stat.st_size, stat.st_mtime_ns

    def check_unchanged(self) -> None:
        """Stop if the file is not what it was; else half of two data sets would be sent."""
        if not self.path.is_file() or self._look() != self._stamp:
            raise DataError(
                f"{self.path} changed while it was sent", "Run the push again; the rest stays."
            )

    @property
    def is_data(self) -> bool:
        """Whether it holds images; the rest points at data, and goes last."""
        in_lance = self.name.startswith(_LANCE) and "/data/" in self.name
        return in_lance or self.name.startswith("data/")

    @cached_property
    def sha256(self) -> str:
        """What the Hub calls a large file's content."""
        return self._hash(hashlib.sha256())

    @cached_property
    def blob_id(self) -> str:
        """What git calls a small file's content: SHA-1 of a header and the bytes."""
        start = b"blob %d\0" % self.num_bytes
        return self._hash(hashlib.sha1(start, usedforsecurity=False))

    def _hash(self, digest: Any) -> str:
        with self.path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True)
class RemoteFile:
    """One file on the Hub: size, git's name of its content, and SHA-256 if it is a large one."""

    num_bytes: int
    blob_id: str
    sha256: str | None

    def equals(self, local: LocalFile) -> bool:
        """Whether the content is the same; reads the local file only if the sizes agree."""
        if self.num_bytes != local.num_bytes:
            return False
        if self.sha256 is not None:
            return self.sha256 == local.sha256
        return self.blob_id == local.blob_id


@dataclass(frozen=True)
class Remote:
    """A repository as it stands; one that does not exist has no revision and no files."""

    exists: bool = False
    private: bool | None = None
    revision: str | None = None
    files: Mapping[str, RemoteFile] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether an earlier push, finished or not, left files there."""
        return MANIFEST in self.files or any(map(_SHARD.fullmatch, self.files))


@dataclass(frozen=True)
class Plan:
    """What is to be sent and deleted.

    Args:
        new: data whose names the Hub does not know; can be committed at any time.
        replaced: data whose names are there with other content; committed at the end, so that
            no reader meets half of one publication and half of another.
        last: all that points at data: card, `sdprep.json`, pictures, versions of Lance tables.
        deleted: names of an earlier publication that are no more.
        same: files that are there already.
    """

    new: list[LocalFile]
    replaced: list[LocalFile]
    last: list[LocalFile]
    deleted: list[str]
    same: list[LocalFile]

    @property
    def to_send(self) -> list[LocalFile]:
        """In the order in which they go."""
        return [*self.new, *self.replaced, *self.last]


def local_files(folder: Path) -> list[LocalFile]:
    """The files that belong to a prepared data set; others in the folder stay at home.

    Raises:
        DataError: no prepared data set of this version, a file of it is missing or lies elsewhere.
    """
    listed = read_manifest(folder).get("files")
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise DataError(f"{folder / MANIFEST} lists no files", "Publish the data set again.")
    lance = [path for split in _LANCE for path in (folder / split).rglob("*") if path.is_file()]
    names = {MANIFEST, *listed, *(path.relative_to(folder).as_posix() for path in lance)}
    home = folder.resolve()
    for name in sorted(names):
        path = (folder / name).resolve()
        if home not in path.parents:
            raise DataError(f"{folder / MANIFEST} lists {name!r}, which lies outside the folder")
        if not path.is_file():
            raise DataError(f"{folder} is not whole: {name} is missing", "Publish it again.")
    return [LocalFile(folder, name) for name in sorted(names)]


def look(api: HfApi, repo: str, revision: str | None = None) -> Remote:
    """The repository on the Hub; `revision` is a commit just made, None takes the newest."""
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import EntryNotFoundError

    from sdprep.hub_access import status_of

    try:
        info = api.dataset_info(repo)
    except Exception as error:
        if status_of(error) == 404:
            return Remote()
        raise
    at = revision or info.sha or "main"
    try:
        tree = list(api.list_repo_tree(repo, recursive=True, revision=at, repo_type="dataset"))
    except EntryNotFoundError:  # a repository without any file
        tree = []
    files = {
        entry.path: RemoteFile(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
        for entry in tree
        if isinstance(entry, RepoFile)
    }
    return Remote(True, info.private, revision or info.sha, files)


def compare(
    local: list[LocalFile], remote: Remote, repo: str, manifest: Callable[[], dict[str, Any]]
) -> Plan:
    """Sort the files of both sides.

    Args:
        local: the prepared data set.
        remote: the repository.
        repo: its name, for errors.
        manifest: fetches the `sdprep.json` of the repository; called only if it matters.

    Raises:
        UserError: the repository holds files that sdprep did not publish.
    """
    plan = Plan([], [], [], [], [])
    known = [file for file in local if file.name in remote.files]
    with progress("comparing", sum(_megabytes(file) for file in known), unit="MB") as bar:
        for file in local:
            there = remote.files.get(file.name)
            if there is not None and there.equals(file):
                plan.same.append(file)
            elif not file.is_data:
                plan.last.append(file)
            else:
                (plan.new if there is None else plan.replaced).append(file)
            if there is not None:
                bar.advance(_megabytes(file))
    names = {file.name for file in local}
    plan.deleted.extend(_outdated(sorted(set(remote.files) - names), remote, repo, manifest))
    return plan


def _megabytes(file: LocalFile) -> int:
    return -(-file.num_bytes // MEGABYTE)


def _outdated(
    extra: list[str], remote: Remote, repo: str, manifest: Callable[[], dict[str, Any]]
) -> list[str]:
    """Of the names that only the Hub has, those of an earlier publication."""
    unknown = [name for name in extra if not _is_ours(name)]
    unknown = [name for name in unknown if name not in _COMES_WITH_A_REPOSITORY]
    if not unknown:
        return [name for name in extra if _is_ours(name)]
    if MANIFEST not in remote.files:
        raise UserError(
            f"{repo} holds files that sdprep did not publish: {', '.join(unknown[:5])}"
            + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""),
            "Choose another name, or delete them on the Hub yourself.",
        )
    listed = set(manifest().get("files") or [])
    return [name for name in extra if _is_ours(name) or name in listed]


def _is_ours(name: str) -> bool:
    return bool(_SHARD.fullmatch(name)) or name.startswith(_LANCE)
