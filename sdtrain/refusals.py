"""Why rows are not trained on: of millions of them, the words are made when they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import numpy as np


class Refusals(Mapping[int, str]):
    """Row to reason; a reason is a word, a colon and the particulars.

    Args:
        plain: rows that were refused one by one.
        reason: the word that stands for all of `rows`.
        rows: (n,) further rows, refused for that reason.
        particulars: what stands behind the colon for the i-th of `rows`.
    """

    def __init__(
        self,
        plain: Mapping[int, str],
        reason: str,
        rows: np.ndarray,
        particulars: Callable[[int], str],
    ) -> None:
        self._plain, self._reason, self._rows = dict(plain), reason, rows
        self._particulars = particulars

    def __len__(self) -> int:
        return len(self._plain) + len(self._rows)

    def __iter__(self) -> Iterator[int]:
        yield from self._plain
        yield from self._rows.tolist()

    def __getitem__(self, row: int) -> str:
        if row in self._plain:
            return self._plain[row]
        at = int(np.searchsorted(self._rows, row))
        if at == len(self._rows) or self._rows[at] != row:
            raise KeyError(row)
        return f"{self._reason}: {self._particulars(at)}"

    def reasons(self) -> dict[str, int]:
        """How many rows were refused for what, without the particulars."""
        counts = Counter(text.split(":")[0] for text in self._plain.values())
        counts[self._reason] += len(self._rows)
        return {reason: count for reason, count in sorted(counts.items()) if count}

    def examples(self, count: int) -> list[str]:
        """The first few in full."""
        return [self[row] for row in islice(self, count)]
