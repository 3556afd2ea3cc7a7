"""Check everything: format, lint, types, tests. Makes the environment first if there is none.

Usage: python tools/check.py [PYTEST ARGUMENTS]
       python tools/check.py -m "not slow"     # half the time: no test of more than ten seconds
Every step runs, whatever the others say; the exit status is 0 only if all of them passed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _setup

EVERY_TEST = ("-m", "slow or not slow")  # pytest alone leaves the slow ones out
MOST_WORKERS = 8  # each loads torch, about 1 GB


def main() -> int:
    """Run the steps, then say how each went and what pytest said last."""
    if sys.argv[1:2] and sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0
    _setup.enter(__file__)
    workers = str(min(os.cpu_count() or 1, MOST_WORKERS))
    steps = {
        "ruff format": ["ruff", "format", "--check", "."],
        "ruff check": ["ruff", "check", "."],
        "mypy": ["mypy"],
        "pytest": ["pytest", "-n", workers, "--dist", "loadfile", *EVERY_TEST, *sys.argv[1:]],
    }
    results, last_line = [], ""
    for name, command in steps.items():
        print(f"\n=== {name} ===", flush=True)
        start = time.monotonic()
        status, last_line = run([sys.executable, "-m", *command])
        results.append((name, status, time.monotonic() - start))
    print("\n=== summary ===")
    for name, status, seconds in results:
        verdict = "passed" if status == 0 else f"FAILED (exit status {status})"
        print(f"{name:<12} {seconds:7.1f} s  {verdict}")
    print(last_line, flush=True)
    return int(any(status for _, status, _ in results))


def run(command: Sequence[str]) -> tuple[int, str]:
    """Run a command, pass on what it prints as it comes, and keep its last line.

    Returns:
        exit status, last line that is not empty.
    """
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        command,
        cwd=_setup.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    tail = b""
    try:
        source = process.stdout.fileno()
        for block in iter(lambda: os.read(source, 65536), b""):  # dots show as they come
            sys.stdout.buffer.write(block)
            sys.stdout.buffer.flush()
            tail = (tail + block)[-65536:]
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        sys.exit(130)
    lines = [line for line in tail.decode("utf-8", "replace").splitlines() if line.strip()]
    return process.wait(), lines[-1] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
