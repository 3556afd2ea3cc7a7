"""Push: from a prepared folder to a data set on the Hub, so that no byte goes there twice.

Data goes first, in commits of a few files each; what points at it, the card above all, goes in
the last commit. Whenever the push ends too early, the next one compares digests and goes on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdprep.console import Progress, progress, say, warn
from sdprep.errors import DataError, UserError
from sdprep.hub_access import limit_silence, open_hub, patiently, quiet
from sdprep.parallel import each
from sdprep.push_plan import MEGABYTE, LocalFile, Plan, Remote, compare, local_files, look
from sdprep.schema import MANIFEST, read_manifest

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

IN_FLIGHT = 4
"""Files that are sent at a time, and files in a commit: what a kill may cost."""
MOST_COMMITS = 100
"""A large data set takes larger commits, as the Hub asks."""
LARGEST_COMMIT = 500
"""Files that replace others in one commit; the Hub ends those that take it too long."""


@dataclass(frozen=True)
class PushReport:
    """What a push did.

    Args:
        repo: name on the Hub.
        url: page of the data set.
        revision: newest commit.
        uploaded: files that this run sent.
        already_there: files that were there with the same content.
        deleted: files of an earlier publication that are no more.
        num_bytes_sent: bytes of the files in `uploaded`; with Xet less goes over the line, for
            the Hub keeps parts of files that it knows.
    """

    repo: str
    url: str
    revision: str
    uploaded: int
    already_there: int
    deleted: int
    num_bytes_sent: int

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return dict(self.__dict__)


def push(folder: Path, repo: str, *, private: bool = True, api: HfApi | None = None) -> PushReport:
    """Send a prepared data set to the Hub; only what is not there yet.

    Args:
        folder: a data set that `publish` wrote; files in it that are not part of it stay.
        repo: `USER/NAME`; made if missing.
        private: visibility of a repository that is made; never changed later.
        api: from `open_hub`, if the account is checked already.

    Raises:
        UserError: no access, the repository is another's or public against the wish, or the Hub
            did not answer for minutes.
        DataError: the folder is no whole data set of ours, or changed meanwhile.
    """
    files = local_files(folder)
    api = api or open_hub(repo)
    with quiet():
        return _Push(api, repo, private, files).run()


def push_preview(folder: Path, repo: str, *, private: bool = True) -> dict[str, Any]:
    """What `push` would do, without doing it.

    Returns:
        `send` (list of path and num_bytes), `num_bytes`, `delete` (paths), `already_there`,
        `exists`, `private`.
    """
    files = local_files(folder)
    api = open_hub(repo)
    with quiet():
        remote = patiently(lambda: look(api, repo), repo)
        _check_visibility(remote, repo, private)
        plan = patiently(
            lambda: compare(files, remote, repo, lambda: _remote_manifest(api, repo, remote)), repo
        )
    return {
        "repo": repo,
        "exists": remote.exists,
        "private": remote.private if remote.exists else private,
        "send": [{"path": file.name, "num_bytes": file.num_bytes} for file in plan.to_send],
        "num_bytes": sum(file.num_bytes for file in plan.to_send),
        "delete": plan.deleted,
        "already_there": len(plan.same),
    }


@dataclass
class _Push:
    """One push over all its tries."""

    api: HfApi
    repo: str
    private: bool
    files: list[LocalFile]
    sent: dict[str, int] = field(default_factory=dict)  # name -> bytes
    num_deleted: int = 0
    num_commits: int = 0
    parent: str | None = None
    is_checked: bool = False

    def run(self) -> PushReport:
        """Try until all is there; each try looks anew, and does what is left."""
        return patiently(self._try, self.repo, lambda: len(self.sent) + self.num_commits)

    def _try(self) -> PushReport:
        limit_silence()
        remote = look(self.api, self.repo)
        if not self.is_checked:
            _check_visibility(remote, self.repo, self.private)
            _say_what_is_replaced(remote, self.repo)
            self.is_checked = True
        if not remote.exists:
            self.api.create_repo(
                self.repo, private=self.private, repo_type="dataset", exist_ok=True
            )
            remote = look(self.api, self.repo)
        self.parent = remote.revision
        plan = compare(self.files, remote, self.repo, lambda: self._manifest(remote))
        commits = self.num_commits
        self._send(plan)
        if self.num_commits > commits:
            self._verify()
        already = len(self.files) - len(self.sent)
        url = f"{self.api.endpoint}/datasets/{self.repo}"
        num_bytes = sum(self.sent.values())
        counts = (len(self.sent), already, self.num_deleted, num_bytes)
        return PushReport(self.repo, url, self.parent or "", *counts)

    def _manifest(self, remote: Remote) -> dict[str, Any]:
        return _remote_manifest(self.api, self.repo, remote)

    def _send(self, plan: Plan) -> None:
        from huggingface_hub import CommitOperationDelete

        total = sum(file.num_bytes for file in plan.to_send)
        with progress("sending", -(-total // MEGABYTE), unit="MB") as bar:
            megabytes = _Megabytes(bar)
            size = max(IN_FLIGHT, -(-len(plan.new) // MOST_COMMITS))
            for number, group in enumerate(_groups(plan.new, size), 1):
                operations = self._upload(group, megabytes)
                self._commit(f"Add data ({number})", group, operations)
            ready = list(zip(plan.replaced, self._upload(plan.replaced, megabytes), strict=True))
            *most, rest = list(_groups(ready, LARGEST_COMMIT)) or [[]]
            for some in most:
                self._commit("Replace data", *_unzipped(some))
            group, operations = _unzipped(rest)
            operations += self._upload(plan.last, megabytes)
            gone = [CommitOperationDelete(name) for name in plan.deleted]
            self._commit("Publish with sdprep", group + plan.last, [*operations, *gone])
        self.num_deleted += len(plan.deleted)

    def _upload(
        self, files: Sequence[LocalFile], megabytes: _Megabytes
    ) -> list[CommitOperationAdd]:
        """Send contents to the Hub's storage, several at a time; small files wait for the commit.

        The Hub keeps contents that no commit names yet, so they need not be sent again either.
        """
        from huggingface_hub import CommitOperationAdd

        def one(file: LocalFile) -> None:
            file.check_unchanged()
            try:
                self.api.preupload_lfs_files(
                    self.repo, [made[file.name]], repo_type="dataset", free_memory=False
                )
            except RuntimeError as error:  # how both ways of storage say that they failed
                # Without its cause: a 403 of the storage says that an address has expired.
                raise ConnectionError(f"{file.name}: {error.__cause__ or error}") from None

        def arrived(file: LocalFile) -> None:
            megabytes.advance(file.num_bytes)
            self.sent[file.name] = file.num_bytes

        made = {file.name: CommitOperationAdd(file.name, str(file.path)) for file in files}
        each(one, files, IN_FLIGHT, arrived)
        return list(made.values())

    def _commit(self, message: str, files: Sequence[LocalFile], operations: Sequence[Any]) -> None:
        """One commit; refused by the Hub if another one came since the last look."""
        if not operations:
            return
        for file in files:
            file.check_unchanged()
        made = self.api.create_commit(
            self.repo,
            operations,
            commit_message=message,
            repo_type="dataset",
            parent_commit=self.parent if self.parent and len(self.parent) == 40 else None,
        )
        self.num_commits += made.oid != self.parent
        self.parent = made.oid

    def _verify(self) -> None:
        """See that every name is there; a `.gitignore` on the Hub drops files without a word."""
        there = look(self.api, self.repo, self.parent).files
        missing = [file.name for file in self.files if file.name not in there]
        if missing:
            raise UserError(
                f"the Hub took {self.repo} without {', '.join(missing[:5])}"
                + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
                "Is there a .gitignore in the repository? Delete it there and push again.",
            )


class _Megabytes:
    """Turns bytes into whole steps of a bar in megabytes, without losing the small ones."""

    def __init__(self, bar: Progress) -> None:
        self.bar, self.num_bytes = bar, 0

    def advance(self, num_bytes: int) -> None:
        before = -(-self.num_bytes // MEGABYTE)
        self.num_bytes += num_bytes
        self.bar.advance(-(-self.num_bytes // MEGABYTE) - before)


def _groups(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _unzipped(pairs: Sequence[tuple[LocalFile, Any]]) -> tuple[list[LocalFile], list[Any]]:
    return [file for file, _ in pairs], [operation for _, operation in pairs]


# --- before ---------------------------------------------------------------------------------------


def _check_visibility(remote: Remote, repo: str, private: bool) -> None:
    """A repository that exists keeps its visibility; nothing private goes to a public one."""
    if not remote.exists or remote.private is None or remote.private == private:
        return
    if not private:
        warn(f"{repo} is private and stays so; its settings page on the Hub can change that")
    elif remote.is_ours:
        warn(f"{repo} is public and stays so; say --public to show that you know")
    else:
        raise UserError(
            f"{repo} is public, and the data set should be private",
            "Say --public (private = false), or make it private on its settings page.",
        )


def _say_what_is_replaced(remote: Remote, repo: str) -> None:
    if "README.md" in remote.files and MANIFEST not in remote.files:
        say(f"README.md of {repo} is replaced by the card; the old one stays in its history")


def _remote_manifest(api: HfApi, repo: str, remote: Remote) -> dict[str, Any]:
    """`sdprep.json` of the repository, which tells the files of the earlier publication."""
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(
            repo, MANIFEST, repo_type="dataset", revision=remote.revision, local_dir=folder
        )
        try:
            return read_manifest(path)
        except DataError as error:
            raise DataError(
                f"{repo}: {error.message.replace(str(path), MANIFEST)}",
                "It was published by another release of sdprep; choose another name.",
            ) from None
