"""Two splits as one, for the last training of a model on everything there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sdtrain.ahead import expect
from sdtrain.ids import Ids

if TYPE_CHECKING:
    from PIL import Image

    from sdtrain.dataset import Rows

T = TypeVar("T")


class JoinedRows:
    """The rows of one split, then those of another. See `Rows`.

    Attributes:
        num_first: rows of the first split.

    Args:
        first: rows 0 to n - 1.
        second: the rest; no id is in both.
    """

    def __init__(self, first: Rows, second: Rows) -> None:
        self._first, self._second, self.num_first = first, second, len(first)
        moved = {self.num_first + row: reason for row, reason in second.refused.items()}
        self.refused: dict[int, str] = {**first.refused, **moved}

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process: not the arrays, which it can join again."""
        return {k: v for k, v in vars(self).items() if k not in ("ids", "sizes_hw", "repeats")}

    def __len__(self) -> int:
        return self.num_first + len(self._second)

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

    def expect(self, rows: Sequence[int]) -> None:
        """Ask each split for its own."""
        expect(self._first, [row for row in rows if row < self.num_first])
        expect(self._second, [row - self.num_first for row in rows if row >= self.num_first])

    def image(self, row: int) -> Image.Image:
        """The upright RGB picture of one row."""
        if row < self.num_first:
            return self._first.image(row)
        return self._second.image(row - self.num_first)

    def source_digest(self, row: int) -> str:
        """Digest of the file of one row as it is stored now."""
        if row < self.num_first:
            return self._first.source_digest(row)
        return self._second.source_digest(row - self.num_first)

    def _ask(self, rows: Sequence[int], of: Callable[[Rows, Sequence[int]], list[T]]) -> list[T]:
        """Ask each split for its own rows; answers come in the order of `rows`."""
        in_first = [int(row) for row in rows if row < self.num_first]
        in_second = [int(row) - self.num_first for row in rows if row >= self.num_first]
        first, second = iter(of(self._first, in_first)), iter(of(self._second, in_second))
        return [next(first if row < self.num_first else second) for row in rows]
