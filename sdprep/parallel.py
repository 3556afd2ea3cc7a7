"""A few threads side by side, for work that waits."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def each(
    work: Callable[[Item], object],
    items: Sequence[Item],
    num_threads: int,
    done: Callable[[Item], object],
) -> None:
    """Do `work` for each item, a few at a time; after an error those in flight are finished.

    The threads are daemons: Ctrl-C ends the program at once, not after what is in flight.

    Args:
        work: called on some thread.
        items: in the order in which they are begun.
        num_threads: how many at a time.
        done: called on the caller's thread with each item that was done.

    Raises:
        BaseException: the first that `work` raised.
    """
    waiting: queue.SimpleQueue[Item] = queue.SimpleQueue()
    ended: queue.Queue[list[Item]] = queue.Queue()  # empty: a thread has ended
    errors: list[BaseException] = []
    for item in items:
        waiting.put(item)

    def loop() -> None:
        while not errors:
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                break
            try:
                work(item)
            except BaseException as error:
                errors.append(error)
                break
            ended.put([item])
        ended.put([])

    threads = [threading.Thread(target=loop, daemon=True) for _ in items[:num_threads]]
    for thread in threads:
        thread.start()
    running = len(threads)
    while running:
        try:
            finished = ended.get(timeout=0.5)  # a timeout, or Windows hears no Ctrl-C
        except queue.Empty:
            continue
        if not finished:
            running -= 1
        else:
            done(*finished)
    if errors:
        raise errors[0]
