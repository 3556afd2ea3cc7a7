"""Processes that load ahead end with the program that started them, and by nothing before."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from sdtrain.loader import load


class Startling:
    """Asks the process that reads it to stop, as a cluster or Ctrl-C would."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return signal.raise_signal, (self.number,)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to hold back")
def test_a_signal_to_a_process_that_is_only_beginning_is_left_to_the_parent() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    startling = [Startling(signal.SIGTERM), Startling(signal.SIGINT)]
    pictures: Any = [*startling, "one", "two"]
    assert list(load(pictures, [2, 3], workers=1)) == ["one", "two"]  # type: ignore[list-item]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
