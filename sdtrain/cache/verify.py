"""`sdtrain cache verify`: are the bytes what was written, and would the same be written today."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sdprep.console import progress
from sdprep.seeding import integer
from sdtrain.cache.entries import Entry, layout_of
from sdtrain.cache.fill import kept_rows, require_caches, wanted_slots, wanted_texts
from sdtrain.cache.keys import text_key
from sdtrain.cache.store import EntryStore

if TYPE_CHECKING:
    from sdtrain.buckets import Slot
    from sdtrain.setup import Setup

MOST_DIFFERENCE = 0.02
"""Relative, root mean square. Another device or TF32 moves a latent by up to 0.001 (measured), and
half precision an encoded prompt by 0.005; another picture moves it by about 1."""

SAMPLE = 16

_TEXT_ROWS = 64


def verify(setup: Setup, *, sample: int = SAMPLE, repair: bool = False) -> dict[str, Any]:
    """Check every checksum, and encode a keyed sample of the recipe's entries again.

    Args:
        setup: its recipe keeps something.
        sample: entries of each cache that are encoded again, of those that are there.
        repair: drop the bad ones, so that they are encoded when they are next asked for.

    Returns:
        for each cache: entries, how many were encoded again, the largest relative difference, and
        the bad ones with the reason.

    Raises:
        UserError: the recipe keeps nothing.
    """
    caches = require_caches(setup)
    done: dict[str, Any] = {"path": str(caches.folder), "latents": None, "text": None}
    for name, kept, encode_again in (
        ("latents", caches.latents, _latents_again),
        ("text", caches.text, _text_again),
    ):
        if kept is None:
            continue
        count, bad = _check_all(name, kept.store)
        known = {entry.key for entry, _ in bad}
        again = encode_again(setup, sample, known)
        bad += [(entry, why) for entry, why, _ in again if why]
        done[name] = {
            "entries": count,
            "bad": [{"label": entry.label, "key": entry.key.hex(), "why": w} for entry, w in bad],
            "encoded_again": len(again),
            "most_difference": max((difference for *_, difference in again), default=None),
        }
        if repair and bad:
            kept.store.drop(entry.key for entry, _ in bad)
    return done


def _check_all(name: str, store: EntryStore) -> tuple[int, list[tuple[Entry, str]]]:
    bad: list[tuple[Entry, str]] = []
    with progress(f"checking {name}", len(store), "entries") as bar:
        for entry in store.scan():
            if not entry.is_sound:
                bad.append((entry, "its checksum differs"))
            bar.advance()
    return bar.done, bad


Again = list[tuple[Entry, str, float]]
"""Entry, what is wrong with it or nothing, and its relative difference."""


def _latents_again(setup: Setup, sample: int, known: set[bytes]) -> Again:
    kept = setup.caches.latents
    assert kept is not None
    ids = setup.rows.ids.at(kept_rows(setup))
    ranked = sorted(range(len(ids)), key=lambda at: integer("cache verify", ids[at]))
    reader, encoder = setup.reader(), setup.encoder

    def encode(slot: Slot) -> Mapping[str, Tensor]:
        batch = reader.batch([slot], [0.5])
        return encoder.posterior(batch.pixels.to(setup.device))[0]

    pairs = (
        (key, partial(encode, slot)) for at in ranked for slot, key in wanted_slots(setup, [at])
    )
    return _again(kept.store, pairs, sample, known)


def _text_again(setup: Setup, sample: int, known: set[bytes]) -> Again:
    kept, encoder = setup.caches.text, setup.encoder
    assert kept is not None
    count = min(len(kept_rows(setup)), _TEXT_ROWS + sample)
    texts = sorted(wanted_texts(setup, range(count)), key=lambda t: integer("cache verify", t))

    def encode(prompt: str) -> Mapping[str, Tensor]:
        return encoder.prompts([prompt])[0]

    pairs = ((text_key(kept.kind, text), partial(encode, text)) for text in texts)
    return _again(kept.store, pairs, sample, known)


def _again(
    store: EntryStore,
    pairs: Iterable[tuple[bytes, Callable[[], Mapping[str, Tensor]]]],
    sample: int,
    known: set[bytes],
) -> Again:
    """Encode the first `sample` that are there and sound once more, and compare."""
    found: Again = []
    for key, encode in pairs:
        if len(found) == sample:
            break
        entry = None if key in known else store.get([key]).get(0)
        if entry is not None:
            found.append((entry, *_compared(entry, encode())))
    return found


def _compared(entry: Entry, made: Mapping[str, Tensor]) -> tuple[str, float]:
    expected = layout_of({name: tuple(tensor.shape) for name, tensor in made.items()})
    if entry.layout != expected:
        return f"it holds {entry.layout}, {expected} is expected", 1.0
    difference = max(_relative(old, made[name]) for name, old in entry.tensors().items())
    # Not `difference > MOST`: what is no number is not fine either.
    fine = difference <= MOST_DIFFERENCE
    return "" if fine else f"encoded again it differs by {difference:.1%}", difference


def _relative(old: Tensor, new: Tensor) -> float:
    """Norm of the difference over that of `new`; a family may make zeros of the empty prompt."""
    expected = new.cpu().float()
    size, change = float(expected.norm()), float((old.float() - expected).norm())
    if size == 0:
        return 0.0 if change == 0 else float("inf")
    return change / size
