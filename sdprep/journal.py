"""Human work beside the table: one fsynced line per action, and undo is a line too.

Editing never conflicts with a running annotator, and re-tagging never touches what a person said.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdprep.console import warn
from sdprep.errors import DataError


class Journal:
    """An append-only list of actions, such as `{"action": "add_tag", "id": …, "tag": "cat"}`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, action: dict[str, Any]) -> int:
        """Write one action down, durably, and return its number.

        Raises:
            DataError: the action has no `action`, or undoes a line that does not exist.
        """
        if not isinstance(action.get("action"), str):
            raise DataError(f"a journal line needs an action, got {action}")
        number = len(self._lines())
        if action["action"] == "undo" and not 0 <= action.get("line", -1) < number:
            raise DataError(f"{self.path} has no line {action.get('line')} to undo")
        entry = {"n": number, "time": datetime.now(UTC).isoformat(timespec="seconds"), **action}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if file.tell() and not self._ends_with_newline():
                file.write(b"\n")  # a power cut tore the last line: keep it apart from ours
            file.write(json.dumps(entry, ensure_ascii=False).encode("utf-8") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return number

    def undo(self, line: int) -> int:
        """Take one action back, by its number; undoing an undo brings the action back."""
        return self.append({"action": "undo", "line": line})

    def fold(self) -> list[dict[str, Any]]:
        """The actions in force, in the order they were taken; undone ones and undos left out."""
        entries = self._lines()
        undone: set[int] = set()
        for entry in reversed(entries):  # an undo that is itself undone has no effect
            if entry.get("action") == "undo" and entry["n"] not in undone:
                undone.add(entry["line"])
        live = [entry for entry in entries if entry["n"] not in undone]
        return [entry for entry in live if entry.get("action") not in ("undo", "torn")]

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        entries = []
        for number, line in enumerate(self.path.read_bytes().splitlines()):
            try:
                entry = json.loads(line)
            except ValueError:
                warn(f"{self.path} line {number + 1} is torn and left out: {line[:60]!r}")
                entry = {"action": "torn"}
            entry["n"] = number
            entries.append(entry)
        return entries
