"""What the user sees: talk and progress on stderr, data on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

talk = Console(stderr=True, highlight=False)
out = Console(highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """Print one line of talk (rich markup allowed) on stderr."""
    talk.print(message, soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning on stderr; the text is shown as it is."""
    talk.print(f"[yellow]warning[/yellow] {escape(message)}", soft_wrap=True)


def megabytes(num_bytes: int) -> str:
    """A size for people, such as `12.3 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout, and nothing else."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


class Progress:
    """Counts work done; `advance` may be called from the thread that owns the loop only."""

    def __init__(self, bar: Any = None, task: Any = None) -> None:
        self._bar = bar
        self._task = task
        self.done = 0

    def advance(self, count: int = 1) -> None:
        """Say that `count` more units are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, advance=count)

    def total(self, count: int) -> None:
        """Correct the total, when it becomes known late."""
        if self._bar is not None:
            self._bar.update(self._task, total=count)


@contextmanager
def progress(description: str, total: int | None, unit: str = "images") -> Iterator[Progress]:
    """A bar with count, rate and time left on stderr; nothing at all when that is no terminal."""
    if not talk.is_terminal:
        yield Progress()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.1f} {unit}/s" if speed else "", style="progress.data.speed")

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=talk) as bar:
        yield Progress(bar, bar.add_task(description, total=total))


def command_line() -> str:
    """What the user typed, for the history."""
    import shlex
    from pathlib import Path

    program = Path(sys.argv[0])
    is_module = program.stem in ("__main__", "cli")  # python -m sdprep
    return shlex.join([program.parent.name if is_module else program.stem, *sys.argv[1:]])


def run_app(app: Any) -> None:
    """Run a Typer app: what the user can fix is one message and exit status 2."""
    from sdprep.errors import UserError

    try:
        app()
    except UserError as error:
        talk.print(f"[red]error[/red] {escape(error.message)}", soft_wrap=True)
        if error.hint:
            talk.print(f"  {escape(error.hint)}", soft_wrap=True)
        sys.exit(error.exit_code)
