"""What must be the same for a checkpoint to be continued, and what may differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdprep.console import warn
from sdprep.errors import UserError

DATA = "data_fingerprint"
FREE_KEYS = (
    *("output", "model.path", "data.path", "data.workers", "data.micro_batch_size", "checkpoint"),
    *("data.revision", "data.streaming", "data.stream_keep_gb"),
    *("precision.device", "precision.deterministic", "ema.device"),
    *("ema.hand_over", "validation.stop"),
    *("cache.latents", "cache.text", "cache.path"),
    *("sampling", "tracking", "distributed"),
)
"""Recipe keys that may change freely: they do not touch the result. Data set and model are compared
by their fingerprints, so what was moved is still the same."""


def changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key path to (saved, current) of everything that differs and matters for the result.

    Args:
        saved: `{"recipe": …, "data": …, …}` of a checkpoint.
        current: the same of the run that is about to start.
    """
    before, now = _flat(saved), _flat(current)
    keys = sorted({*before, *now})
    differing = {key: (before.get(key), now.get(key)) for key in keys}
    return {key: pair for key, pair in differing.items() if pair[0] != pair[1]}


def refuse_changes(
    path: Path,
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    accepted: Sequence[str],
    about_data: str = "",
) -> list[str]:
    """Compare a checkpoint with what is about to run.

    Args:
        path: the checkpoint.
        saved: the conditions that it was made under.
        current: those of the run.
        accepted: keys that may differ.
        about_data: what is said where the data differ.

    Returns:
        the accepted differences, one sentence each.

    Raises:
        UserError: something differs that `accepted` does not name; lists all of it.
    """
    found = changes(saved, current)
    free = {key for key in found if _covered(key, FREE_KEYS)}
    taken = {key for key in found if _covered(key, accepted)}
    for key in accepted:
        if not any(_covered(changed, [key]) for changed in found):
            warn(f"--accept-change {key}: nothing of that name has changed")
    refused = [key for key in found if key not in free | taken]
    if refused:
        lines = [f"  {key}: {found[key][0]!r} -> {found[key][1]!r}" for key in refused]
        flags = " ".join(f"--accept-change {key}" for key in refused)
        raise UserError(
            f"{path} was made under other conditions:\n" + "\n".join(lines),
            f"{about_data if DATA in refused else ''}"
            f"Change them back, use another output, or accept: {flags}",
        )
    return [f"{key}: {found[key][0]!r} -> {found[key][1]!r}" for key in sorted(taken)]


def _covered(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat
