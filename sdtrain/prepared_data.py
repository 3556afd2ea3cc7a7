"""A published folder, read where it lies: words from copies, pictures out of the shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from sdprep.errors import DataError
from sdprep.images import ImageRejected, open_image
from sdprep.seeding import digest
from sdtrain.dataset import Splits
from sdtrain.ids import Ids
from sdtrain.parquet_pictures import Place, read_picture
from sdtrain.parquet_rows import BOXES, TEXTS
from sdtrain.prepared_copying import Copying, copy_now
from sdtrain.prepared_index import Groups, Part, index_parts
from sdtrain.prepared_texts import TextColumns
from sdtrain.text_columns import records, total

if TYPE_CHECKING:
    from PIL import Image

SPLITS = ("train", "validation")
Rows = TypeVar("Rows", bound="PreparedRows")


def shards(folder: Path, split: str) -> list[Path]:
    """The Parquet files of one split of a published folder, in order."""
    return sorted((folder / "data").glob(f"{split}-*.parquet"))


def open_prepared(folder: Path, *, with_boxes: bool) -> Splits:
    """Open the splits of a published folder of Parquet shards.

    Raises:
        DataError: it cannot be read.
        UserError: the index of its texts cannot be written.
    """
    from datasets import config

    cache = Path(config.HF_DATASETS_CACHE) / "sdtrain" / digest("index", folder.resolve())
    train, validation = (_open_split(folder, split, cache, with_boxes) for split in SPLITS)
    if train is None:
        raise DataError(f"{folder} has no row to train on", "Publish it again with sdprep.")
    return Splits(train, validation)


def _open_split(folder: Path, split: str, cache: Path, with_boxes: bool) -> PreparedRows | None:
    files = shards(folder, split)
    if not files:
        return None
    rows = PreparedRows(index_parts(files, cache), with_boxes=with_boxes)
    return made_ready(rows, cache, f"{folder}: split {split}")


def made_ready(rows: Rows, cache: Path, what: str) -> Rows | None:
    """See to it that each row has a name of its own and that words are copied; None without rows.

    Args:
        rows: a split whose index is made.
        cache: where the copies lie.
        what: names the split in messages.

    Raises:
        DataError: two rows have one id, or a shard cannot be read.
        UserError: there is no room for copies.
    """
    twice = rows.ids.first_twice()
    if twice is not None:
        raise DataError(f"{what} has the id {twice} twice", "Ids must name one row each.")
    if rows.with_boxes:
        copy_now(rows.box_columns, cache)  # masks look at the boxes of all rows before they train
    rows.copying = Copying(rows.texts, cache, len(rows))
    return rows if len(rows) else None


class PreparedRows:
    """One split of a published folder.

    Args:
        parts: its index; what is sent to another process is no more than that.
        with_boxes: whether boxes are read.

    Attributes:
        copying: makes a copy of the texts; None: they are read as far as they are copied.
    """

    def __init__(self, parts: Sequence[Part], *, with_boxes: bool = False) -> None:
        self._parts, self.with_boxes = tuple(parts), with_boxes
        self.texts = TextColumns(self._parts, TEXTS, "texts")
        self.box_columns = TextColumns(self._parts, BOXES, "boxes")
        self.copying: Copying | None = None
        self.refused: dict[int, str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # The loader is asked for kept rows only, and copies nothing.
        return partial(type(self), with_boxes=self.with_boxes), (self._parts,)

    def __len__(self) -> int:
        return int(self._groups.part_starts[-1])

    @cached_property
    def _rows(self) -> list[pa.RecordBatch]:
        """Ids, sizes and repeats, mapped into memory."""
        readers = [pa.ipc.open_file(pa.memory_map(str(part.rows))) for part in self._parts]
        return [r.get_batch(index) for r in readers for index in range(r.num_record_batches)]

    def _numbers(self, name: str) -> np.ndarray:
        columns = [batch.column(name).to_numpy() for batch in self._rows]
        return np.concatenate(columns) if columns else np.empty(0, np.int64)

    @cached_property
    def ids(self) -> Ids:
        """The ids of the rows."""
        return Ids([batch.column("id") for batch in self._rows])

    @cached_property
    def sizes_hw(self) -> np.ndarray:
        """(n, 2) upright height and width, px."""
        return np.stack([self._numbers("height"), self._numbers("width")], 1)

    @cached_property
    def repeats(self) -> np.ndarray:
        """(n,) how often each row is trained in an epoch."""
        return self._numbers("repeats")

    def digest_sum(self) -> np.ndarray:
        """Of ids, sizes and texts as they are stored, whatever the order of the row groups."""
        return total(
            np.array(json.loads(part.facts.read_text(encoding="utf-8"))["digest"], np.uint64)
            for part in self._parts
        )

    def records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Id, captions, tags, score, group and repeats of some rows."""
        if self.copying is not None:
            self.copying.before_reading()
        names = ("caption", "captions", "tags", "score", "group_id")
        found: list[dict[str, Any]] = [{}] * len(rows)
        for places, batch in self.texts.take(rows, names):
            for place, record in zip(places.tolist(), records(batch), strict=True):
                found[place] = record
        if self.copying is not None:
            self.copying.after_reading()
        wanted = np.asarray(rows, np.int64)
        known = zip(self.ids.at(wanted), self.repeats[wanted].tolist(), found, strict=True)
        return [{"id": id_, **record, "repeats": repeats} for id_, repeats, record in known]

    def boxes(self, rows: Sequence[int]) -> list[list[dict[str, Any]]]:
        """What detectors found on some rows; none where the set was opened without."""
        found: list[list[dict[str, Any]]] = [[]] * len(rows)
        if not self.with_boxes:
            return found
        for places, batch in self.box_columns.take(rows, ["boxes"]):
            for place, boxes in zip(places.tolist(), batch["boxes"].to_pylist(), strict=True):
                found[place] = boxes or []
        return found

    def sources(self, rows: Sequence[int]) -> list[str | None]:
        """Where some rows came from, by name."""
        found: list[str | None] = [None] * len(rows)
        for places, batch in self.texts.take(rows, ["source"]):
            for place, name in zip(places.tolist(), batch["source"].to_pylist(), strict=True):
                found[place] = name
        return found

    def image(self, row: int) -> Image.Image:
        """The upright RGB picture of one row."""
        place = self._place(row)
        try:
            data = read_picture(place)
            if data is None:
                raise ImageRejected("missing_file", "the row has no picture")
            return open_image(data, first_frame=True).image
        except (ImageRejected, OSError) as error:
            raise DataError(
                f"row {row} ({self.ids[row]}) of {place.file} does not decode: {error}"
            ) from error

    @cached_property
    def _digests(self) -> np.ndarray:
        """(n, 16) uint8 digests of files, zeros where not known yet."""
        return np.zeros((len(self), 16), np.uint8)

    def source_digest(self, row: int) -> str:
        """Digest of the file of one row; its id is that of the file before it was published."""
        if not self._digests[row].any():
            data = read_picture(self._place(row)) or b""
            found = blake2b(data, digest_size=16).digest()
            self._digests[row] = np.frombuffer(found, np.uint8)
        return self._digests[row].tobytes().hex()

    @cached_property
    def _groups(self) -> Groups:
        return Groups(self._parts)

    def _place(self, row: int) -> Place:
        return self._groups.picture(row)
