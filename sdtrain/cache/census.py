"""What a run would find in its caches: for `sdtrain check`, which encodes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdprep.console import megabytes
from sdtrain.cache.fill import kept_rows, wanted_slots, wanted_texts
from sdtrain.cache.keys import text_key

if TYPE_CHECKING:
    from sdtrain.setup import Setup

VISITS = 4
"""Visits whose prompts are looked for."""

ROWS = 1_000
"""Rows whose crops and prompts are looked for; of larger sets, the first ones."""


def census(setup: Setup) -> dict[str, Any] | None:
    """Hits and bytes of each cache; None if the recipe keeps nothing."""
    caches = setup.caches
    if not caches.section.is_wanted:
        return None
    looked_at = range(min(ROWS, len(kept_rows(setup))))
    found: dict[str, Any] = {
        "path": str(caches.folder),
        "rows": len(looked_at),
        "of": len(kept_rows(setup)),
        "latents": None,
        "text": None,
        "why_no_text": caches.why_no_text,
    }
    if caches.latents is not None:
        keys = list({key for _, key in wanted_slots(setup, looked_at)})
        found["latents"] = _hits(caches.latents.store, keys)
    if caches.text is not None:
        kind = caches.text.kind
        keys = [text_key(kind, text) for text in wanted_texts(setup, looked_at, VISITS)]
        found["text"] = _hits(caches.text.store, keys)
    return found


def lines(found: Mapping[str, Any] | None) -> list[str]:
    """The same as text."""
    if found is None:
        return ["nothing is kept of latents or text; see [cache]"]
    text = [f"{found['path']}; looked for {found['rows']:,} of {found['of']:,} rows"]
    for name in ("latents", "text"):
        if found[name] is not None:
            hits = found[name]
            text.append(
                f"{name}: {hits['found']:,} of {hits['wanted']:,} are there; "
                f"{hits['entries']:,} entries in all take {megabytes(hits['bytes'])}"
            )
    return [*text, *([f"no text: {found['why_no_text']}"] if found["why_no_text"] else [])]


def _hits(store: Any, keys: list[bytes]) -> dict[str, int]:
    there = sum(store.contains(keys)) if keys else 0
    return {
        "wanted": len(keys),
        "found": there,
        "entries": len(store),
        "bytes": store.num_bytes,
    }
