"""Who may write where on the Hub, and what its errors mean for the user."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from sdprep.console import warn
from sdprep.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Result = TypeVar("Result")

WAITS_S = (1.0, 3.0, 10.0, 30.0, 60.0)
"""Seconds before each try again, after those of the library itself."""
SILENCE_S = 300.0
"""Seconds in which nothing moves on a connection, after which it counts as lost."""
LOGIN = (
    "Log in with `hf auth login`, or set HF_TOKEN; tokens: https://huggingface.co/settings/tokens"
)
MAY_PASS = (408, 409, 412, 429, 500, 502, 503, 504)
"""Answers after which a new try may succeed; 409, 412: another commit came between."""

_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")


def repo_name(name: str) -> str:
    """The name itself, if the Hub would take it as `USER/NAME`.

    Raises:
        ValueError: it would not.
    """
    parts = name.split("/")
    is_plain = not ("--" in name or ".." in name or name.endswith(".git"))
    if not is_plain or len(parts) != 2 or not all(map(_PART.fullmatch, parts)):
        raise ValueError(
            "must be USER/NAME as on the Hub: two names of letters, digits, '-', '_' and '.', "
            "neither with '-' or '.' at an end, nor with '--' or '..'"
        )
    return name


def open_hub(repo: str) -> HfApi:
    """The Hub's API, once it is known that the account may write to `repo`.

    Raises:
        UserError: bad name, offline mode, no token, a token that is not valid or reads only,
            another user's name, or no answer.
    """
    try:
        repo_name(repo)
    except ValueError as error:
        raise UserError(f"publish.push = {repo!r}: {error}") from None
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "cannot push: HF_HUB_OFFLINE is set", "Unset it to send anything to the Hub."
        )
    if not get_token():
        raise UserError(f"cannot push to {repo}: you are not logged in to the Hub", LOGIN)
    api = HfApi(library_name="sdprep")
    limit_silence()
    with quiet():
        try:
            account = patiently(api.whoami, repo)
        except UserError as error:
            if status_of(error) != 404:
                raise
            warn(f"{api.endpoint} does not say whose token this is; trying all the same")
            return api
    _check_account(account, repo)
    return api


def _check_account(account: dict[str, Any], repo: str) -> None:
    """Refuse what is certain to fail; what a fine-grained token may do, only the Hub knows."""
    user, owner = account.get("name"), repo.split("/")[0]
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise UserError(f"cannot push to {repo}: the token of {user} may only read", LOGIN)
    groups = {group.get("name"): group for group in account.get("orgs") or []}
    names = [str(name).lower() for name in (user, *groups)]
    if role == "write" and owner.lower() not in names:
        known = ", ".join(str(name) for name in (user, *groups))
        raise UserError(
            f"cannot push to {repo}: {user} does not belong to {owner}",
            f"With this token you can push to: {known}.",
        )


def limit_silence() -> None:
    """Give up on a connection that is dead but not closed; the library would wait for ever."""
    from huggingface_hub import get_session

    get_session().timeout = SILENCE_S


def patiently(work: Callable[[], Result], repo: str, done: Callable[[], int] = int) -> Result:
    """Do `work`, and do it again after what may pass, `WAITS_S` times in a row at most.

    Args:
        work: does only what is left to do.
        repo: for messages.
        done: how much is done in all; when it has grown, the waits start anew.

    Raises:
        UserError: the Hub refused, or did not answer to the end.
    """
    failures, before = 0, done()
    while True:
        try:
            return work()
        except UserError:
            raise
        except Exception as error:
            told = in_words(error, repo)
            if told is error:
                raise
            failures, before = (1 if done() > before else failures + 1), done()
            if not may_pass(error) or failures > len(WAITS_S):
                raise told from error
            wait = WAITS_S[failures - 1]
            warn(f"{told.args[0]}; trying again in {wait:g} s")
            time.sleep(wait)


def status_of(error: BaseException) -> int | None:
    """HTTP status of an error, or of what caused it."""
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def may_pass(error: BaseException) -> bool:
    """Whether trying again may help: no connection, or an answer in `MAY_PASS`."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = status_of(error)
    if status is not None:
        return status in MAY_PASS
    causes = _causes(error)
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return False
    return any(
        isinstance(cause, (ConnectionError, TimeoutError)) or _module(cause) in _NETWORK
        for cause in causes
    )


_NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "hf_xet")


def _module(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__
    return found


def in_words(error: BaseException, repo: str) -> BaseException:
    """The error as the user should read it; what is no trouble with the Hub stays as it is."""
    status = status_of(error)
    if status is None and not may_pass(error):
        return error
    words = said(error)
    if status == 401:
        return UserError("the Hub does not accept the token: it is wrong, or has expired", LOGIN)
    if status == 403:
        return UserError(
            f"the Hub does not let you write to {repo}: {words}",
            "Needed: a token with write access to that name, and room in its storage.",
        )
    if status is not None and status not in MAY_PASS:
        return UserError(f"the Hub refused {repo} ({status}): {words}")
    return UserError(
        f"no luck with the Hub while working on {repo}: {words}",
        "What has arrived stays there. Run the same command again: only the rest is sent.",
    )


def said(error: BaseException) -> str:
    """One line of what went wrong, without the token and without signed addresses."""
    from huggingface_hub import get_token

    causes = _causes(error)
    answers = [getattr(cause, "server_message", None) for cause in causes]
    text = next(filter(None, answers), None) or str(causes[-1]) or type(causes[-1]).__name__
    token = get_token()
    text = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", " ".join(text.split()))
    return (text.replace(token, "<token>") if token else text)[:300]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's own bars and retries off the screen; ours are shown instead."""
    from huggingface_hub import logging
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    level, no_bars = logging.get_verbosity(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not no_bars:
            enable_progress_bars()
