"""Load micro-batches, in this process or ahead in others; the result is the same.

Everything random about a sample is keyed by (seed, sample id, visit), so it does not matter which
worker loads it, or when.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdprep.errors import DataError, UserError
from sdprep.seeding import uniform
from sdtrain.ahead import expect
from sdtrain.batch import Batch, MicroConditioning
from sdtrain.buckets import Slot, Step, micro_batches
from sdtrain.noise import independent_u, stratified_u
from sdtrain.noise_options import PLAIN, NoiseSection
from sdtrain.pixels import Crop, CropRule, conditioning_of, crop_view
from sdtrain.stopping import stop_signals
from sdtrain.world import ALONE, World

if TYPE_CHECKING:
    from sdtrain.cache.reading import StoredReader
    from sdtrain.dataset import Rows
    from sdtrain.family import Family
    from sdtrain.loss_masks import LossMasks


@dataclass(frozen=True)
class MicroBatch:
    """What one forward of a step is made of.

    Args:
        step: the whole optimizer step.
        positions: which of its slots this forward takes.
        u: (len(positions),) their noise levels.
        is_last: nothing more follows in this step.
        is_padding: it counts nothing, and only keeps this process in step with the others.
    """

    step: Step
    positions: tuple[int, ...]
    u: tuple[float, ...]
    is_last: bool
    is_padding: bool = False

    @property
    def slots(self) -> list[Slot]:
        """The slots of this forward."""
        return [self.step.slots[position] for position in self.positions]


@dataclass(frozen=True)
class Failure:
    """A user's error on its way out of a worker, which would otherwise become a traceback."""

    message: str
    hint: str


