"""Load micro-batches, in this process or ahead in others; the result is the same.

Everything random about a sample is keyed by (seed, sample id, visit), so it does not matter which
worker loads it, or when.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdprep.errors import DataError, UserError
from sdprep.seeding import uniform
from sdtrain.batch import Batch, MicroConditioning
from sdtrain.buckets import Slot, Step, micro_batches
from sdtrain.noise import independent_u, stratified_u
from sdtrain.noise_options import PLAIN, NoiseSection
from sdtrain.pixels import training_crop, training_view

if TYPE_CHECKING:
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
    """

    step: Step
    positions: tuple[int, ...]
    u: tuple[float, ...]
    is_last: bool

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
        flip_prob: probability of a mirrored image.
        masks: what of the pictures counts less; None: batches have no mask.
        noise: what the noise has besides itself.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        seed: int,
        latent_shape: tuple[int, int],
        flip_prob: float,
        masks: LossMasks | None = None,
        noise: NoiseSection = PLAIN,
    ) -> None:
        self._rows, self._seed, self._flip_prob, self._masks = rows, seed, flip_prob, masks
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
        views = [self._view(slot) for slot in slots]
        height, width = slots[0].bucket.size_hw
        shape = (self._channels, height // self._scale, width // self._scale)
        drawn = [self._noise.draw((self._seed, s.sample_id, s.visit), shape) for s in slots]
        more = [extra for _, extra in drawn if extra is not None]
        return Batch(
            ids=[slot.sample_id for slot in slots],
            visits=[slot.visit for slot in slots],
            pixels=torch.stack([pixels for pixels, _ in views]),
            prompts=[slot.text.prompt for slot in slots],
            micro=[micro for _, micro in views],
            noise=torch.stack([noise for noise, _ in drawn]),
            u=torch.tensor(list(u), dtype=torch.float64),
            text_draws=torch.tensor(
                [uniform(self._seed, "text", s.sample_id, s.visit) for s in slots],
                dtype=torch.float64,
            ),
            mask=self._mask(slots, [micro for _, micro in views]),
            input_noise=torch.stack(more) if more else None,
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
            promised = tuple(self._rows.sizes_hw[slot.row].tolist())
            if promised != seen.original_size_hw:  # the boxes would lie elsewhere
                raise DataError(
                    f"image {slot.sample_id} has height and width {seen.original_size_hw}, its "
                    f"row says {promised}",
                    "The data set was changed after publishing; publish it again.",
                )
        return torch.stack([self._weights(self._masks, slot) for slot in slots])

    def _weights(self, masks: LossMasks, slot: Slot) -> Tensor:
        """(1, h, w) float32, through the very crop that the pixels get."""
        height, width = (int(side) for side in self._rows.sizes_hw[slot.row])
        key = (self._seed, slot.sample_id, slot.visit)
        crop = training_crop((height, width), slot.bucket, key, self._flip_prob)
        grid_hw = slot.bucket.height // self._scale, slot.bucket.width // self._scale
        return masks.weights(self._rows, slot.row, slot.bucket, crop, grid_hw)

    def _view(self, slot: Slot) -> Any:
        image = self._rows.image(slot.row)
        key = (self._seed, slot.sample_id, slot.visit)
        return training_view(image, slot.bucket, key, self._flip_prob)


def plan_micro_batches(
    steps: Iterable[Step], family: Family, *, seed: int, size: int, timesteps: str = "stratified"
) -> Iterator[MicroBatch]:
    """Cut steps into forwards and give every slot its noise level.

    The levels are spread over the whole step before it is cut, so they do not depend on `size`.
    """
    draw = stratified_u if timesteps == "stratified" else independent_u
    for step in steps:
        areas = torch.tensor([slot.bucket.width * slot.bucket.height for slot in step.slots])
        levels = family.density(draw(seed, step.samples_seen, len(step.slots)), areas).tolist()
        groups = micro_batches(step.slots, size)
        for group in groups:
            u = tuple(levels[position] for position in group)
            yield MicroBatch(step, tuple(group), u, group is groups[-1])


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
    for loaded in loader:
        if isinstance(loaded, Failure):
            raise DataError(loaded.message, loaded.hint)
        yield loaded


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _leave_interrupts_to_the_parent(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the parent finishes its step and saves first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
