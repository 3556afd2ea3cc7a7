"""Calls of an OpenAI-compatible chat server: waits, tries again, and keeps the key to itself."""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from sdprep.errors import UserError
from sdprep.seeding import uniform

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_FOR_ALL = frozenset({401, 403, 404, 405})  # what concerns every image, not this one
_MOST_BYTES = 8_000_000
_LONGEST_WAIT_S = 120.0
_LOCAL = ("127.0.0.1", "localhost", "::1")


class CallFailed(Exception):
    """One request that failed for good; the message holds no key."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(frozen=True)
class ChatEndpoint:
    """A server, and how patient we are with it."""

    base_url: str  # up to and without `/chat/completions`
    key_env: str | None  # name of the environment variable that holds the key
    timeout_s: float
    retries: int
    backoff_s: float  # before the first retry; doubled for each further one
    _opener: urllib.request.OpenerDirector = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        handlers: list[Any] = [_NoRedirect()]
        if urlsplit(self.base_url).hostname in _LOCAL:
            handlers.append(urllib.request.ProxyHandler({}))
        object.__setattr__(self, "_opener", urllib.request.build_opener(*handlers))

    def key(self) -> str | None:
        """The key, from the environment.

        Raises:
            UserError: the variable is not set.
        """
        if self.key_env is None:
            return None
        value = os.environ.get(self.key_env, "").strip()
        if not value:
            raise UserError(
                f"the environment variable {self.key_env} is not set",
                "It holds the API key; a server of your own needs none (leave api_key_env out).",
            )
        return value

    def chat(self, body: Mapping[str, Any], subject: str) -> dict[str, Any]:
        """The server's answer to one request, as JSON.

        Args:
            body: what is posted to `/chat/completions`.
            subject: id of the image; it keys the jitter of the waits.

        Raises:
            CallFailed: this request fails however often it is sent.
            UserError: the server refuses every request, or cannot be reached at all.
        """
        data = json.dumps(body).encode("utf-8")
        for attempt in range(self.retries + 1):
            try:
                return self._post(data)
            except _TryAgain as error:
                if attempt == self.retries:
                    if error.is_unreachable:
                        raise UserError(
                            f"cannot reach {self.base_url}: {error}",
                            "Is the server running, and is base_url right (often it ends in /v1)?",
                        ) from None
                    raise CallFailed(f"{error} ({attempt + 1} times)") from None
                time.sleep(self._wait_s(attempt, error.retry_after_s, subject))
        raise AssertionError("the last attempt returns or raises")

    def _wait_s(self, attempt: int, asked_s: float | None, subject: str) -> float:
        jitter = 0.5 + uniform("backoff", subject, attempt)
        own = min(self.backoff_s * 2**attempt, _LONGEST_WAIT_S / 2) * jitter
        return min(max(own, asked_s or 0.0), _LONGEST_WAIT_S)

    def _post(self, data: bytes) -> dict[str, Any]:
        key = self.key()
        headers = {"Content-Type": "application/json", "User-Agent": "sdprep"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, data, headers, method="POST")
        deadline = time.monotonic() + self.timeout_s
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                return _json(_read(response, deadline))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, key) from None
        except TimeoutError:
            raise _TryAgain(f"no answer within {self.timeout_s:g} s") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _TryAgain(f"no answer within {self.timeout_s:g} s") from None
            lost = isinstance(error.reason, ConnectionRefusedError | socket.gaierror)
            raise _TryAgain(_hidden(str(error.reason), key), is_unreachable=lost) from None
        except OSError as error:  # reset, or closed in the middle
            raise _TryAgain(_hidden(f"{type(error).__name__}: {error}", key)) from None
        except Exception as error:
            if type(error).__module__ != "http.client":
                raise
            raise _TryAgain(f"broken answer ({type(error).__name__})") from None

    def _refused(self, error: urllib.error.HTTPError, key: str | None) -> Exception:
        """What an HTTP status means: try again, give up on this image, or on all."""
        try:
            said = error.read(2000).decode("utf-8", "replace")
        except OSError:
            said = ""
        text = _hidden(f"HTTP {error.code} {error.reason}: {_message(said)}", key)
        if error.code in _AGAIN:
            return _TryAgain(text, retry_after_s=_retry_after(error.headers.get("Retry-After")))
        if error.code in _FOR_ALL or 300 <= error.code < 400:
            hint = "Check base_url, model and the key"
            named = f" in {self.key_env}" if self.key_env else " (api_key_env names its variable)"
            return UserError(f"{self.base_url} refuses: {text}", hint + named + ".")
        return CallFailed(text)


class _TryAgain(Exception):
    """A failure that may pass."""

    def __init__(
        self, message: str, retry_after_s: float | None = None, is_unreachable: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.is_unreachable = is_unreachable


def _read(response: Any, deadline: float) -> bytes:
    """The whole body; a server that trickles bytes does not hold us beyond the deadline."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(65_536):
        parts.append(part)
        size += len(part)
        if size > _MOST_BYTES:
            raise CallFailed(f"the answer is larger than {_MOST_BYTES:,} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(parts)


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        raise _TryAgain(f"the answer is no JSON: {data[:80]!r}") from None
    if not isinstance(value, dict):
        raise _TryAgain(f"the answer is a JSON {type(value).__name__}, expected an object")
    return value


def _message(said: str) -> str:
    """The words of an error body."""
    try:
        error = json.loads(said)["error"]
        said = error if isinstance(error, str) else str(error["message"])
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(said.split())[:300] or "no explanation"


def _hidden(text: str, key: str | None) -> str:
    """A text without the key, which some servers repeat."""
    return text.replace(key, "***") if key else text


def _retry_after(value: str | None) -> float | None:
    """Seconds that a server asks to wait; it may name a time instead."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