class BatchReader:
    """Turns a micro-batch into tensors; runs in the loader's workers.

    Args:
        rows: the training split.
        seed: the run's seed.
        latent_shape: channels, and pixels per latent along a side.
        crops: how pictures are cropped and mirrored.
        masks: what of the pictures counts less; None: batches have no mask.
        noise: what the noise has besides itself.
        stored: the caches, which spare decoding; None: every picture is decoded.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        seed: int,
        latent_shape: tuple[int, int],
        crops: CropRule,
        masks: LossMasks | None = None,
        noise: NoiseSection = PLAIN,
        stored: StoredReader | None = None,
    ) -> None:
        self._rows, self._seed, self._crops, self._masks = rows, seed, crops, masks
        self._stored = stored
        self._channels, self._scale = latent_shape
        self._noise = noise

    def __getitem__(self, micro: MicroBatch) -> tuple[MicroBatch, Batch] | Failure:
        try:
            return micro, self.batch(micro.slots, micro.u)
        except UserError as error:
            return Failure(error.message, error.hint)

    def batch(self, slots: list[Slot], u: Iterable[float]) -> Batch:
        """The tensors of some slots of one bucket, as training sees them.

        Raises:
            DataError: a picture does not decode, or has another size than its masked row; names it.
        """
        height, width = slots[0].bucket.size_hw
        shape = (self._channels, height // self._scale, width // self._scale)
        prompts = [slot.text.prompt for slot in slots]
        stored_latents = stored_text = None
        if self._stored is not None:
            crops = [self._crop(slot) for slot in slots]
            stored_latents = self._stored.latents_of(self._rows, slots, crops, shape)
            stored_text = self._stored.text_of(prompts)
        is_there = stored_latents.entries if stored_latents else {}
        expect(self._rows, [slot.row for at, slot in enumerate(slots) if at not in is_there])
        views = {at: self._view(slot) for at, slot in enumerate(slots) if at not in is_there}
        micro = [
            views[at][1] if at in views else self._stored_micro(slot)
            for at, slot in enumerate(slots)
        ]
        pixels = [view for view, _ in views.values()]
        drawn = [self._noise.draw((self._seed, s.sample_id, s.visit), shape) for s in slots]
        more = [extra for _, extra in drawn if extra is not None]
        return Batch(
            ids=[slot.sample_id for slot in slots],
            visits=[slot.visit for slot in slots],
            pixels=torch.stack(pixels) if pixels else torch.empty(0, 3, height, width),
            prompts=prompts,
            micro=micro,
            noise=torch.stack([noise for noise, _ in drawn]),
            u=torch.tensor(list(u), dtype=torch.float64),
            text_draws=torch.tensor(
                [uniform(self._seed, "text", s.sample_id, s.visit) for s in slots],
                dtype=torch.float64,
            ),
            mask=self._mask(slots, micro),
            input_noise=torch.stack(more) if more else None,
            stored_latents=stored_latents,
            stored_text=stored_text,
        )

    def num_left(self, slots: Sequence[Slot]) -> int:
        """How many of some slots have a mask that leaves something of them; reads no picture."""
        if self._masks is None or self._masks.weight or not self._masks.normalise:
            return len(slots)
        return sum(bool((self._weights(self._masks, slot) > 0).any()) for slot in slots)

    def _mask(self, slots: Sequence[Slot], micro: Sequence[MicroConditioning]) -> Tensor | None:
        if self._masks is None:
            return None
        for slot, seen in zip(slots, micro, strict=True):
            self._require_promised(slot, seen.original_size_hw)  # else boxes would lie elsewhere
        return torch.stack([self._weights(self._masks, slot) for slot in slots])

    def _weights(self, masks: LossMasks, slot: Slot) -> Tensor:
        """(1, h, w) float32, through the very crop that the pixels get."""
        grid_hw = slot.bucket.height // self._scale, slot.bucket.width // self._scale
        return masks.weights(self._rows, slot.row, slot.bucket, self._crop(slot), grid_hw)

    def _promised_hw(self, slot: Slot) -> tuple[int, int]:
        height, width = self._rows.sizes_hw[slot.row].tolist()
        return height, width

    def _require_promised(self, slot: Slot, found_hw: tuple[int, int]) -> None:
        promised = self._promised_hw(slot)
        if promised != found_hw:
            raise DataError(
                f"image {slot.sample_id} has height and width {found_hw}, its row says {promised}",
                "The data set was changed after publishing; publish it again.",
            )

    def _crop(self, slot: Slot, size_hw: tuple[int, int] | None = None) -> Crop:
        """The crop of one visit, by the picture's size or, before it is decoded, by its row's."""
        key = (self._seed, slot.sample_id, slot.visit)
        return self._crops.crop(size_hw or self._promised_hw(slot), slot.bucket, key)

    def _view(self, slot: Slot) -> tuple[Tensor, MicroConditioning]:
        image = self._rows.image(slot.row)
        size_hw = image.height, image.width
        if self._stored is not None:  # the cache was asked for the crop of the promised size
            self._require_promised(slot, size_hw)
        return crop_view(image, slot.bucket, self._crop(slot, size_hw))

    def _stored_micro(self, slot: Slot) -> MicroConditioning:
        """What the model is told of a picture that nobody decodes."""
        return conditioning_of(self._promised_hw(slot), slot.bucket, self._crop(slot))


def plan_micro_batches(
    steps: Iterable[Step],
    family: Family,
    *,
    seed: int,
    size: int,
    timesteps: str = "stratified",
    world: World = ALONE,
) -> Iterator[MicroBatch]:
    """Cut this process's share of each step into forwards and give every slot its noise level.

    The levels are spread over the whole step before it is cut, so they do not depend on `size`,
    nor on the number of processes. All processes run equally many forwards: where one has fewer,
    or no sample at all, it repeats the step's first sample, which then counts nothing.
    """
    draw = stratified_u if timesteps == "stratified" else independent_u
    for step in steps:
        areas = torch.tensor([slot.bucket.width * slot.bucket.height for slot in step.slots])
        levels = family.density(draw(seed, step.samples_seen, len(step.slots)), areas).tolist()
        shares = [
            [[share[at] for at in group] for group in micro_batches(step.slots[_span(share)], size)]
            for share in (world.share(len(step.slots), rank) for rank in range(world.size))
        ]
        groups, most = shares[world.rank], max(map(len, shares))
        for at in range(most):
            is_padding = at >= len(groups)
            group = [0] if is_padding else groups[at]
            u = tuple(levels[position] for position in group)
            yield MicroBatch(step, tuple(group), u, at == most - 1, is_padding)


def _span(share: range) -> slice:
    return slice(share.start, share.stop)


def load(
    reader: BatchReader, micro: Iterable[MicroBatch], workers: int
) -> Iterator[tuple[MicroBatch, Batch]]:
    """Every micro-batch with its tensors, in order.

    Args:
        reader: makes the tensors.
        micro: what to load.
        workers: processes that load ahead; 0 loads in this one.

    Raises:
        DataError: a picture does not decode.
    """
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        reader,  # type: ignore[arg-type]  # indexed by a MicroBatch, not a number
        sampler=micro,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_interrupts_to_the_parent if workers else None,
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator(),  # else it would advance the ambient one
    )
    with _born_deaf():
        coming = iter(loader)
    for loaded in coming:
        if isinstance(loaded, Failure):
            raise DataError(loaded.message, loaded.hint)
        yield loaded


def _as_it_is(loaded: Any) -> Any:
    return loaded


@contextmanager
def _born_deaf() -> Iterator[None]:
    """What begins here is not ended by a signal to stop before it has learned to ignore it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing.resource_tracker import ensure_running

    ensure_running()  # it would lift the block when it is begun by the first worker
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_interrupts_to_the_parent(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal, and a cluster's SIGTERM every one of the job;
    # the parent finishes its step and saves first. Workers end with it by themselves.
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
