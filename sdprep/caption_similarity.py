"""What scorers say of how well captions fit their pictures, and when such a word is out of date.

A scorer of similarity keeps, for each caption, the cosine of its embedding with the picture's and
a digest of the text: the number holds for that text alone.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    from sdprep.table import PhotoTable

COMPARED = pa.struct(
    {
        "column": pa.string(),  # where the caption stands; `text` for the one beside the image
        "digest": pa.string(),  # of that caption
        "cosine": pa.float32(),
        "is_cut": pa.bool_(),  # longer than the model reads, so only its beginning was compared
    }
)
"""An entry of the field `captions` that a scorer of similarity fills, one a caption."""

OUTLIER_SDS = 3.0
"""Robust standard deviations below the median at which a caption no longer fits its picture."""
LEAST_SD = 0.005
"""Of cosines; captions that are much alike do not make every other one an outlier."""


def caption_digest(text: str) -> str:
    """Short digest of a caption, 16 hex digits."""
    return hashlib.blake2b(text.strip().encode(errors="replace"), digest_size=8).hexdigest()


def similarity_columns(table: PhotoTable) -> list[str]:
    """Columns of scorers that have compared captions with their pictures."""
    return [
        column.name
        for column in table.schema
        if column.name.startswith("score_")
        and pa.types.is_struct(column.type)
        and column.type.get_field_index("captions") >= 0
        and column.type.field("captions").type == pa.list_(COMPARED)
    ]


def cosines_of(
    column: str, text: str, row: Mapping[str, Any], scorers: Sequence[str]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Cosines of one caption by scorer, and the scorers that saw another text, or none, there.

    Args:
        column: where the caption stands.
        text: as it is now.
        row: has `<scorer>.captions`; None: the image is still to do, which is no caption's fault.
        scorers: as `similarity_columns` finds them.
    """
    digest = caption_digest(text)
    cosines, uncompared = {}, []
    for scorer in scorers:
        entries = row[f"{scorer}.captions"]
        same = [e for e in entries or [] if (e["column"], e["digest"]) == (column, digest)]
        if same:
            cosines[scorer] = same[0]["cosine"]
        elif entries is not None:
            uncompared.append(scorer)
    return cosines, tuple(uncompared)


def least_usual(cosines: Sequence[float]) -> float:
    """Cosine below which a caption is an outlier among those of its column.

    The median and the median deviation from it: up to half of the captions may be wrong without
    moving the bound far. One-sided, since no caption fits too well.
    """
    middle = statistics.median(cosines)
    deviation = statistics.median(abs(cosine - middle) for cosine in cosines)
    return middle - OUTLIER_SDS * max(1.4826 * deviation, LEAST_SD)
