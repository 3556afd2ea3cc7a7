"""Say which pictures come next, so that those from far away are on their way together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def expect(rows: Any, wanted: Sequence[int]) -> None:
    """Announce some rows whose `image` is asked next; where pictures lie at hand, do nothing.

    Args:
        rows: `Rows`, perhaps with a method `expect`.
        wanted: row numbers.
    """
    announce = getattr(rows, "expect", None)
    if announce is not None and len(wanted):
        announce(wanted)
