"""The one loop that runs annotators over rows that are still NULL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image


@dataclass(frozen=True)
class PixelNeeds:
    """What an annotator wants of the decode that all annotators of a run share."""

    pixels: bool = True  # False: it reads columns only, `Sample.image` is None
    alpha: bool = False  # `Sample.alpha` is the upright alpha channel where the file has one
    data: bool = False  # `Sample.data` holds the original bytes


@dataclass(frozen=True)
class Sample:
    """One image as annotators see it."""

    id: str
    row: dict[str, Any]  # the core columns of schema.CORE but `image`, plus `Annotator.inputs`
    image: Image.Image | None = None  # upright sRGB, mode RGB, stored resolution
    alpha: Image.Image | None = None  # upright, mode L; None where the image is opaque
    data: bytes | None = None


class Annotator(Protocol):
    """One model or rule that fills one struct column."""

    columns: pa.Schema  # fields of the struct, without `error`, which the loop adds
    pixels: PixelNeeds
    fingerprint: str  # name, version, options, model revision or weights hash
    batch_size: int

    def annotate(self, batch: Sequence[Sample]) -> pa.RecordBatch:
        """One row per sample, in their order, with `columns` as schema.

        An exception fails the batch; the loop then tries its samples one by one, and stores the
        message in the `error` of those that fail alone.
        """
        ...
