"""`--num-processes N`: start N connected processes of one command on this machine, and mind them.

The processes get the same variables that torchrun sets. Signals go to this one, which passes them
on; when one process fails the others are ended, and when this one dies they end by themselves.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from sdprep.console import warn
from sdprep.errors import UserError
from sdtrain.stopping import stop_signals

PARENT_PIPE = "SDTRAIN_ENDS_WITH_STDIN"
GRACE_SECONDS = 15.0
POLL_SECONDS = 0.05
LAUNCHER_KEYS = ("WORLD_SIZE", "RANK", "LOCAL_RANK")


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run `sdtrain` with `arguments` in several processes; returns the exit status of all.

    Raises:
        UserError: another launcher started this process already.
    """
    taken = [name for name in LAUNCHER_KEYS if os.environ.get(name)]
    if taken:
        raise UserError(
            f"--num-processes {num_processes}, but a launcher has started this process already "
            f"({', '.join(f'{name}={os.environ[name]}' for name in taken)})",
            "Leave out --num-processes, or the launcher.",
        )
    port = _free_port()
    workers = [_start(arguments, rank, num_processes, port) for rank in range(num_processes)]
    handlers = _forward_signals(workers)
    try:
        return _wait(workers)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
            if worker.stdin is not None:
                worker.stdin.close()


def require_one_process(command: str, instead: str) -> None:
    """Refuse several processes of a command that is one program, whose copies would collide.

    Args:
        command: its name.
        instead: what to do.

    Raises:
        UserError: a launcher such as torchrun started this process as one of several.
    """
    size = os.environ.get("WORLD_SIZE", "")
    if os.environ.get("RANK") and size not in ("", "1"):
        raise UserError(
            f"sdtrain {command} is one process, and a launcher has started {size} of them", instead
        )


def _start(arguments: Sequence[str], rank: int, size: int, port: int) -> subprocess.Popen[bytes]:
    threads = str(max(1, (os.cpu_count() or 1) // size))
    env: Mapping[str, str] = {
        "OMP_NUM_THREADS": threads,
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # else those who lose the failing one print C++ stacks
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        PARENT_PIPE: "1",
    }
    # A group of its own: the terminal's Ctrl-C reaches this process only, which passes it on once.
    windows = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    return subprocess.Popen(
        [sys.executable, "-m", "sdtrain.cli", *arguments],
        env=env,
        stdin=subprocess.PIPE,
        start_new_session=os.name != "nt",
        creationflags=windows,
    )


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def _forward_signals(workers: Sequence[subprocess.Popen[bytes]]) -> dict[int, Any]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                # Windows: the one signal that another process group can be sent.
                worker.send_signal(getattr(signal, "CTRL_BREAK_EVENT", number))

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for each in stop_signals():
            before[each] = signal.signal(each, pass_on)
    return before


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    failed_at: float | None = None
    first: int | None = None
    while any(worker.poll() is None for worker in workers):
        bad = [rank for rank, worker in enumerate(workers) if worker.poll()]
        if bad and failed_at is None:
            first, failed_at = bad[0], time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()  # stuck in a collective with one that is gone
        time.sleep(POLL_SECONDS)
    codes = [worker.returncode for worker in workers]
    if first is not None and codes[first] < 0:
        warn(
            f"process {first} of {len(workers)} was ended by signal {-codes[first]}"
            + (" (often: the machine ran out of memory)" if codes[first] == -9 else "")
        )
    if 2 in codes:
        return 2
    return next((1 for code in codes if code), 0)


def end_with_parent() -> None:
    """In a process that `launch` started: end at once when the starting one is gone."""
    if not os.environ.get(PARENT_PIPE):
        return

    def watch() -> None:
        with open(0, "rb", buffering=0, closefd=False) as pipe:
            pipe.read()
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
