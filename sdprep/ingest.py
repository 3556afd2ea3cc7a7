"""Ingest: from files of any source to rows, each image decoded once and nothing lost on the way."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Literal

from sdprep.console import megabytes, progress, say, warn
from sdprep.errors import DataError
from sdprep.formats import FORMAT_OF_EXTENSION
from sdprep.images import MAX_PIXELS, ImageInfo, ImageRejected, open_image
from sdprep.ingest_report import IngestReport, TooManyRejected, some
from sdprep.ingest_rows import FileState, RowBook
from sdprep.origins import name_for
from sdprep.source_item import Source, SourceItem
from sdprep.table import PhotoTable

EMBED_LIMIT_BYTES = 20 * 10**9
"""Up to this much in all, `storage = "auto"` copies the images into the table."""

MAX_FILE_BYTES = 2**30
"""Larger files are no photos, and would not fit into a binary cell together with others."""

Storage = Literal["auto", "embed", "link"]


def ingest(
    table: PhotoTable,
    source: Source,
    *,
    storage: Storage = "auto",
    rehash: bool = False,
    min_side: int | None = None,
    first_frame: bool | None = None,
    max_rejected_share: float | None = None,
    max_pixels: int = MAX_PIXELS,
    tombstones: Collection[str] = (),
    num_threads: int | None = None,
) -> IngestReport:
    """Add what a source holds and the table does not; a file that has not changed is not read.

    Args:
        table: open; the writer lock is taken here.
        source: the images.
        storage: embed copies the bytes into the table, link remembers paths, auto decides by size.
        rehash: read every file again instead of trusting its size and time.
        min_side: shorter side in pixels below which an image is `too_small`; this and the next two
            default to the source's own limits.
        first_frame: take the first frame of animations.
        max_rejected_share: 0..1; one bad file among others never stops a run.
        max_pixels: largest area, by the header.
        tombstones: ids that were purged and must not come back.
        num_threads: decoding threads; the default follows the machine.
    Raises:
        TooManyRejected: with the report; what was added stays.
        DataError: the table is locked, or storage `link` is asked of a source without files.
    """
    with table.writer():
        table.refresh()
        source_name = name_for(
            table.path, source.name, source.place, is_chosen=source.name_is_chosen
        )
        report = IngestReport(source_name)
        limits = source.limits
        rules = _Rules(
            rehash,
            limits.min_side if min_side is None else min_side,
            limits.first_frame if first_frame is None else first_frame,
            max_pixels,
            limits.max_rejected_share if max_rejected_share is None else max_rejected_share,
        )
        locate: Callable[[str], Path | None] = getattr(source, "locate", lambda key: None)
        book = RowBook(
            table,
            source_name,
            min_side=rules.min_side,
            first_frame=rules.first_frame,
            locate=locate,
        )
        report.storage = _decided(storage, source, book)
        run = _Run(source, book, report, rules, report.storage == "link", tombstones)
        run.go(num_threads or min(8, (os.cpu_count() or 2) + 1))
    return report


def _decided(storage: Storage, source: Source, book: RowBook) -> str:
    """Embed or link, for the whole table: a table that links already goes on linking."""
    if storage != "auto":
        return storage
    totals = source.totals()
    num_bytes = book.foreign_bytes + (totals[1] if totals else 0)
    chosen = "link" if book.num_linked or num_bytes > EMBED_LIMIT_BYTES else "embed"
    if totals:
        said = "remembers where they lie" if chosen == "link" else "holds a copy of them"
        say(f"{totals[0]:,} images, {megabytes(totals[1])}: the table {said} (storage={chosen})")
    return chosen


@dataclass(frozen=True)
class _Rules:
    rehash: bool
    min_side: int
    first_frame: bool
    max_pixels: int
    max_rejected_share: float


@dataclass(frozen=True)
class _Examined:
    """What reading one file brought; `id` is None where it could not be read."""

    id: str | None = None
    data: bytes | None = None
    state: FileState | None = None
    info: ImageInfo | None = None
    reason: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass
class _Run:
    source: Source
    book: RowBook
    report: IngestReport
    rules: _Rules
    is_linked: bool
    tombstones: Collection[str]
    claims: dict[str, str] = field(default_factory=dict)  # id → stamp of the text it gets
    textless: set[str] = field(default_factory=set)
    num_unusable: int = 0  # rejected files, without what is merely named somewhere

    def go(self, num_threads: int) -> None:
        totals = self.source.totals()
        unseen = dict.fromkeys(self.book.keys())
        try:
            with progress("ingest", totals[0] if totals else None) as bar, _quiet_pillow():
                for item, examined in self._examined(num_threads):
                    unseen.pop(item.key, None)
                    self._take(item, examined)
                    bar.advance()
                    if self.book.is_due:
                        self.book.flush()
                        self._check_share(totals[0] if totals else None)
        except KeyboardInterrupt:
            self.book.flush()  # what is decoded is not lost
            raise
        self._finish(list(unseen))

    def _examined(self, num_threads: int) -> Iterator[tuple[SourceItem, str | _Examined]]:
        """Items in the source's order, each with its id if trusted, else with what was read."""
        waiting: deque[tuple[SourceItem, str | Future[_Examined]]] = deque()
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="ingest")
        try:
            for item in self.source.iter_samples():
                known: str | None = None
                if not self.rules.rehash:
                    known = self.book.trusted(item.key, item.num_bytes, item.mtime_ns)
                waiting.append((item, known or pool.submit(self._examine, item)))
                while waiting and (len(waiting) > 2 * num_threads or _is_done(waiting[0][1])):
                    yield _resolved(*waiting.popleft())
            while waiting:
                yield _resolved(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _examine(self, item: SourceItem) -> _Examined:
        """Read, hash and, unless the bytes are known, decode one file. Runs in a thread."""
        try:
            data, id_, state = _read(item)
        except (OSError, DataError) as error:
            problem = "missing_file" if isinstance(error, FileNotFoundError) else "unreadable"
            return _Examined(reason=problem)
        if id_ in self.tombstones or self.book.is_settled(id_):
            return _Examined(id_, state=state)
        if data is None:
            return _Examined(id_, state=state, reason="file_too_large")
        rules = self.rules
        try:
            opened = open_image(data, first_frame=rules.first_frame, max_pixels=rules.max_pixels)
        except ImageRejected as error:
            return _Examined(id_, state=state, reason=error.reason)
        reason: str | None = None
        info, notes = opened.info, list(opened.info.warnings)
        suffix = PurePosixPath(item.key).suffix[1:].lower()
        if FORMAT_OF_EXTENSION.get(suffix, info.format) != info.format:
            notes.append("extension_lies")
        if min(info.width, info.height) < rules.min_side:
            reason = "too_small"
        keeps_bytes = reason is None and not (self.is_linked and _uri(item))
        return _Examined(id_, data if keeps_bytes else None, state, info, reason, tuple(notes))

    def _take(self, item: SourceItem, examined: str | _Examined) -> None:
        """Account for one file, in order."""
        self.report.found += 1
        if isinstance(examined, str):
            self._count(item, examined)
            self._take_text(item, examined)
            return
        if examined.id is None or examined.state is None:
            self.num_unusable += 1
            self.report.reject(item.key, examined.reason or "unreadable")
            return
        if examined.id in self.tombstones:
            self.report.reject(item.key, "purged")
            return
        id_ = examined.id
        is_new = not self.book.is_settled(id_)
        if is_new:
            self._add(item, examined)
        self.book.place(id_, examined.state, _uri(item))
        self._count(item, id_, is_new=is_new)
        self._take_text(item, id_)

    def _count(self, item: SourceItem, id_: str, *, is_new: bool = False) -> None:
        reason = self.book.reasons[id_]
        if reason is not None:
            self.num_unusable += 1
            self.report.reject(item.key, reason)
        elif is_new:
            self.report.added += 1
        else:
            self.report.already_present += 1

    def _add(self, item: SourceItem, examined: _Examined) -> None:
        assert examined.id is not None
        assert examined.state is not None
        info = examined.info
        shape = asdict(info) if info else {}
        is_linked = examined.reason is None and examined.data is None
        for kind in examined.warnings:
            self.report.warn(kind, item.key)
        names = ("width", "height", "format", "mode", "frames", "exif_orientation", "has_alpha")
        row = {name: shape.get(name) for name in names}
        row |= {"id": examined.id, "image": examined.data, "reject_ingest": examined.reason}
        row |= {"image_uri": _uri(item) if is_linked else None, "text": None}
        row |= {"num_bytes": examined.state.num_bytes, "warnings": list(examined.warnings) or None}
        self.book.add(row)

    def _take_text(self, item: SourceItem, id_: str) -> None:
        """Give a row its text. Of several files with the same bytes, the first with text wins."""
        text = item.text.row(self.report.source)
        stored = self.book.stamps.get(id_)
        own = f"@{self.report.source}"
        if text is None:
            if stored is not None and stored.endswith(own):
                self.textless.add(id_)
            return
        stamp: str = text["stamp"]
        claimed = self.claims.get(id_)
        winner = claimed or (stored if stored and not stored.endswith(own) else None)
        if winner is not None:
            if winner.partition("@")[0] != stamp.partition("@")[0]:
                self.report.warn("text_conflict", item.key)
            return
        self.claims[id_] = stamp
        if stamp != stored:
            self.book.stamps[id_] = stamp
            self.report.updated += self.book.set_text(id_, text)

    def _finish(self, gone: list[str]) -> None:
        for id_ in sorted(self.textless - self.claims.keys()):  # the sidecar was removed
            self.report.updated += self.book.set_text(id_, None)
        self.report.gone = len(gone)
        self.book.lose(gone)
        self.book.flush()
        self.report.superseded = len(self.book.superseded)
        num_files = self.report.found
        for finding in self.source.findings:
            self.report.note(finding)
        self._talk(gone)
        self._check_share(num_files)

    def _talk(self, gone: list[str]) -> None:
        for kind, keys in self.report.warnings.items():
            warn(f"{kind}: {len(keys)} ({some(keys)})")
        if self.report.skipped:
            listed = [f"{entry['source_key']} ({entry['reason']})" for entry in self.report.skipped]
            warn(f"never opened: {some(listed)}")
        if self.book.superseded:
            warn(
                f"edited in place: {some(self.book.superseded)}. The new pictures are in; the rows"
                " of the former ones are rejected as source_changed"
            )
        if not self.report.found:
            warn(f"there are no images in {self.source.place}")
        if gone:
            warn(f"not in {self.report.source} any more: {some(sorted(gone))}; their rows stay")

    def _check_share(self, num_files: int | None) -> None:
        """Stop once it is certain that too much of the source is unusable."""
        share, num_bad = self.rules.max_rejected_share, self.num_unusable
        if num_files and num_bad > share * num_files and (num_bad > 1 or num_files == 1):
            raise TooManyRejected(self.report, num_bad, num_files, share)


def _is_done(waiting: str | Future[_Examined]) -> bool:
    return isinstance(waiting, str)


def _resolved(
    item: SourceItem, waiting: str | Future[_Examined]
) -> tuple[SourceItem, str | _Examined]:
    return item, waiting if isinstance(waiting, str) else waiting.result()


def _uri(item: SourceItem) -> str | None:
    """The path to remember; None where there is no file or its name cannot be written as text."""
    if item.path is None:
        return None
    path = os.path.abspath(item.path)
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:  # a name in some older encoding: the image is embedded instead
        return None
    return path


def _read(item: SourceItem) -> tuple[bytes | None, str, FileState]:
    """Bytes (None if there are too many), id, and how the file looked when it was read."""
    if item.path is None:
        assert item.load is not None, f"{item.key}: a SourceItem needs a path or load"
        data = item.load()
        num_bytes = len(data) if item.num_bytes is None else item.num_bytes
        return data, _digest(data), FileState(item.key, num_bytes, item.mtime_ns)
    with item.path.open("rb") as file:
        stat = os.fstat(file.fileno())
        state = FileState(item.key, stat.st_size, stat.st_mtime_ns)
        if stat.st_size <= MAX_FILE_BYTES:
            data = file.read()
            return data, _digest(data), state
        hasher = blake2b(digest_size=16)
        while chunk := file.read(2**20):
            hasher.update(chunk)
        return None, hasher.hexdigest(), state


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Keep Pillow's remarks on odd metadata off the terminal; set once, around all threads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield
