"""Which images make up which optimizer step: the global order, its buckets and micro-batches.

The order is an endless stream of slots, a pure function of (seed, data set, prompt policy). Step k
takes the next `batch_size` of it, for any number of GPUs and any micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from sdprep.buckets import Bucket, nearest_indices
from sdprep.errors import DataError
from sdprep.seeding import rng_for
from sdtrain.ids import Ids
from sdtrain.refusals import Refusals

if TYPE_CHECKING:
    from sdtrain.dataset import Rows

WINDOW = 65_536
"""Rows that are sorted into buckets together; their sizes are enough for it."""

STRIPE = 4_096
"""Rows whose prompts are rendered ahead, so that 12 million rows start and resume at once."""

BLOCK_RUNS = 16
"""Runs' worth of rows of one bucket that stay together, so that few runs of a stripe are short."""

REFUSED_STOP = 0.20
"""A run stops when more than this share of the rows is refused."""


@dataclass(frozen=True)
class Text:
    """A rendered prompt, as the order needs it, and what did not fit into it.

    Args:
        prompt: what the model is given.
        is_dropped: caption dropout made it empty.
        num_chunks: chunks of tokens that it takes.
        num_removed: tags and words that `prompt.max_chunks` left no room for.
        num_cut: tokens that lie beyond `model.max_chunks` and are not read.
    """

    prompt: str
    is_dropped: bool
    num_chunks: int
    num_removed: int = 0
    num_cut: int = 0


@dataclass(frozen=True)
class Slot:
    """One sample of one optimizer step."""

    row: int  # index into the rows of the split
    sample_id: str
    visit: int  # how often the sample was drawn before, its repeats in one epoch counted
    bucket: Bucket
    text: Text
    weight: float = 1.0  # what the sample counts in the loss, beside its noise level


@dataclass(frozen=True)
class Step:
    """One optimizer step: `samples_seen` is the clock before it."""

    samples_seen: int
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Assignment:
    """The bucket of every kept row, and why the others were refused.

    Args:
        buckets: the sizes in use.
        kept: (n,) indices of the kept rows.
        bucket_of: (n,) index into `buckets` of each kept row.
        refused: row index to reason.
    """

    buckets: tuple[Bucket, ...]
    kept: np.ndarray
    bucket_of: np.ndarray
    refused: Refusals

    def reasons(self) -> dict[str, int]:
        """How many rows were refused for what, without the particulars after the colon."""
        return self.refused.reasons()


def assign(rows: Rows, buckets: Sequence[Bucket], max_upscale: float) -> Assignment:
    """Give every row the bucket with the nearest aspect; refuse what would be enlarged too much.

    Args:
        rows: one split; rows refused on opening (they do not decode) stay refused.
        buckets: the sizes there are.
        max_upscale: largest factor from original to resized pixels.
    """
    is_usable = np.ones(len(rows), bool)
    is_usable[list(rows.refused)] = False
    usable = np.flatnonzero(is_usable)
    heights, widths = rows.sizes_hw[usable].T
    chosen = nearest_indices(widths, heights, buckets)
    sides = np.array([bucket.size_hw for bucket in buckets])
    scale = np.maximum(sides[chosen, 0] / heights, sides[chosen, 1] / widths)
    is_kept = scale <= max_upscale
    grown = np.flatnonzero(~is_kept)

    def particulars(index: int) -> str:
        at = grown[index]
        return (
            f"{rows.ids[int(usable[at])]} of {widths[at]}x{heights[at]} px would grow "
            f"{scale[at]:.3f} times to fill {buckets[chosen[at]]}"
        )

    refused = Refusals(rows.refused, "upscale", usable[grown], particulars)
    return Assignment(tuple(buckets), usable[is_kept], chosen[is_kept], refused)


def limited(assignment: Assignment, ids: Ids, limit: int | None, seed: int) -> Assignment:
    """At most `limit` of the kept rows, those of the lowest keyed rank.

    A smaller limit takes some of a larger one's rows, so that sizes of a set can be compared.
    """
    if limit is None or limit >= len(assignment.kept):
        return assignment
    ranks = ids.ranks(seed, "limit")[assignment.kept]
    chosen = np.sort(np.argsort(ranks, kind="stable")[:limit])
    return replace(assignment, kept=assignment.kept[chosen], bucket_of=assignment.bucket_of[chosen])


def require_enough(assignment: Assignment, what: str, total: int) -> None:
    """Stop when nothing is left, or when more than a fifth of the rows is refused.

    Raises:
        DataError: with the counts per reason and examples.
    """
    refused = len(assignment.refused)
    if len(assignment.kept) and refused <= REFUSED_STOP * total:
        return
    if not total:
        raise DataError(f"{what} has no rows", "Is it the right split of the right data set?")
    counts = ", ".join(f"{reason} {count}" for reason, count in assignment.reasons().items())
    examples = "; ".join(assignment.refused.examples(3))
    raise DataError(
        f"{what}: {refused} of {total} rows are refused ({counts}), more than "
        f"{REFUSED_STOP:.0%} stops the run\n  such as {examples}",
        "Lower data.resolution_px, raise data.max_upscale, or mend the images.",
    )


