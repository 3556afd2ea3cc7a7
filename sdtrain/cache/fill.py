"""`sdtrain cache`: encode ahead what a run will ask for; stop it and run it again to go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from sdprep.console import progress
from sdprep.errors import UserError
from sdtrain.buckets import Slot, Step, Text
from sdtrain.cache.encoding import Encoder
from sdtrain.cache.keys import latents_key, text_key
from sdtrain.cache.reading import Kept
from sdtrain.cache.store import EntryStore
from sdtrain.dataset import renderer
from sdtrain.loader import MicroBatch, load
from sdtrain.prior import PREFIX, PriorOrder

if TYPE_CHECKING:
    from sdtrain.buckets import Assignment
    from sdtrain.setup import Setup

WINDOW_ROWS = 4_096
"""Rows that are looked at before the first of them is encoded."""

_NO_TEXT = Text("", is_dropped=False, num_chunks=1)


def fill(setup: Setup) -> dict[str, Any]:
    """Encode every crop and every prompt of a run that the caches lack.

    Returns:
        the folder, and for each cache what was wanted, found, missing and encoded, and its size.

    Raises:
        UserError: the recipe keeps nothing.
    """
    caches = require_caches(setup)
    encoder = setup.encoder
    done: dict[str, Any] = {"path": str(caches.folder), "latents": None, "text": None}
    try:
        if caches.latents is not None:
            done["latents"] = _fill_latents(setup, caches.latents, encoder)
        if caches.text is not None:
            done["text"] = _fill_text(setup, caches.text, encoder)
    finally:
        encoder.flush()
    for name, kept in (("latents", caches.latents), ("text", caches.text)):
        if kept is not None:
            kept.store.tidy()
            done[name] |= {"entries": len(kept.store), "bytes": kept.store.num_bytes}
    return {**done, "why_no_text": caches.why_no_text}


def require_caches(setup: Setup) -> Any:
    """The caches of a recipe that keeps something.

    Raises:
        UserError: it keeps nothing.
    """
    caches = setup.caches
    if caches.latents is None and caches.text is None:
        why = f": {caches.why_no_text}" if caches.why_no_text else ""
        raise UserError(
            f"this recipe caches nothing{why}",
            "Set cache.latents = true (and data.cached_crops = 4, say), or cache.text = true.",
        )
    return caches


def kept_rows(setup: Setup) -> np.ndarray:
    """Rows of `setup.rows` that the run draws: those of training, then those of a prior."""
    if setup.prior is None:
        return setup.train.kept
    behind = len(setup.data.train) + setup.prior.assignment.kept
    return np.concatenate([setup.train.kept, behind])


def wanted_slots(setup: Setup, rows: Sequence[int]) -> Iterator[tuple[Slot, bytes]]:
    """Every different crop that the run takes of some kept rows, and its key.

    Args:
        setup: its recipe keeps latents.
        rows: positions in `kept_rows`.
    """
    data, crops = setup.rows, setup.recipe.data.crops
    kept = setup.caches.latents
    assert kept is not None
    for members, assignment, first, prefix in _members(setup, rows):
        visits = _visits(setup, members, of_prior=bool(prefix))
        for at, num_visits in zip(members, visits, strict=True):
            row = first + int(assignment.kept[at])
            bucket = assignment.buckets[assignment.bucket_of[at]]
            height, width = data.sizes_hw[row].tolist()
            source, sample_id = data.source_digest(row), prefix + data.ids[row]
            for visit, crop in crops.different(
                (height, width), bucket, setup.recipe.seed, sample_id, num_visits
            ):
                key = latents_key(kept.kind, source, bucket, crop)
                yield Slot(row, sample_id, visit, bucket, _NO_TEXT), key


def wanted_texts(setup: Setup, rows: Sequence[int], most_visits: int | None = None) -> list[str]:
    """Every different prompt that the run renders for some kept rows, and the empty one.

    Args:
        setup: the run.
        rows: positions in `kept_rows`.
        most_visits: look no further than this; None: to the end of the run.
    """
    texts = {"": None}
    for members, assignment, _, prefix in _members(setup, rows):
        prior = setup.prior if prefix else None
        source, data = (
            (setup.data.train, setup.data) if prior is None else (prior.texts, prior.data)
        )
        render = renderer(source, data.policy, setup.recipe.seed, lambda prompt: 1)
        kept = [int(assignment.kept[at]) for at in members]
        visits = dict(zip(kept, _visits(setup, members, of_prior=bool(prefix)), strict=True))
        most = max(visits.values(), default=0)
        for visit in range(most if most_visits is None else min(most, most_visits)):
            drawn = [row for row in kept if visit < visits[row]]
            texts |= dict.fromkeys(text.prompt for text in render(drawn, [visit] * len(drawn)))
    return list(texts)


def _members(setup: Setup, rows: Sequence[int]) -> Iterator[tuple[list[int], Assignment, int, str]]:
    """Positions in an assignment, it, its first row in `setup.rows`, and how its ids begin."""
    own = len(setup.train.kept)
    yield [at for at in rows if at < own], setup.train, 0, ""
    if setup.prior is not None:
        of_prior = [at - own for at in rows if at >= own]
        yield of_prior, setup.prior.assignment, len(setup.data.train), PREFIX


def _visits(setup: Setup, members: Sequence[int], *, of_prior: bool) -> list[int]:
    """How often the run draws some images at most; repeats in one epoch are counted."""
    order, total = setup.order, setup.total_samples
    rows, kept = setup.data.train, setup.train.kept
    if isinstance(order, PriorOrder):
        assert setup.prior is not None
        of_it = order.num_prior(total)
        order, total = (order.prior, of_it) if of_prior else (order.train, total - of_it)
        if of_prior:
            rows, kept = setup.prior.data.train, setup.prior.assignment.kept
    epochs = -(-total // order.epoch_samples)
    return [epochs * int(rows.repeats[kept[at]]) for at in members]


def windows(setup: Setup) -> Iterator[range]:
    """All kept rows, some at a time."""
    total = len(kept_rows(setup))
    for start in range(0, total, WINDOW_ROWS):
        yield range(start, min(start + WINDOW_ROWS, total))


def _fill_latents(setup: Setup, kept: Kept, encoder: Encoder) -> dict[str, Any]:
    counts = {"wanted": 0, "found": 0, "missing": 0, "encoded": 0}
    with progress("encoding pictures", len(kept_rows(setup))) as bar:
        for window in windows(setup):
            slots = {key: slot for slot, key in wanted_slots(setup, window)}
            missing = _missing(kept.store, list(slots))
            _count(counts, len(slots), len(missing))
            _encode(setup, [slots[key] for key in missing], encoder, counts)
            bar.advance(len(window))
    return counts


def _encode(setup: Setup, slots: Sequence[Slot], encoder: Encoder, counts: dict[str, int]) -> None:
    """The very way that training takes, so that the numbers are the same."""
    data = setup.recipe.data
    size = max(data.micro_batch_size, setup.recipe.cache.vae_batch)
    by_bucket = sorted(slots, key=lambda slot: slot.bucket.size_hw)
    micro = []
    for _, group in groupby(by_bucket, key=lambda slot: slot.bucket.size_hw):
        members = list(group)
        for start in range(0, len(members), size):
            part = tuple(members[start : start + size])
            positions = tuple(range(len(part)))
            micro.append(MicroBatch(Step(0, part), positions, (0.5,) * len(part), True))
    if not micro:
        return
    reader = setup.reader(stored=True)
    for _, batch in load(reader, micro, data.workers if len(micro) > 1 else 0):
        encoder.fill_latents(batch.to(setup.device))
        counts["encoded"] += len(batch)


def _fill_text(setup: Setup, kept: Kept, encoder: Encoder) -> dict[str, Any]:
    counts = {"wanted": 0, "found": 0, "missing": 0, "encoded": 0}
    with progress("encoding prompts", None, "prompts") as bar:
        seen: set[bytes] = set()
        for window in windows(setup):
            texts = {text_key(kept.kind, text): text for text in wanted_texts(setup, window)}
            texts = {key: text for key, text in texts.items() if key not in seen}
            seen |= texts.keys()
            missing = _missing(kept.store, list(texts))
            _count(counts, len(texts), len(missing))
            bar.total(counts["missing"])
            for key in missing:
                encoder.fill_text(key, texts[key])
                counts["encoded"] += 1
                bar.advance()
    return counts


def _missing(store: EntryStore, keys: Sequence[bytes]) -> list[bytes]:
    there = store.contains(keys)
    return [key for key, is_there in zip(keys, there, strict=True) if not is_there]


def _count(counts: dict[str, int], wanted: int, missing: int) -> None:
    counts["wanted"] += wanted
    counts["missing"] += missing
    counts["found"] += wanted - missing
