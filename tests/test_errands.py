"""Threads that wait for answers: in order, with errors, and never in the way of the end."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from sdtrain.errands import AT_ONCE, submit, together

HANGS = """
import time
from sdtrain.errands import AT_ONCE, submit
for _ in range(3 * AT_ONCE):
    submit(time.sleep, 3600)
print("done")
"""


def test_errands_run_at_the_same_time_and_come_back_in_order() -> None:
    meet = threading.Barrier(AT_ONCE, timeout=120)  # breaks unless all are under way

    def square(number: int) -> int:
        meet.wait()
        return number * number

    wanted = range(2 * AT_ONCE)
    assert list(together(square, wanted)) == [number * number for number in wanted]


def test_an_error_reaches_who_asked() -> None:
    def fail(number: int) -> int:
        raise ValueError(f"no {number}")

    failing = [submit(fail, number) for number in range(2 * AT_ONCE)]
    for number, future in enumerate(failing):
        with pytest.raises(ValueError, match=f"no {number}"):
            future.result()
    assert submit(abs, -3).result() == 3  # the threads are still there


def test_a_program_ends_without_waiting_for_its_errands() -> None:
    command = [sys.executable, "-c", HANGS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.returncode) == ("done\n", 0)