class GlobalOrder:
    """The endless stream of slots.

    Each epoch shuffles all kept rows; one that asks for k repeats is there k times. A window of
    them at a time is cut into stripes, each of blocks of a bucket. A stripe at a time is rendered,
    grouped into runs of one bucket and chunk count, and the runs are shuffled. Every kept row comes
    as often as it asks per epoch; leftovers form shorter runs.

    The visit of a sample, which keys its text, crop and noise, is epoch * k + copy: it counts how
    often the row was drawn before, so no two of its visits are alike.

    Args:
        ids: (n,) sample ids of the whole split.
        assignment: kept rows and buckets.
        render: rows and their visits to the text of each.
        seed: the run's seed.
        run_samples: longest run; a recipe value, never derived from GPUs or micro-batch.
        window: rows sorted into buckets together.
        stripe: rows rendered ahead, about.
        repeats: (n,) how often each row comes in one epoch; None: once.
    """

    def __init__(
        self,
        ids: Sequence[str],
        assignment: Assignment,
        render: Callable[[Sequence[int], Sequence[int]], list[Text]],
        *,
        seed: int,
        run_samples: int,
        window: int = WINDOW,
        stripe: int = STRIPE,
        repeats: np.ndarray | None = None,
    ) -> None:
        assert len(assignment.kept) > 0, "an order needs rows"
        self._ids, self._render, self._seed = Ids.of(ids), render, seed
        self._run_samples, self._window, self._stripe = run_samples, window, stripe
        self._buckets = assignment.buckets
        # Sorted by id, so that the order in which rows are stored changes nothing.
        place = np.full(len(self._ids), -1)
        place[assignment.kept] = np.arange(len(assignment.kept))
        by_id = place[self._ids.order]
        by_id = by_id[by_id >= 0]
        self._rows, self._bucket_of = assignment.kept[by_id], assignment.bucket_of[by_id]
        self._times = np.ones(1, np.int64) if repeats is None else repeats[self._rows]
        self._has_repeats = bool(self._times.max() > 1)
        if self._has_repeats:
            self._rows = np.repeat(self._rows, self._times)
            self._bucket_of = np.repeat(self._bucket_of, self._times)
            starts = np.repeat(np.cumsum(self._times) - self._times, self._times)
            self._copy = np.arange(len(self._rows)) - starts
            self._times = np.repeat(self._times, self._times)

    @property
    def epoch_samples(self) -> int:
        """Samples of one epoch."""
        return len(self._rows)

    def slots(self, samples_seen: int = 0) -> Iterator[Slot]:
        """The stream from a position of the clock on; it never ends."""
        epoch, offset = divmod(samples_seen, len(self._rows))
        while True:
            start = offset // self._window * self._window
            shuffled = rng_for(self._seed, "epoch", epoch).permutation(len(self._rows))
            while start < len(shuffled):
                window = shuffled[start : start + self._window]
                for stripe in self._stripes(window, epoch, start):
                    if offset < start + len(stripe):
                        yield from self._grouped(stripe, epoch, start)[offset - start :]
                        offset = start + len(stripe)
                    start += len(stripe)
            epoch, offset = epoch + 1, 0

    def steps(self, samples_seen: int, total_samples: int, batch_size: int) -> Iterator[Step]:
        """The steps from `samples_seen` to the end; only the last one may be short."""
        stream = self.slots(samples_seen)
        while samples_seen < total_samples:
            size = min(batch_size, total_samples - samples_seen)
            yield Step(samples_seen, tuple(next(stream) for _ in range(size)))
            samples_seen += size

    def _stripes(self, window: np.ndarray, epoch: int, start: int) -> list[np.ndarray]:
        """A window in parts of about `stripe` rows; needs no text.

        Blocks of one bucket, in turn by chance: a stripe then has few buckets, and few short runs.
        """
        buckets = self._bucket_of[window]
        by_bucket = np.argsort(buckets, kind="stable")
        ends = np.flatnonzero(np.diff(buckets[by_bucket])) + 1
        length = min(BLOCK_RUNS * self._run_samples, self._stripe)
        blocks = [
            part[first : first + length]
            for part in np.split(by_bucket, ends)
            for first in range(0, len(part), length)
        ]
        order = rng_for(self._seed, "blocks", epoch, start).permutation(len(blocks))
        sizes = np.array([len(blocks[block]) for block in order])
        number = (np.cumsum(sizes) - sizes) // self._stripe
        cuts = np.flatnonzero(np.diff(number)) + 1
        return [
            window[np.sort(np.concatenate([blocks[block] for block in stripe]))]
            for stripe in np.split(order, cuts)
        ]

    def _grouped(self, window: np.ndarray, epoch: int, start: int) -> list[Slot]:
        rows, visits = self._rows[window], np.full(len(window), epoch)
        if self._has_repeats:
            visits = epoch * self._times[window] + self._copy[window]
        texts = self._render(rows.tolist(), visits.tolist())
        groups: dict[tuple[int, int], list[Slot]] = {}
        for row, id_, visit, bucket, text in zip(
            rows.tolist(),
            self._ids.at(rows),
            visits.tolist(),
            self._bucket_of[window].tolist(),
            texts,
            strict=True,
        ):
            slot = Slot(row, id_, visit, self._buckets[bucket], text)
            groups.setdefault((bucket, text.num_chunks), []).append(slot)
        length = self._run_samples
        runs = [
            group[start : start + length]
            for group in groups.values()
            for start in range(0, len(group), length)
        ]
        order = rng_for(self._seed, "runs", epoch, start).permutation(len(runs))
        return [slot for run in order for slot in runs[run]]


def micro_batches(slots: Sequence[Slot], size: int) -> list[list[int]]:
    """Split one step (or one GPU's share of it) into forwards of one bucket and chunk count.

    Returns:
        positions in `slots`, at most `size` per forward, every position once.
    """
    groups: dict[tuple[Bucket, int], list[int]] = {}
    for position, slot in enumerate(slots):
        groups.setdefault((slot.bucket, slot.text.num_chunks), []).append(position)
    return [
        group[start : start + size]
        for group in groups.values()
        for start in range(0, len(group), size)
    ]
