"""Shards of a published set that lie on the Hub: their words at once, their pictures one by one.

Between the pictures of two row groups lie the words of a hundred rows. So the words of a whole
shard are a few reads, and a picture is one: of its page, which holds the pictures that lie closest,
too. Pages may stay on this disk. Epochs are drawn anew each time, so no page is likelier to be
asked for than another: those at the beginning of the set stay, and none ever makes room.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import threading
import zipfile
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from sdprep.console import warn
from sdprep.errors import DataError
from sdtrain.errands import submit
from sdtrain.hub_files import HubFile
from sdtrain.parquet_pages import END_BYTES, Unwalkable, footer_bytes, read_footer, read_pages
from sdtrain.parquet_pictures import picture_of_page

LEAVE_FREE_BYTES = 5_000_000_000
"""What is not taken of a disk, since checkpoints need it more."""

_END_BYTES_GUESSED = 2**16
_DIGEST_BYTES = 16
_UNREADABLE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Page:
    """Where a few pictures lie.

    Args:
        first_row: of the row group.
        offset: in the file.
        num_bytes: header included.
    """

    first_row: int
    offset: int
    num_bytes: int


class HubShard:
    """One Parquet file of a published set on the Hub; may be sent to another process.

    Args:
        file: where it lies.
        folder: what stays of it here.
        keep_bytes: pages that end before stay, too.
    """

    def __init__(self, file: HubFile, folder: Path, keep_bytes: int = 0) -> None:
        self.file, self.folder, self.keep_bytes = file, folder, keep_bytes

    def __str__(self) -> str:
        return str(self.file)

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file, "folder": self.folder, "keep_bytes": self.keep_bytes}

    @property
    def name(self) -> str:
        """Of the file, without its folder."""
        return self.file.path.rpartition("/")[2]

    @property
    def oid(self) -> str:
        """Digest of its content."""
        return self.file.oid

    @property
    def num_rows(self) -> int:
        """How many it has."""
        return self._plan[0]

    @cached_property
    def _plan(self) -> tuple[int, np.ndarray]:
        """Rows of the file, and its pages as `read_pages` lists them; asked for once."""
        place = self.folder / "pages.npz"
        with contextlib.suppress(*_UNREADABLE), np.load(place) as stored:
            return int(stored["rows"]), stored["pages"]
        try:
            num_rows, pages = self._planned()
        except Unwalkable as error:
            raise DataError(
                f"{self} cannot be streamed: {error}",
                "Leave data.streaming out, or publish the data set again with sdprep.",
            ) from error
        sink = io.BytesIO()
        np.savez(sink, rows=num_rows, pages=pages)
        _write(place, sink.getvalue())
        return num_rows, pages

    def _planned(self) -> tuple[int, np.ndarray]:
        start, end = max(0, self.file.size - _END_BYTES_GUESSED), self.file.size
        tail = self.file.read(start, end)
        length = footer_bytes(tail[-END_BYTES:])
        if length > len(tail):
            start, tail = end - length, self.file.read(max(0, end - length), end)
        num_rows, spans = read_footer(tail[-length:])
        first = min((offset for offset, _ in spans), default=end)
        if first < start:  # the index of pages lies right before the footer
            start, tail = first, self.file.read(first, start) + tail
        indexes = [tail[offset - start : offset - start + size] for offset, size in spans]
        return num_rows, read_pages(indexes)

    def words(self) -> io.RawIOBase:
        """The file, read ahead but for its pictures; that much stays on this disk."""
        pages = self._plan[1]
        groups = np.unique(pages[:, 0], return_index=True)[1]
        starts = pages[groups, 2].tolist()
        ends = [int((span[:, 2] + span[:, 3]).max()) for span in np.split(pages, groups[1:])]
        edges = [0, *(edge for span in zip(starts, ends, strict=True) for edge in span)]
        edges[-1] = min(edges[-1], max(0, self.file.size - _END_BYTES_GUESSED))  # read at once
        spans = list(zip(edges[::2], [*edges[1::2], self.file.size], strict=True))
        place = self.folder / "words"
        together = self._stored(place)
        if together is None:
            reads = [submit(self.file.read, start, end) for start, end in spans]
            together = b"".join(read.result() for read in reads)
            _keep(place, together)
        lengths = np.cumsum([0, *(end - start for start, end in spans)]).tolist()
        pieces = [
            (start, together[first:last])
            for (start, _), first, last in zip(spans, lengths[:-1], lengths[1:], strict=True)
        ]
        return _Pieces(self.file, pieces)

    def _stored(self, place: Path) -> bytes | None:
        """What stayed on this disk, if it is whole."""
        with contextlib.suppress(OSError):
            stored = place.read_bytes()
            if _digest(stored[_DIGEST_BYTES:]) == stored[:_DIGEST_BYTES]:
                return stored[_DIGEST_BYTES:]
        return None

    # --- pictures -----------------------------------------------------------------------------

    def page(self, group: int, row: int) -> Page:
        """Where one picture lies."""
        pages = self._plan[1]
        here = slice(*np.searchsorted(pages[:, 0], [group, group + 1]).tolist())
        at = int(np.searchsorted(pages[here, 1], row, "right")) - 1
        return Page(*pages[here][at, 1:].tolist())

    def picture(self, group: int, row: int, page: bytes) -> bytes | None:
        """The stored bytes of one picture, of the page that holds it; None: it is not whole."""
        return picture_of_page(page, row - self.page(group, row).first_row)

    def read(self, page: Page) -> bytes:
        """One page, from this disk if it stayed there.

        Raises:
            DataError: the Hub cannot be reached for too long.
        """
        place = self.folder / str(page.offset)
        stored = self._stored(place)
        if stored is not None:
            return stored
        data = self.file.read(page.offset, page.offset + page.num_bytes)
        if page.offset + page.num_bytes <= self.keep_bytes:
            _keep(place, data)
        return data


class _Pieces(io.RawIOBase):
    """A file of which some pieces are at hand; the rest is fetched when it is read."""

    def __init__(self, file: HubFile, pieces: list[tuple[int, bytes]]) -> None:
        self._file, self._pieces, self._at = file, pieces, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        self._at = start + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = self._file.size if size is None or size < 0 else self._at + size
        start, self._at = self._at, min(end, self._file.size)
        for first, data in self._pieces:
            if first <= start and self._at <= first + len(data):
                return data[start - first : self._at - first]
        return self._file.read(start, self._at)


# --- what stays here ------------------------------------------------------------------------------


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _keep(place: Path, data: bytes) -> None:
    """Write a page, unless there is no room: it is fetched again then."""
    try:
        if shutil.disk_usage(place.parent).free < LEAVE_FREE_BYTES + len(data):
            _say_full(place.parent.parent)
        else:
            _write(place, _digest(data) + data)
    except OSError as error:
        _say_full(place.parent.parent, str(error))


@cache
def _say_full(folder: Path, why: str = "the disk is almost full") -> None:
    warn(f"no more pictures are kept in {folder}: {why}")


def _write(place: Path, data: bytes) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = place.with_name(f".{place.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        scratch.write_bytes(data)
        os.replace(scratch, place)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise


def clear(folder: Path, shards: list[HubShard]) -> None:
    """Delete what stayed of shards that the set no longer has, and what is beyond the limit."""
    kept = {shard.folder: shard.keep_bytes for shard in shards}
    for found in folder.iterdir() if folder.is_dir() else ():
        if found not in kept:
            shutil.rmtree(found, ignore_errors=True)
            continue
        for page in found.iterdir():
            held = page.stat().st_size - _DIGEST_BYTES if page.name.isdecimal() else 0
            if held and int(page.name) + held > kept[found]:
                page.unlink(missing_ok=True)


Ahead = dict[tuple[str, int], Future[bytes]]
"""Pages that are on their way, by shard and offset."""
