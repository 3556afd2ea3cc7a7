"""TensorBoard curves, with samples seen on the horizontal axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdprep.errors import MissingExtraError


class TensorBoardTracker:
    """Writes every number of a metrics line as one scalar, such as `validation/mean`.

    Args:
        folder: where the event files go.
        samples_seen: the clock of the checkpoint that the run goes on from; events after it are
            hidden, because the run is about to write them again. None: a fresh run.
    """

    def __init__(self, folder: Path, samples_seen: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtraError(
                "tensorboard", "tensorboard", "the TensorBoard curves"
            ) from None
        purge_step = 0 if samples_seen is None else samples_seen + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def log(self, line: Mapping[str, Any]) -> None:
        """Write one metrics line."""
        line = dict(line)
        kind, samples_seen = line.pop("kind"), line.pop("samples_seen")
        prefix = f"{line.pop('set')}" if "set" in line else kind
        for name, value in _scalars(line, prefix):
            self._writer.add_scalar(name, value, global_step=samples_seen)

    def sync(self) -> None:
        """Flush to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def _scalars(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _scalars(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _scalars(item, f"{name}/{index}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)
