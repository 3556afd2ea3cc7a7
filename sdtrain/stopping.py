"""Ctrl-C, SIGTERM and Ctrl-Break: finish the step, save, and end; asked twice, end at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from sdprep.console import say


class StopRequest:
    """Becomes true when the user or the system asks the run to end; use it in a `with`.

    Args:
        what: is done before it ends.
    """

    def __init__(self, what: str = "finishing the step, then saving") -> None:
        self.is_set = False
        self._what = what
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            names = ("SIGINT", "SIGTERM", "SIGBREAK")  # the last one on Windows: Ctrl-Break
            for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
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
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
        say(f"asked to stop: {self._what} (ask again to stop at once)")
