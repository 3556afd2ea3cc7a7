"""Digests of a data set: whether it is the one that a checkpoint was trained on, and what moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sdprep.seeding import digest
from sdtrain.wording import amount

if TYPE_CHECKING:
    from sdtrain.dataset import Rows


@dataclass(frozen=True)
class SplitDigest:
    """One split, whatever its order on disk.

    Args:
        num_rows: None where the data set has no such split.
        parts: digests of ids, sizes and texts, and which rows are refused.
    """

    num_rows: int | None
    parts: tuple[object, ...]

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that it can be said later which split changed."""
        return {"rows": self.num_rows or 0, "digest": digest("split", *self.parts)}


def of_split(rows: Rows | None) -> SplitDigest:
    """Digest of the ids, sizes and texts of a split.

    Edited pictures show in the ids, which are digests of the files.
    """
    if rows is None:
        return SplitDigest(None, ("none",))
    refused = sorted(rows.ids.at(np.array(sorted(rows.refused), np.int64)))
    parts = (len(rows), *rows.digest_sum().tolist(), len(refused), *refused)
    return SplitDigest(len(rows), parts)


def fingerprint(*splits: SplitDigest) -> str:
    """One digest of all splits."""
    return digest("data", *(part for split in splits for part in split.parts))


def what_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which splits of a data set differ from those of a checkpoint, in a sentence.

    Args:
        before: of the checkpoint, by the name of the split; empty in old ones.
        now: of the data set as it is.
    """
    told = [
        f"{name} {_how(before[name], now[name])}"
        for name in now
        if name in before and before[name] != now[name]
    ]
    return f"The data set has changed: {', '.join(told)}. " if told else ""


def _how(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    was, has = before["rows"], now["rows"]
    if was != has:
        return f"has {amount(has, 'row')} and had {was:,}"
    return f"still has {amount(has, 'row')}, some with other pictures, texts or refusals"
