"""Names and numbers of a metrics line, the same in every service."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

NO_CURVES = ("evidence", "how", "best", "num_skipped")


def curves(line: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a line by name, such as `validation/change_percent`.

    Both ends of an interval are curves (`…/low`, `…/high`). What is no finite number is left out,
    as is what fits no curve, such as the evidence of a verdict.
    """
    line = dict(line)
    kind = line.pop("kind")
    line.pop("samples_seen")
    prefix = str(line.pop("set", kind))
    return dict(_scalars(line, prefix))


def _scalars(value: Any, name: str) -> Iterator[tuple[str, float]]:
    last = name.rsplit("/", 1)[-1]
    if last in NO_CURVES:
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _scalars(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        is_interval = last.startswith("ci95") and len(value) == 2
        keys = ("low", "high") if is_interval else tuple(str(k) for k in range(len(value)))
        for key, item in zip(keys, value, strict=True):
            yield from _scalars(item, f"{name}/{key}")
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield name, float(value)


def bins(line: Mapping[str, Any]) -> tuple[list[float], list[float]] | None:
    """Loss by noise level as a histogram: heights and edges; None where a line has none."""
    entries = line.get("bins")
    if not entries or any(entry["loss"] is None for entry in entries):
        return None
    return [e["loss"] for e in entries], [entries[0]["from"], *(e["to"] for e in entries)]
