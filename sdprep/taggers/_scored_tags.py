"""From probabilities to the list that a tagger stores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field

from sdprep.annotate import Sample
from sdprep.schema import SCORED_TAG

COLUMNS = pa.schema([pa.field("tags", pa.list_(SCORED_TAG))])

StoreAbove = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="Least probability that is stored (0 to 1); [tags.thresholds] apply later.",
    ),
]


def tagged(
    batch: Sequence[Sample],
    probabilities: Callable[[Sequence[Image.Image]], Iterable[np.ndarray]],
    tags: Sequence[tuple[str, str | None]],
    store_above: float,
) -> pa.RecordBatch:
    """What a tagger stores of a batch: `scored_tags` of each picture."""
    images = [sample.image for sample in batch if sample.image is not None]
    rows = [{"tags": scored_tags(found, tags, store_above)} for found in probabilities(images)]
    return pa.RecordBatch.from_pylist(rows, schema=COLUMNS)


def scored_tags(
    probabilities: np.ndarray,
    tags: Sequence[tuple[str, str | None]],
    store_above: float,
) -> list[dict[str, Any]]:
    """The tags at or above `store_above`, the most probable first; of ratings the best at least.

    Args:
        probabilities: (N,) float32.
        tags: (name, category) of each.

    Raises:
        ValueError: a probability is not finite.
    """
    if not np.isfinite(probabilities).all():
        raise ValueError("the model gave values that are not finite")
    is_stored = probabilities >= np.float32(store_above)
    ratings = [index for index, (_, category) in enumerate(tags) if category == "rating"]
    if ratings:
        is_stored[max(ratings, key=lambda index: probabilities[index])] = True
    order = np.argsort(-probabilities, kind="stable")
    return [
        {"name": tags[index][0], "p": float(probabilities[index]), "category": tags[index][1]}
        for index in order
        if is_stored[index]
    ]
