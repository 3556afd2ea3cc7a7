"""From the pixels and prompts of a batch to what the network reads, through the caches.

What comes out is the same with and without a cache, and from a full and from an empty one: each
picture is encoded alone (unless `cache.vae_batch` says otherwise), because batch mates move a
result, and then rounded to `cache.dtype`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdprep.errors import DataError
from sdtrain.batch import Batch, Stored
from sdtrain.cache.entries import DTYPES, pack
from sdtrain.cache.reading import Kept, latents_in
from sdtrain.cache.writing import BlockWriter
from sdtrain.noise import noise_for

if TYPE_CHECKING:
    from sdtrain.cache.section import CacheSection
    from sdtrain.family import Family

MEAN, STD = "mean", "std"
_LABEL_CHARACTERS = 60

Tensors = Mapping[str, Tensor]


def names_of(section: CacheSection) -> tuple[str, ...]:
    """Which tensors make up the latents of one picture."""
    return (MEAN,) if section.posterior == "mode" else (MEAN, STD)


class Encoder:
    """Fills in `Batch.latents`, and `Batch.conditioning` where no text encoder trains.

    Args:
        family: the model; its VAE and frozen encoders are run for what no cache has.
        section: the recipe's `[cache]`.
        seed: the run's, for samples of the posterior.
        device: of the networks.
        latents: the cache of pictures; None: each is encoded at every visit.
        text: the cache of prompts; None: as above.
        text_trains: whether an encoder trains at any time; prompts are then left to the forward.
    """

    def __init__(
        self,
        family: Family,
        section: CacheSection,
        *,
        seed: int,
        device: torch.device,
        latents: Kept | None = None,
        text: Kept | None = None,
        text_trains: bool = False,
    ) -> None:
        self._family, self._section = family, section
        self._seed, self._device = seed, device
        self._dtype = DTYPES[section.dtype]
        self._kept_latents, self._kept_text, self._text_trains = latents, text, text_trains
        self.latents_writer = None if latents is None else BlockWriter(latents.store)
        self.text_writer = None if text is None else BlockWriter(text.store)

    def encoded(self, batch: Batch) -> Batch:
        """The batch with its latents and, if frozen, its conditioning; it is on the device.

        Raises:
            DataError: a result is not finite in `cache.dtype`, or a stored entry does not fit.
        """
        return replace(
            batch,
            latents=self._latents(batch),
            conditioning=None if self._text_trains else self._conditioning(batch),
        )

    def flush(self) -> None:
        """Write what is pending; it is lost when the process is killed before."""
        for writer in (self.latents_writer, self.text_writer):
            if writer is not None:
                writer.flush()

    # --- pictures -----------------------------------------------------------------------------

    def posterior(self, pixels: Tensor) -> list[Tensors]:
        """Rounded tensors (C, h, w) of each picture of (B, 3, H, W), on its device."""
        names = names_of(self._section)
        found: list[Tensors] = []
        for part in pixels.split(self._section.vae_batch):
            values = dict(zip((MEAN, STD), self._family.posterior(part), strict=True))
            rounded = {name: values[name].to(self._dtype) for name in names}
            found += [{name: rounded[name][at] for name in names} for at in range(len(part))]
        return found

    def fill_latents(self, batch: Batch) -> None:
        """Keep what the cache lacks of a batch; nothing is made of it."""
        assert batch.stored_latents is not None
        self._stored_latents(batch, batch.stored_latents)

    def _latents(self, batch: Batch) -> Tensor:
        if batch.stored_latents is None:
            parts = self.posterior(batch.pixels)
        else:
            there = self._stored_latents(batch, batch.stored_latents)
            parts = [there[at] for at in range(len(batch))]
        return self._family.scale_latents(self._sampled(batch, parts))

    def _stored_latents(self, batch: Batch, stored: Stored) -> dict[int, Tensors]:
        """Position to tensors: what was read, what was written meanwhile, and what is new."""
        assert self._kept_latents is not None
        assert self.latents_writer is not None
        found: dict[int, Tensors] = dict(stored.entries)
        missing = [at for at in range(len(batch)) if at not in found]
        late = self.latents_writer.get([stored.keys[at] for at in missing])
        shape = tuple(batch.noise.shape[1:])
        for index, entry in late.items():
            found[missing[index]] = latents_in(entry, self._kept_latents, shape)
        new = [index for index in range(len(missing)) if index not in late]
        if new:
            for index, tensors in zip(new, self.posterior(batch.pixels[new]), strict=True):
                at = missing[index]
                found[at] = tensors
                _write(
                    self.latents_writer,
                    stored.keys[at],
                    (batch.ids[at], f"the latents of image {batch.ids[at]}"),
                    self._section.dtype,
                    tensors,
                )
        return found

    def _sampled(self, batch: Batch, parts: Sequence[Tensors]) -> Tensor:
        """(B, C, h, w) float32, unscaled: the mean, or a keyed sample."""
        device = self._device
        mean = _stacked(parts, MEAN, device)
        if self._section.posterior == "mode":
            return mean
        shape = mean.shape[1:]
        draws = [
            noise_for(self._seed, "posterior", id_, visit, shape)
            for id_, visit in zip(batch.ids, batch.visits, strict=True)
        ]
        return mean + _stacked(parts, STD, device) * torch.stack(draws).to(device)

    # --- prompts ------------------------------------------------------------------------------

    def _conditioning(self, batch: Batch) -> Any:
        stored = batch.stored_text
        if stored is None:
            parts = self.prompts(batch.prompts)
        else:
            there = self._stored_text(batch, stored)
            parts = [there[at] for at in range(len(batch))]
        whole = [{name: part[name].to(self._device).float() for name in part} for part in parts]
        return self._family.join_conditioning(whole)

    def _stored_text(self, batch: Batch, stored: Stored) -> dict[int, Tensors]:
        assert self.text_writer is not None
        found: dict[int, Tensors] = dict(stored.entries)
        missing = [at for at in range(len(batch)) if at not in found]
        late = self.text_writer.get([stored.keys[at] for at in missing])
        found |= {missing[index]: entry.tensors() for index, entry in late.items()}
        new = [at for at in missing if at not in found]
        for at in new:
            found[at] = self.fill_text(stored.keys[at], batch.prompts[at])
        return found

    def fill_text(self, key: bytes, prompt: str) -> Tensors:
        """Encode one prompt and keep it."""
        assert self.text_writer is not None
        tensors = self.prompts([prompt])[0]
        label = repr(prompt[:_LABEL_CHARACTERS])
        what = (label, f"the encoded prompt {label}")
        _write(self.text_writer, key, what, self._section.dtype, tensors)
        return tensors

    def prompts(self, prompts: Sequence[str]) -> list[Tensors]:
        """Rounded tensors of each prompt, on the encoders' device.

        One by one where they are kept, and on a CPU, where it costs nothing. Else together, as a
        GPU needs four times as long for four prompts one by one.
        """
        family = self._family
        alone = self.text_writer is not None or self._device.type == "cpu"
        groups = [[prompt] for prompt in prompts] if alone else [list(prompts)]
        found: list[Tensors] = []
        with torch.no_grad(), family.autocast():
            for group in groups:
                entries = family.split_conditioning(family.encode_prompts(group)) if group else []
                found += [{k: v.to(self._dtype) for k, v in entry.items()} for entry in entries]
        return found


def _stacked(parts: Sequence[Tensors], name: str, device: torch.device) -> Tensor:
    return torch.stack([part[name].to(device, non_blocking=True) for part in parts]).float()


def _write(
    writer: BlockWriter, key: bytes, what: tuple[str, str], dtype: str, tensors: Tensors
) -> None:
    on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    label, words = what
    for name, tensor in on_cpu.items():
        if not torch.isfinite(tensor).all():
            raise DataError(
                f"{words}: {name} is not finite in {dtype}, so it is not kept",
                'The model is damaged, or the numbers are too large: try cache.dtype = "bf16".',
            )
    writer.add(pack(key, label, dtype, on_cpu))
