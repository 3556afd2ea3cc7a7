"""Ctrl-C, SIGTERM and Ctrl-Break: finish the step, save, and end; asked twice, end at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from sdprep.console import say

SAME_REQUEST_S = 10.0
"""A second SIGTERM so soon is the first one on another way: clusters send it to every process of a
job, and launchers pass on what they got."""


def stop_signals() -> list[int]:
    """What asks a program to end; Ctrl-Break is on Windows alone."""
    names = ("SIGINT", "SIGTERM", "SIGBREAK")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


class StopRequest:
    """Becomes true when the user or the system asks the run to end; use it in a `with`.

    Args:
        what: is done before it ends.
    """

    def __init__(self, what: str = "finishing the step, then saving") -> None:
        self.is_set = False
        self._what = what
        self._before: dict[int, Any] = {}
        self._asked_at = 0.0

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in stop_signals():
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.is_set:
            if number == signal.SIGTERM and now - self._asked_at < SAME_REQUEST_S:
                return
            raise KeyboardInterrupt
        self.is_set, self._asked_at = True, now
        say(f"asked to stop: {self._what} (ask again to stop at once)")
