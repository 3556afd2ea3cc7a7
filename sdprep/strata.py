"""Strata of the split: source x bucket x score band, so that both sides hold the same mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from sdprep.buckets import bucket_list, nearest_indices
from sdprep.table import PhotoTable

Part = Literal["source", "bucket", "score"]
PARTS: tuple[Part, ...] = ("source", "bucket", "score")
SCORES = ("score_preference", "score_aesthetic", "score_technical")
"""The first that is there gives the bands; all scores run from 0 to 9."""
BAND_EDGES = (3.5, 6.5)
BANDS = ("low", "middle", "high", "unscored")
SEPARATOR = " | "


@dataclass(frozen=True)
class StratumColumns:
    """What strata are made of, read once.

    Args:
        parts: in the order of the names.
        resolution_px: budget of the buckets.
        score: column with a field `score`, or None.
    """

    parts: tuple[Part, ...]
    resolution_px: int
    score: str | None

    @classmethod
    def of(cls, table: PhotoTable, parts: Sequence[Part], resolution_px: int) -> StratumColumns:
        """Choose the score column that the table has."""
        scores = [name for name in SCORES if table.has(name) and _has_score(table, name)]
        score = scores[0] if scores and "score" in parts else None
        wanted = tuple(part for part in parts if part != "score" or score)
        return cls(wanted, resolution_px, score)

    @property
    def columns(self) -> list[str]:
        """What to read from the table."""
        needs = {
            "source": ["sources"],
            "bucket": ["width", "height"],
            "score": [f"{self.score}.score"],
        }
        return [name for part in self.parts for name in needs[part]]

    def names(self, rows: pa.Table) -> list[str]:
        """One name per row, such as `photos | 832x1216 | high`; `all` without any part."""
        makers = {"source": self._sources, "bucket": self._buckets, "score": self._bands}
        columns = [makers[part](rows) for part in self.parts]
        if not columns:
            return ["all"] * rows.num_rows
        return [SEPARATOR.join(parts) for parts in zip(*columns, strict=True)]

    def _sources(self, rows: pa.Table) -> list[str]:
        return first_sources(rows["sources"])

    def _buckets(self, rows: pa.Table) -> list[str]:
        widths, heights = (_numbers(rows[name]) for name in ("width", "height"))
        has_size = (widths >= 1) & (heights >= 1)  # NaN compares false
        buckets = bucket_list(self.resolution_px)
        names = np.array([*map(str, buckets), "unknown"], object)
        which = np.full(rows.num_rows, len(buckets))
        which[has_size] = nearest_indices(
            widths[has_size].astype(np.int64), heights[has_size].astype(np.int64), buckets
        )
        return names[which].tolist()

    def _bands(self, rows: pa.Table) -> list[str]:
        scores = _numbers(rows[f"{self.score}.score"])
        which = np.searchsorted(BAND_EDGES, scores, side="right")
        which[np.isnan(scores)] = len(BAND_EDGES) + 1
        return np.array(BANDS, object)[which].tolist()


def first_sources(column: pa.ChunkedArray) -> list[str]:
    """Name of the source where each image was found first; `unknown` if there is none."""
    names: list[str] = []
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy()
        filled = np.asarray(chunk.is_valid()) & (offsets[1:] > offsets[:-1])
        inner = chunk.values.field("source").to_numpy(zero_copy_only=False)
        first = np.full(len(chunk), None, object)
        first[filled] = inner[offsets[:-1][filled]]
        names += [name or "unknown" for name in first]
    return names


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """float64; NULL becomes NaN."""
    return column.cast(pa.float64()).to_numpy().astype(np.float64)


def _has_score(table: PhotoTable, column: str) -> bool:
    type_ = table.schema.field(column).type
    return pa.types.is_struct(type_) and type_.get_field_index("score") >= 0
