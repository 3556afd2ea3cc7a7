"""Tiny models: real diffusers folders with few channels, for trials, tests and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdprep.errors import UserError
from sdprep.plugins import config_for
from sdtrain.outputs import is_taken, written_whole


def write_tiny(family: str, path: Path, seed: int = 0) -> Path:
    """Write a tiny randomly initialised model.

    The weights are a function of the family and the seed alone, so two calls write equal bytes.

    Args:
        family: name of a family plugin.
        path: folder to make; it must be absent or empty.
        seed: keys every weight.

    Returns:
        `path`.

    Raises:
        UserError: no such family, it has no tiny form, or the folder is in use.
    """
    config: Any = config_for("family", family)
    if not hasattr(config, "write_tiny"):
        raise UserError(f"family {family} has no tiny form")
    if is_taken(path):
        raise UserError(f"{path} is there already and not empty", "Give another folder.")
    with written_whole(path) as scratch:
        config.write_tiny(scratch, seed)
    return path
