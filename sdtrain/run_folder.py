"""The folder of one run: who may write it, what was asked, and what it ran on."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdprep.errors import DataError, UserError
from sdprep.lock import WriterLock
from sdtrain.outputs import require_folder, write_text_whole
from sdtrain.recipe import TrainRecipe
from sdtrain.toml_text import toml_text

PACKAGES = (
    *("sdprep-sdtrain", "torch", "diffusers", "transformers", "datasets", "accelerate", "peft"),
    *("safetensors", "tokenizers", "numpy", "pillow", "pyarrow", "pylance"),
)


LOCK = ".run.lock"  # whatever the folder is called: it may be reached by several names


class RunFolder:
    """Names of what a run leaves behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.toml"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.validation = path / "validation"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.tensorboard = path / "tensorboard"
        self.model = path / "model"  # what was trained, in the format that others read

    def require_ours(self) -> None:
        """Refuse to write into a folder that holds something else.

        Raises:
            UserError: it is there, is not empty, and no run wrote it; or nothing may be written.
        """
        if not self.recipe.is_file() and _visible(self.path):
            raise UserError(
                f"output = {str(self.path)!r} exists and is no run folder",
                "Give the run a folder of its own.",
            )
        require_folder(self.path, "output =")

    def require_free(self) -> None:
        """The same, and refuse a folder that is being written, before minutes of opening a model.

        Raises:
            UserError: as `writing`.
        """
        self.require_ours()
        if (self.path / LOCK).exists():
            with self.writing():
                pass

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The right to write here; only one process has it.

        Raises:
            UserError: another process trains in it, or it holds something else.
        """
        self.require_ours()
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(self._lock().hold())
            except DataError as error:
                what = error.message.removeprefix(f"{Path(LOCK).stem} ")  # what the lock calls it
                raise UserError(f"run folder {self.path} {what}", error.hint) from None
            yield

    def _lock(self) -> WriterLock:
        return WriterLock(self.path / LOCK)

    @property
    def is_claimed(self) -> bool:
        """Whether a process writes here, or was killed at it; asked without touching the lock."""
        return self._lock().note.is_file()

    def describe(self, recipe: TrainRecipe, facts: dict[str, Any]) -> None:
        """Write the resolved recipe and the environment."""
        write_text_whole(self.recipe, toml_text(recipe.resolved()))
        text = json.dumps({**environment(), **facts}, indent=1, ensure_ascii=False)
        write_text_whole(self.environment, text + "\n")


def environment() -> dict[str, Any]:
    """Versions of what computes."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Versions of the packages that a result depends on."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _visible(path: Path) -> list[str]:
    if not path.exists():
        return []
    if not path.is_dir():
        return [path.name]
    return [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]
