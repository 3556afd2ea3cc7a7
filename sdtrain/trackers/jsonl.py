"""`metrics.jsonl`: one JSON object a line, the record that everything else is drawn from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdprep.errors import DataError


class JsonlTracker:
    """Appends lines; after a kill the file is cut back to what the checkpoint knows.

    Args:
        path: the file; made if absent.
        samples_seen: the clock of the checkpoint that the run goes on from. Later lines, which
            the run is about to write again, and a torn last line are removed. None: start empty.
    """

    def __init__(self, path: Path, samples_seen: int | None) -> None:
        _cut_back(path, samples_seen)
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line; numbers that JSON cannot hold become null."""
        self._file.write(json.dumps(_plain(line), ensure_ascii=False) + "\n")
        self._file.flush()

    def pictures(self, named: Mapping[str, Sequence[Path]], samples_seen: int) -> None:
        """Nothing: pictures lie in `samples/`."""

    def sync(self) -> None:
        """Make what was written survive a power cut; called before every checkpoint."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file, in order; a torn last line is left out.

    Raises:
        DataError: another line is no JSON object.
    """
    if not path.is_file():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")  # names may hold other line ends
    return [_line(path, at, text) for at, text in enumerate(whole, start=1) if text.strip()]


def last_error(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """What a run died of, by its metrics; None once it has gone on."""
    return str(lines[-1]["message"]) if lines and lines[-1]["kind"] == "error" else None


def has_stopped_early(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the evaluations of a run ended it, by its metrics; no more once it has gone on."""
    verdicts = [line for line in lines[-4:] if line["kind"] == "verdict"]  # pictures come later
    return bool(verdicts) and bool(verdicts[-1].get("stopped_early"))


def _line(path: Path, at: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        problem = str(error)
    else:
        if isinstance(line, dict):
            return line
        problem = "it is no object"
    raise DataError(
        f"{path} is damaged in line {at}: {problem}",
        "Each line is one JSON object; delete that line.",
    )


def _cut_back(path: Path, samples_seen: int | None) -> None:
    lines = read_metrics(path) if samples_seen is not None else []
    kept = [line for line in lines if line["samples_seen"] <= (samples_seen or 0)]
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
