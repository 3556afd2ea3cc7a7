"""Files of one commit of a data set on the Hub, of which any part can be read.

What may pass (no connection, too many requests) is tried again for some minutes, so that a night's
run survives a router. The token goes to the Hub alone, never to the storage that it points to.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdprep.console import warn
from sdprep.errors import DataError, UserError
from sdprep.hub_access import LOGIN, may_pass, quiet, said, status_of

if TYPE_CHECKING:
    from sdtrain.data_section import DataSection

WAITS_S = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 120.0)
"""Seconds before each new try."""
SILENCE_S = 30.0
"""Seconds in which nothing moves on a connection, after which it counts as lost."""
_LONGEST_WAIT_S = 600.0
_PARTIAL = 206


@dataclass(eq=False)
class HubFile:
    """One file of one commit.

    Args:
        repo: name of the data set.
        revision: the commit.
        path: in the data set.
        url: where the Hub is asked for it.
        size: bytes.
        oid: digest of the content, as the Hub states it.
    """

    repo: str
    revision: str
    path: str
    url: str
    size: int
    oid: str
    _storage: str | None = field(default=None, init=False, repr=False)

    def __str__(self) -> str:
        return f"{self.path} of {self.repo} at {self.revision[:12]}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_storage": None}  # signed addresses stay in their process

    def read(self, start: int, end: int) -> bytes:
        """Bytes from `start` up to, not with, `end`.

        Raises:
            DataError: the Hub refuses, or cannot be reached for too long.
        """
        failures = 0
        while True:
            try:
                return self._ask(start, end)
            except UserError:
                raise
            except Exception as error:
                self._storage = None
                if not may_pass(error) or failures == len(WAITS_S):
                    told = self._in_words(error)
                    if told is error:
                        raise
                    raise told from error
                wait = max(WAITS_S[failures], _asked_to_wait(error))
                failures += 1
                warn(f"{self}: {said(error)}; trying again in {wait:g} s")
                time.sleep(wait)

    def _ask(self, start: int, end: int) -> bytes:
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        wanted = {"Range": f"bytes={start}-{end - 1}"}
        options: dict[str, Any] = {"timeout": SILENCE_S, "follow_redirects": True}
        if (address := self._storage) is not None:  # known from before; saves asking the Hub
            answer = get_session().get(address, headers=wanted, **options)
            if answer.status_code == _PARTIAL:
                return self._checked(answer, end - start)
            self._storage = None  # its signature has expired
        answer = get_session().get(self.url, headers={**build_hf_headers(), **wanted}, **options)
        hf_raise_for_status(answer)
        if answer.history:
            self._storage = str(answer.url)
        return self._checked(answer, end - start)

    def _checked(self, answer: Any, num_bytes: int) -> bytes:
        content = bytes(answer.content)
        if answer.status_code != _PARTIAL:
            raise DataError(
                f"{self}: the server does not answer with parts of files",
                "Leave data.streaming out: the data set is then downloaded first.",
            )
        if len(content) != num_bytes:
            raise ConnectionError(f"{len(content)} bytes came instead of {num_bytes}")
        return content

    def _in_words(self, error: Exception) -> Exception:
        status = status_of(error)
        if status is None and not may_pass(error):
            return error
        if status in (401, 403):
            return DataError(f"{self}: the Hub does not let you read it: {said(error)}", LOGIN)
        if status == 404:
            return DataError(
                f"{self} is gone from the Hub: {said(error)}",
                "Its history may have been rewritten; see data.revision.",
            )
        return DataError(
            f"{self} cannot be fetched: {said(error)}",
            "Is the network there? The same command goes on from the newest checkpoint.",
        )


def _asked_to_wait(error: BaseException) -> float:
    """Seconds that a busy server asks for; 0 if it does not say."""
    headers: Mapping[str, str] = getattr(getattr(error, "response", None), "headers", {})
    found = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", ""))
    found = found or re.search(r";\s*t=(\d+)", headers.get("RateLimit", ""))
    return min(float(found[1]) + 1, _LONGEST_WAIT_S) if found else 0.0


# --- one commit -----------------------------------------------------------------------------------


def pinned(section: DataSection) -> DataSection:
    """The same section with the commit that its revision is now.

    Raises:
        DataError: the path is no data set on the Hub, or there is no such revision.
        UserError: the Hub cannot be asked.
    """
    if Path(section.path).exists():
        raise DataError(
            f"data.streaming = true, but data.path = {section.path!r} lies on this machine already",
            "Leave data.streaming out: nothing has to be fetched.",
        )
    info = _asked(section, lambda api: api.dataset_info(section.path, revision=section.revision))
    return section.model_copy(update={"revision": str(info.sha)})


def list_files(section: DataSection, folder: str) -> list[HubFile]:
    """The files of one folder at a commit, by name; none if there is no such folder.

    Args:
        section: pinned.
        folder: in the data set.
    """
    from huggingface_hub import RepoFile, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    repo, revision = section.path, str(section.revision)

    def listed(api: Any) -> list[HubFile]:
        options = {"repo_type": "dataset", "revision": revision}
        try:
            found = list(api.list_repo_tree(repo, folder, **options))
        except EntryNotFoundError:
            return []
        return [
            HubFile(
                *(repo, revision, each.path, hf_hub_url(repo, each.path, **options), each.size),
                oid=each.lfs.sha256 if each.lfs else each.blob_id,
            )
            for each in found
            if isinstance(each, RepoFile)
        ]

    return sorted(_asked(section, listed), key=lambda file: file.path)


def _asked(section: DataSection, question: Any) -> Any:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "data.streaming = true needs the Hub, and HF_HUB_OFFLINE is set",
            "Unset it, or leave data.streaming out and use what was downloaded before.",
        )
    where = f"data.path = {section.path!r}"
    try:
        with quiet():
            return question(HfApi(library_name="sdtrain"))
    except HFValidationError:
        raise DataError(f"{where}: no such folder, and no Hub id either") from None
    except RevisionNotFoundError:
        raise DataError(f"{where} has no revision {section.revision!r}") from None
    except Exception as error:
        if status_of(error) is None and not may_pass(error):
            raise
        raise DataError(
            f"{where}: the Hub says: {said(error)}",
            f"Give the id of a data set on the Hub. Is it private? {LOGIN}",
        ) from error
