"""Loss masks: inside the boxes of chosen labels a training picture counts less, or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sdprep.buckets import Bucket, fit
from sdprep.errors import DataError
from sdprep.masks import boxes_to_mask, corners, coverage
from sdtrain.pixels import Crop

if TYPE_CHECKING:
    from sdtrain.dataset import Rows
    from sdtrain.family import Loss

ALL_LABELS = "*"

_ROWS_AT_ONCE = 8_192


@dataclass(frozen=True)
class LossMasks:
    """Which boxes are masked, and what is left of the loss inside them.

    Args:
        labels: of the boxes that are masked; `ALL_LABELS` stands for every label.
        weight: of what lies inside a box, 0..1; outside it is 1.
        normalise: whether the loss of a sample is its mean over what counts. Otherwise it is
            divided by all latents, so that masked pictures train more weakly.
    """

    labels: tuple[str, ...]
    weight: float
    normalise: bool = True

    def takes(self, label: str | None) -> bool:
        """Whether boxes of this label are masked."""
        return label in self.labels or ALL_LABELS in self.labels

    def weights(
        self, rows: Rows, row: int, bucket: Bucket, crop: Crop, grid_hw: tuple[int, int]
    ) -> Tensor:
        """How much each latent of one training view counts.

        A latent that a box covers in part counts in part, by area.

        Args:
            rows: the split.
            row: one of it.
            bucket: the size that the picture was scaled to cover.
            crop: what was cut out and whether it was mirrored.
            grid_hw: latents down and across.

        Returns:
            (1, *grid_hw) float32 in 0..1.

        Raises:
            DataError: a box is none; names the row.
        """
        height, width = (int(side) for side in rows.sizes_hw[row])
        boxes = corners([box for box in rows.boxes([row])[0] if self.takes(box["label"])])
        try:
            uncovered = boxes_to_mask(
                boxes, fit(width, height, bucket).resized_hw, crop.top_left, bucket.size_hw, grid_hw
            )
        except DataError as error:
            raise _of_row(rows, row, error) from None
        if crop.is_flipped:  # the picture is mirrored after it was cropped
            uncovered = uncovered[:, ::-1]
        weights = uncovered + self.weight * (1 - uncovered)
        return torch.from_numpy(np.ascontiguousarray(weights, np.float32))[None]


@dataclass(frozen=True)
class BoxCensus:
    """The boxes of the training rows that are kept.

    Args:
        rows_by_label: how many rows have a box of each label there is.
        rows_masked: how many have one that is masked.
        fingerprint: digest of all boxes that are masked, whatever the order of the rows.
    """

    rows_by_label: dict[str, int]
    rows_masked: int
    fingerprint: str


def take_census(masks: LossMasks, rows: Rows, kept: Sequence[int]) -> BoxCensus:
    """Look at all boxes before anything is trained.

    Raises:
        DataError: a label occurs nowhere, or a masked box is none.
    """
    by_label: Counter[str] = Counter()
    lines: list[bytes] = []
    for start in range(0, len(kept), _ROWS_AT_ONCE):
        span = [int(row) for row in kept[start : start + _ROWS_AT_ONCE]]
        for row, boxes in zip(span, rows.boxes(span), strict=True):
            by_label.update({str(box["label"]) for box in boxes})
            masked = [box for box in boxes if masks.takes(box["label"])]
            if masked:
                lines.append(_line(rows, row, masked))
    _require_labels(masks, by_label)
    digest = blake2b(b"".join(sorted(lines)), digest_size=16).hexdigest()
    return BoxCensus(dict(sorted(by_label.items())), len(lines), digest)


def mean_per_sample(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of each sample over everything but the batch, as the mask weighs it.

    Args:
        values: (B, …) float32.
        mask: what each value counts, ≥ 0, and expands to the shape of `values`; None: all alike.

    Returns:
        (B,): Σ mask · values / Σ mask; 0, without a gradient, where the mask is 0 everywhere.
    """
    if mask is None:
        return values.flatten(1).mean(1)
    weights = mask.expand_as(values).flatten(1)
    total = weights.sum(1)
    return (weights * values.flatten(1)).sum(1) / torch.where(total > 0, total, 1.0)


def over_all_latents(loss: Loss) -> Loss:
    """The same loss as Σ mask · values / number of values, which is what sd-scripts does."""

    def weaker(
        prediction: Tensor,
        target: Tensor,
        *,
        u: Tensor,
        logsnr: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B,) float32."""
        values = loss(prediction, target, u=u, logsnr=logsnr, mask=mask)
        return values if mask is None else values * mask.flatten(1).mean(1)

    return weaker


def _line(rows: Rows, row: int, boxes: Sequence[Mapping[str, Any]]) -> bytes:
    places = corners(boxes)
    try:
        coverage(places)  # refuses what is no box
    except DataError as error:
        raise _of_row(rows, row, error) from None
    text = json.dumps([rows.ids[row], places.tolist()])
    return blake2b(text.encode(), digest_size=16).digest()


def _of_row(rows: Rows, row: int, error: DataError) -> DataError:
    return DataError(f"image {rows.ids[row]} (row {row}): {error.message}", error.hint)


def _require_labels(masks: LossMasks, by_label: Mapping[str, int]) -> None:
    found = ", ".join(f"{label!r} ({count:,} rows)" for label, count in sorted(by_label.items()))
    nowhere = [label for label in masks.labels if label != ALL_LABELS and label not in by_label]
    if nowhere or not by_label:
        asked = ", ".join(repr(label) for label in nowhere or masks.labels)
        raise DataError(
            f"mask.boxes asks for {asked}, but no training row that is kept has such a box; "
            f"the labels are: {found or 'none'}",
            "Name labels that there are, publish with a detector's boxes, or leave mask.boxes out.",
        )
