"""Two splits as one, for the last training of a model on everything there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sdtrain.ids import Ids

if TYPE_CHECKING:
    from PIL import Image

    from sdtrain.dataset import Rows

T = TypeVar("T")


class JoinedRows:
    """The rows of one split, then those of another. See `Rows`.

    Args:
        first: rows 0 to n - 1.
        second: the rest; no id is in both.
    """

    def __init__(self, first: Rows, second: Rows) -> None:
        self._first, self._second, self._count = first, second, len(first)
        moved = {self._count + row: reason for row, reason in second.refused.items()}
        self.refused: dict[int, str] = {**first.refused, **moved}

    def __len__(self) -> int:
        return self._count + len(self._second)

    @cached_property
    def ids(self) -> Ids:
        """(n,) sample ids."""
        return Ids.joined(self._first.ids, self._second.ids)

    @cached_property
    def sizes_hw(self) -> np.ndarray:
        """(n, 2) upright height and width, px."""
        return np.concatenate([self._first.sizes_hw, self._second.sizes_hw])

    @cached_property
    def repeats(self) -> np.ndarray:
        """(n,) how often each row is trained in one epoch."""
        return np.concatenate([self._first.repeats, self._second.repeats])

    def digest_sum(self) -> np.ndarray:
        """Of both: sums of digests of rows add up."""
        return self._first.digest_sum() + self._second.digest_sum()

    def records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """What `render_prompt` needs to know of some rows."""
        return self._ask(rows, lambda split, own: split.records(own))

    def boxes(self, rows: Sequence[int]) -> list[list[dict[str, Any]]]:
        """`schema.BOX` of some rows."""
        return self._ask(rows, lambda split, own: split.boxes(own))

    def sources(self, rows: Sequence[int]) -> list[str | None]:
        """Where some rows came from."""
        return self._ask(rows, lambda split, own: split.sources(own))

    def image(self, row: int) -> Image.Image:
        """The upright RGB picture of one row."""
        if row < self._count:
            return self._first.image(row)
        return self._second.image(row - self._count)

    def source_digest(self, row: int) -> str:
        """Digest of the file of one row as it is stored now."""
        if row < self._count:
            return self._first.source_digest(row)
        return self._second.source_digest(row - self._count)

    def _ask(self, rows: Sequence[int], of: Callable[[Rows, Sequence[int]], list[T]]) -> list[T]:
        """Ask each split for its own rows; answers come in the order of `rows`."""
        in_first = [int(row) for row in rows if row < self._count]
        in_second = [int(row) - self._count for row in rows if row >= self._count]
        first, second = iter(of(self._first, in_first)), iter(of(self._second, in_second))
        return [next(first if row < self._count else second) for row in rows]
