"""Notice that pictures have no text before a whole run has learnt to ignore prompts."""

from __future__ import annotations

import numpy as np

from sdprep.prompts import render_prompt
from sdtrain.dataset import TrainingData

LOOKED_AT = 256
"""Pictures whose text is read for it, evenly spread."""

TOLD_FROM = 0.1
"""Share without text that is worth a warning."""


def wordless(data: TrainingData, kept: np.ndarray) -> str | None:
    """A warning if many training pictures have neither caption nor tags; None if not.

    Args:
        data: the set.
        kept: rows that train.
    """
    places = np.unique(np.linspace(0, len(kept) - 1, min(len(kept), LOOKED_AT)).astype(np.int64))
    policy = data.policy.model_copy(update={"dropout_p": 0.0})
    records = data.train.records(kept[places].tolist())
    count = sum(not render_prompt(record, policy, 0, 0).text for record in records)
    if count <= TOLD_FROM * len(records):
        return None
    which = f"all {count:,}" if count == len(records) else f"{count:,} of {len(records):,}"
    return (
        f"{which} training pictures that were looked at have no text, so their prompts are empty. "
        "Texts beside pictures are read by sdprep ingest; sdprep tag and sdprep caption write them."
    )
