"""Tags that came with the picture: what its source wrote beside it, with certainty 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa

from sdprep.annotate import PixelNeeds, Sample
from sdprep.recipe import AnnotatorConfig
from sdprep.schema import SCORED_TAG

COLUMNS = pa.schema([pa.field("tags", pa.list_(SCORED_TAG))])


class Config(AnnotatorConfig):
    """Tags that the source of an image brought along; needs no model."""

    type: Literal["sidecar"] = "sidecar"

    def build(self) -> SidecarTagger:
        """Make the tagger."""
        return SidecarTagger()


class SidecarTagger:
    """Fills `tags_sidecar`; an image that came without tags gets an empty list."""

    columns = COLUMNS
    pixels = PixelNeeds(pixels=False)
    fingerprint = '{"name": "sidecar", "version": 1}'
    batch_size = 1024
    is_thread_safe = True

    def annotate(self, batch: Sequence[Sample]) -> pa.RecordBatch:
        """Copy the names as they were written; normalising is for the composition of tags."""
        rows = [{"tags": _tags(sample.row)} for sample in batch]
        return pa.RecordBatch.from_pylist(rows, schema=COLUMNS)


def _tags(row: dict[str, Any]) -> list[dict[str, Any]]:
    found = (row.get("text") or {}).get("tags") or []
    return [{"name": tag["name"], "p": 1.0, "category": tag["category"]} for tag in found]
