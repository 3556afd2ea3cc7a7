"""Threads that wait for answers from far away, and that nobody has to wait for at the end.

The executor of the standard library finishes all its work before a program may end; with a network
that is down, and every errand trying again for minutes, Ctrl-C would seem to do nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import cache
from queue import SimpleQueue
from typing import Any, TypeVar

Asked = TypeVar("Asked")
Result = TypeVar("Result")

AT_ONCE = 16
"""Errands of one process that are under way at the same time."""

_Errand = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


def submit(work: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """Begin an errand, which must not wait for another one."""
    future: Future[Result] = Future()
    _queue().put((future, work, arguments))
    return future


def together(work: Callable[[Asked], Result], asked: Iterable[Asked]) -> Iterator[Result]:
    """The results of many errands, in order."""
    for future in [submit(work, each) for each in asked]:
        yield future.result()


@cache
def _queue() -> SimpleQueue[_Errand]:
    queue: SimpleQueue[_Errand] = SimpleQueue()
    for number in range(AT_ONCE):
        threading.Thread(target=_work, args=(queue,), name=f"errand-{number}", daemon=True).start()
    return queue


def _work(queue: SimpleQueue[_Errand]) -> None:
    while True:
        future, work, arguments = queue.get()
        try:
            future.set_result(work(*arguments))
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)
        del future, work, arguments  # else an idle thread would hold a page
