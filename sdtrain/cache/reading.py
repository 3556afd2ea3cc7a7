"""What the loader's workers take from the caches: no picture is decoded for what is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from sdprep.errors import DataError
from sdtrain.batch import Stored
from sdtrain.cache.entries import Entry, layout_of
from sdtrain.cache.keys import latents_key, text_key
from sdtrain.cache.store import EntryStore

if TYPE_CHECKING:
    from sdtrain.buckets import Slot
    from sdtrain.dataset import Rows
    from sdtrain.pixels import Crop


@dataclass(frozen=True)
class Kept:
    """A cache as one recipe sees it.

    Args:
        store: the entries, also those of other recipes.
        kind: what the keys of this recipe's entries have in common.
        names: of the tensors in one entry.
    """

    store: EntryStore
    kind: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoredReader:
    """Looks up the samples of a batch; may be sent to another process.

    Args:
        latents: the cache of pictures, if there is one.
        text: the cache of prompts, if there is one.
    """

    latents: Kept | None
    text: Kept | None

    def latents_of(
        self,
        rows: Rows,
        slots: Sequence[Slot],
        crops: Sequence[Crop],
        shape: tuple[int, int, int],
    ) -> Stored | None:
        """Latents of some crops.

        Args:
            rows: the split.
            slots: of one bucket.
            crops: one for each slot.
            shape: (C, h, w) of a latent of this bucket.

        Raises:
            DataError: an entry is damaged, or of another size than the bucket.
        """
        if self.latents is None:
            return None
        kind = self.latents.kind
        keys = [
            latents_key(kind, rows.source_digest(slot.row), slot.bucket, crop)
            for slot, crop in zip(slots, crops, strict=True)
        ]
        found = self.latents.store.get(keys)
        return Stored(
            keys, {at: latents_in(entry, self.latents, shape) for at, entry in found.items()}
        )

    def text_of(self, prompts: Sequence[str]) -> Stored | None:
        """Encoded prompts.

        Raises:
            DataError: an entry is damaged.
        """
        if self.text is None:
            return None
        keys = [text_key(self.text.kind, prompt) for prompt in prompts]
        found = self.text.store.get(keys)
        return Stored(keys, {at: entry.tensors() for at, entry in found.items()})


def latents_in(entry: Entry, kept: Kept, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The tensors of one entry, which must be of the size that its bucket asks for.

    Raises:
        DataError: they are of another.
    """
    expected = layout_of(dict.fromkeys(kept.names, shape))
    if entry.layout != expected:
        raise DataError(
            f"{kept.store.path}: the latents of image {entry.label} are {entry.layout}, its bucket "
            f"asks for {expected}",
            "See sdtrain cache verify RECIPE; with --repair it drops such entries.",
        )
    return entry.tensors()
