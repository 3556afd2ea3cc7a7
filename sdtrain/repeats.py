"""How often a row is trained in one epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sdprep.errors import DataError

MOST = 10_000
"""More than that is a mistake: an epoch would be one picture."""


def whole_repeats(
    table: pa.Table, ids: Sequence[str], where: str, first: int | None = None
) -> np.ndarray:
    """The column `repeats` as whole numbers of at least 1; missing ones are 1.

    Args:
        table: rows, with such a column or without.
        ids: their ids, for the message.
        where: file or table, for the message.
        first: number of the first of these rows in it, for the message; None: not known.

    Returns:
        (rows,) int64.

    Raises:
        DataError: a row asks for a part of a time, none at all, or more than `MOST`.
    """
    if "repeats" not in table.column_names:
        return np.ones(table.num_rows, np.int64)
    column = table["repeats"]
    if pa.types.is_integer(column.type) and not column.null_count:
        values = column.to_numpy().astype(np.int64)
        if not len(values) or (values.min() >= 1 and values.max() <= MOST):
            return values
    checked = [
        _whole(value, id_, where if first is None else f"{where}, row {first + at}")
        for at, (value, id_) in enumerate(zip(column.to_pylist(), ids, strict=True))
    ]
    return np.array(checked, np.int64)


def _whole(value: Any, id_: str, where: str) -> int:
    if value is None:
        return 1
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and value == value and value in range(1, MOST + 1):
        return int(value)
    raise DataError(
        f"{where}: image {id_} has repeats = {value!r}",
        f"A row is trained a whole number of times per epoch, from 1 to {MOST:,}.",
    )
