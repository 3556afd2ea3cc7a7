"""A published folder, read where it lies: words from an index, pictures out of the shards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sdprep.errors import DataError
from sdprep.images import ImageRejected, open_image
from sdprep.seeding import digest
from sdtrain.dataset import Splits
from sdtrain.ids import Ids, split_rows
from sdtrain.parquet_pictures import Place, read_picture
from sdtrain.prepared_index import Part, index_parts
from sdtrain.text_columns import records, total

if TYPE_CHECKING:
    from PIL import Image

SPLITS = ("train", "validation")


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
    rows = PreparedRows(index_parts(files, cache, with_boxes=with_boxes))
    twice = rows.ids.first_twice()
    if twice is not None:
        raise DataError(
            f"{folder}: split {split} has the id {twice} twice", "Ids must name one row each."
        )
    return rows if len(rows) else None


class _Words:
    """The batches of all parts, mapped into memory."""

    def __init__(self, parts: Sequence[Part]) -> None:
        readers = [pa.ipc.open_file(pa.memory_map(str(part.texts))) for part in parts]
        batches = (r.get_batch(index) for r in readers for index in range(r.num_record_batches))
        self.batches = [batch for batch in batches if batch.num_rows]
        self.starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])

    def column(self, name: str) -> list[Any]:
        return [batch.column(name) for batch in self.batches]

    def numbers(self, name: str) -> np.ndarray:
        columns = [column.to_numpy() for column in self.column(name)]
        return np.concatenate(columns) if columns else np.empty(0, np.int64)

    def take(self, rows: Sequence[int], names: list[str]) -> Iterator[tuple[np.ndarray, Any]]:
        """Some rows batch by batch, with the places in `rows` that they belong to."""
        wanted = np.asarray(rows, np.int64)
        by_row = np.argsort(wanted, kind="stable")
        for index, places, local in split_rows(self.starts, wanted[by_row]):
            yield by_row[places], self.batches[index].select(names).take(pa.array(local))


class PreparedRows:
    """One split of a published folder.

    Args:
        parts: its index; what is sent to another process is no more than that.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        self.refused: dict[int, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_parts": self._parts, "refused": {}}  # the loader is asked for kept rows only

    def __len__(self) -> int:
        return int(self._words.starts[-1])

    @cached_property
    def _words(self) -> _Words:
        return _Words(self._parts)

    @cached_property
    def ids(self) -> Ids:
        """The ids of the rows."""
        return Ids(self._words.column("id"))

    @cached_property
    def sizes_hw(self) -> np.ndarray:
        """(n, 2) upright height and width, px."""
        return np.stack([self._words.numbers("height"), self._words.numbers("width")], 1)

    @cached_property
    def repeats(self) -> np.ndarray:
        """(n,) how often each row is trained in an epoch."""
        return self._words.numbers("repeats")

    def digest_sum(self) -> np.ndarray:
        """Of the texts, ids and sizes, whatever their order."""
        return total(
            np.array(json.loads(part.facts.read_text(encoding="utf-8"))["digest"], np.uint64)
            for part in self._parts
        )

    def records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Id, captions, tags, score and group of some rows."""
        names = ["id", "caption", "captions", "tags", "score", "group_id", "repeats"]
        found: list[dict[str, Any]] = [{}] * len(rows)
        for places, batch in self._words.take(rows, names):
            for place, record in zip(places.tolist(), records(batch), strict=True):
                found[place] = record
        return found

    def boxes(self, rows: Sequence[int]) -> list[list[dict[str, Any]]]:
        """What detectors found on some rows; none where the set was opened without."""
        found: list[list[dict[str, Any]]] = [[]] * len(rows)
        if not self._words.batches or "boxes" not in self._words.batches[0].schema.names:
            return found
        for places, batch in self._words.take(rows, ["boxes"]):
            for place, boxes in zip(places.tolist(), batch["boxes"].to_pylist(), strict=True):
                found[place] = boxes or []
        return found

    def sources(self, rows: Sequence[int]) -> list[str | None]:
        """Where some rows came from, by name."""
        found: list[str | None] = [None] * len(rows)
        for places, batch in self._words.take(rows, ["source"]):
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
    def _groups(self) -> tuple[np.ndarray, np.ndarray]:
        """First row of each row group, and (part, shard, group, offset, length) of each."""
        tables = [np.load(part.groups) for part in self._parts]
        starts = np.cumsum(np.concatenate([[0], *(table[:, 2] for table in tables)]))
        numbered = [np.insert(t[:, [0, 1, 3, 4]], 0, part, 1) for part, t in enumerate(tables)]
        return starts, np.concatenate(numbered)

    def _place(self, row: int) -> Place:
        starts, groups = self._groups
        at = int(np.searchsorted(starts, row, "right")) - 1
        part, shard, group, offset, num_bytes = groups[at].tolist()
        file = self._parts[part].shards[shard]
        return Place(file, group, row - int(starts[at]), offset, num_bytes)
