"""A published set on the Hub, trained on at once: its words are fetched first, pictures as needed.

The words are indexed like those of a folder, so order, texts and crops are those of the same set
on this disk, and so is every loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdprep.console import megabytes, progress
from sdprep.errors import DataError
from sdprep.images import ImageRejected, open_image
from sdprep.schema import MANIFEST
from sdprep.seeding import digest
from sdtrain.dataset import Splits
from sdtrain.errands import submit, together
from sdtrain.hub_files import list_files
from sdtrain.hub_shards import Ahead, HubShard, Page, clear
from sdtrain.prepared_data import SPLITS, PreparedRows, made_ready
from sdtrain.prepared_index import index_parts

if TYPE_CHECKING:
    from PIL import Image

    from sdtrain.data_section import DataSection

INSTEAD = "Leave data.streaming out: the data set is then downloaded first."


def open_streamed(
    section: DataSection, manifest: Mapping[str, Any] | None, *, with_boxes: bool
) -> Splits:
    """Open the splits of a published set on the Hub, without its pictures.

    Args:
        section: pinned to a commit.
        manifest: of the set; None: sdprep did not publish it.
        with_boxes: whether the boxes of detectors are wanted, too.

    Raises:
        DataError: it cannot be streamed, or not be read.
        UserError: the index of its texts cannot be written.
    """
    where = f"{section.path} at commit {str(section.revision)[:12]}"
    if manifest is None:
        raise DataError(
            f"data.streaming = true, but {where} has no {MANIFEST}: without it the sizes of the "
            "pictures are not known before all of them were fetched",
            f"{INSTEAD} Or publish it with sdprep (ingest --type hub), then stream that.",
        )
    shards = _shards(section)
    if not shards["train"]:
        raise DataError(
            f"data.streaming = true, but {where} has no data/train-*.parquet "
            f"(it was published as {manifest.get('format', 'another format')})",
            f'{INSTEAD} Or publish it with publish.format = "parquet".',
        )
    train, validation = (_open_split(section, shards[name], with_boxes) for name in SPLITS)
    if train is None:
        raise DataError(f"{where} has no row to train on", "Publish it again with sdprep.")
    return Splits(train, validation, section.revision, [_note(section, shards)])


def _cache(section: DataSection) -> Path:
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "sdtrain" / digest("hub", section.path)


def _shards(section: DataSection) -> dict[str, list[HubShard]]:
    """The shards of each split; the first ones, those of validation before all, stay here."""
    files, pictures = list_files(section, "data"), _cache(section) / "pictures"
    room = section.stream_keep_bytes
    found: dict[str, list[HubShard]] = {}
    for split in reversed(SPLITS):
        found[split] = []
        for file in files:
            if Path(file.path).match(f"{split}-*.parquet"):
                found[split].append(HubShard(file, pictures / file.oid[:40], room))
                room = max(0, room - file.size)
    clear(pictures, [shard for shards in found.values() for shard in shards])
    return found


def _open_split(
    section: DataSection, shards: Sequence[HubShard], with_boxes: bool
) -> StreamedRows | None:
    if not shards:
        return None
    with progress("asking for shards", len(shards), "shards") as bar:
        for _ in together(lambda shard: shard.num_rows, shards):
            bar.advance()
    cache = _cache(section)
    rows = StreamedRows(index_parts(shards, cache), with_boxes=with_boxes)
    return made_ready(rows, cache, section.path)


def _note(section: DataSection, shards: Mapping[str, Sequence[HubShard]]) -> str:
    size = sum(shard.file.size for split in shards.values() for shard in split)
    kept = section.stream_keep_bytes
    which = "all of them stay" if size <= kept else f"the first {megabytes(kept)} stay"
    stay = f"{which} in {_cache(section)}" if kept else "none of them stays here"
    return (
        f"streamed from the Hub at commit {str(section.revision)[:12]}: {megabytes(size)}, "
        f"fetched as needed; {stay}"
    )


class StreamedRows(PreparedRows):
    """One split of a published set on the Hub."""

    @cached_property
    def _ahead(self) -> Ahead:
        return {}

    def expect(self, rows: Sequence[int]) -> None:
        """Ask for the pictures of some rows at the same time; `image` will want them."""
        wanted: Ahead = {}
        for row in rows:
            shard, group, at = self._stored(row)
            page = shard.page(group, at)
            key = shard.oid, page.offset
            if key not in wanted:
                known = self._ahead.get(key)
                wanted[key] = known or submit(shard.read, page)
        self._ahead = wanted

    def image(self, row: int) -> Image.Image:
        """The upright RGB picture of one row, from the Hub if it is not here."""
        shard, group, at = self._stored(row)
        name = f"row {row} ({self.ids[row]}) of {shard}"
        try:
            data = shard.picture(group, at, self._page(shard, shard.page(group, at)))
        except DataError as error:
            raise DataError(f"{name}: {error.message}", error.hint) from error
        try:
            if data is None:
                raise ImageRejected("missing_file", "the row has no picture")
            return open_image(data, first_frame=True).image
        except ImageRejected as error:
            raise DataError(f"{name} does not decode: {error}") from error

    def source_digest(self, row: int) -> str:
        """Of the shard and the place in it: as good as one of the file, and nothing is fetched."""
        shard, group, at = self._stored(row)
        return digest("hub shard", shard.oid, group, at)

    def _page(self, shard: HubShard, page: Page) -> bytes:
        coming = self._ahead.get((shard.oid, page.offset))
        return coming.result() if coming is not None else shard.read(page)

    def _stored(self, row: int) -> tuple[HubShard, int, int]:
        """Shard, row group and row of the group."""
        place = self._place(row)
        shard: Any = place.file
        assert isinstance(shard, HubShard)
        return shard, place.group, place.row
