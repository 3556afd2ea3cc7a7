"""TensorBoard curves, with samples seen on the horizontal axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdprep.errors import MissingExtraError
from sdtrain.trackers.curves import curves


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
        for name, value in curves(line).items():
            self._writer.add_scalar(name, value, global_step=line["samples_seen"])

    def pictures(self, named: Mapping[str, Sequence[Path]], samples_seen: int) -> None:
        """Write pictures by prompt."""
        for name, paths in named.items():
            for at, path in enumerate(paths):
                with Image.open(path) as picture:
                    pixels = np.asarray(picture.convert("RGB"))
                tag = f"samples/{name}" if len(paths) == 1 else f"samples/{name}/{at}"
                self._writer.add_image(tag, pixels, samples_seen, dataformats="HWC")

    def sync(self) -> None:
        """Flush to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
