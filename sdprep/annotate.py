"""The one loop that runs annotators over rows that are still NULL."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import pyarrow as pa

from sdprep.annotation_results import Outcome, Results
from sdprep.console import progress
from sdprep.errors import DataError, UserError
from sdprep.schema import CORE
from sdprep.stored_images import original_bytes
from sdprep.table import PhotoTable

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class PixelNeeds:
    """What an annotator wants of the decode that all annotators of a run share."""

    pixels: bool = True  # False: it reads columns only, `Sample.image` is None
    alpha: bool = False  # `Sample.alpha` is the upright alpha channel where the file has one
    data: bool = False  # `Sample.data` holds the original bytes
    columns: tuple[str, ...] = ()  # more columns of `Sample.row`, where there; `*` as in file names

    def reads(self, column: str) -> bool:
        """Whether `columns` names it."""
        return any(fnmatchcase(column, pattern) for pattern in self.columns)


@dataclass(frozen=True)
class Sample:
    """One image as annotators see it."""

    id: str
    row: dict[str, Any]  # the core columns of schema.CORE but `image`
    image: Image.Image | None = None  # upright sRGB, mode RGB, stored resolution
    alpha: Image.Image | None = None  # upright, mode L; None where the image is opaque
    data: bytes | None = None
    attempt: int = 0  # how often --retry-failed came by before; for columns with a field `attempt`


class Annotator(Protocol):
    """One model or rule that fills one struct column."""

    columns: pa.Schema  # fields of the struct, without `error`, which the loop adds
    pixels: PixelNeeds
    fingerprint: str  # name, version, options, model revision or weights hash
    batch_size: int
    is_thread_safe: bool  # True: pure CPU work, called from several decode threads at once

    def annotate(self, batch: Sequence[Sample]) -> pa.RecordBatch:
        """One row per sample, in their order, with `columns` as schema.

        An exception fails the batch; the loop then tries its samples one by one, and stores the
        message in the `error` of those that fail alone. Where that would be dear, the batch may
        have one more column, `error`, with a message for each sample that failed.
        """
        ...


@runtime_checkable
class Foreseeing(Protocol):
    """An annotator that says what a run will take before it starts."""

    def foresee(self, count: int) -> None:
        """Tell people of `count` images what they will cost; a UserError stops the run."""
        ...


@dataclass
class ColumnReport:
    """What happened to one column."""

    column: str
    done: int = 0
    skipped: int = 0
    failed: int = 0
    images_per_second: float = 0.0
    first_error: str = ""


COMMIT_SECONDS = 60.0
_TOO_MANY_FAILED = 0.2


def annotate(
    table: PhotoTable,
    annotators: Mapping[str, Annotator],
    *,
    redo: bool = False,
    retry_failed: bool = False,
    where: str | None = None,
    batch_size: int | None = None,
    commit_seconds: float = COMMIT_SECONDS,
) -> list[ColumnReport]:
    """Fill the columns of some annotators for every image that has no value there yet.

    Each image is decoded once for all of them. What is finished is committed at most once a minute
    and at the end, so a kill loses that minute at most; running it again does just the rest.

    Args:
        annotators: column name → annotator.
        redo: forget what the columns hold.
        retry_failed: also try again where an earlier attempt ended in an error, or where the
            fold `caption_check` has flagged a caption of that column.
        where: SQL predicate, to annotate only some images.
        batch_size: samples per call, in place of each annotator's own.

    Raises:
        UserError: a column holds results of other options, or a fifth of the images failed.
    """
    with table.writer():
        table.refresh()
        for column, annotator in annotators.items():
            table.ensure_annotator(column, annotator.columns, annotator.fingerprint, redo=redo)
        run = _Run(table, annotators, retry_failed, where, batch_size, commit_seconds)
        run.work_through()
        for column in annotators:
            table.finish_redo(column)
        return list(run.reports.values())


class _Run:
    """One pass over a table."""

    def __init__(
        self,
        table: PhotoTable,
        annotators: Mapping[str, Annotator],
        retry_failed: bool,
        where: str | None,
        batch_size: int | None,
        commit_seconds: float,
    ) -> None:
        self.table = table
        self.annotators = annotators
        self.batch_size = batch_size
        self.commit_seconds = commit_seconds
        self.reports = {column: ColumnReport(column) for column in annotators}
        self.results = Results(table, list(annotators), retry_failed)
        self.open_in = {
            column: _open_predicate(table, column, retry_failed) for column in annotators
        }
        any_open = " OR ".join(f"({predicate})" for predicate in self.open_in.values())
        self.where = f"reject_ingest IS NULL AND ({any_open})"
        if where:
            self.where += f" AND ({where})"

    def work_through(self) -> None:
        """Annotate every open row and commit."""
        total = self.table.count(self.where)
        for column, report in self.reports.items():
            predicate = f"reject_ingest IS NULL AND NOT ({self.open_in[column]})"
            report.skipped = self.table.count(predicate)
        if not total:
            return
        for column, annotator in self.annotators.items():
            if isinstance(annotator, Foreseeing):
                annotator.foresee(self.table.count(f"{self.where} AND ({self.open_in[column]})"))
        started = last_commit = time.monotonic()
        names = ", ".join(self.annotators)
        try:
            with progress(names, total) as bar, closing(self._batches()) as batches:
                for fragment_id, outcomes in batches:
                    self._take_in(fragment_id, outcomes)
                    bar.advance(len(outcomes))
                    if time.monotonic() - last_commit >= self.commit_seconds:
                        self.results.commit()
                        last_commit = time.monotonic()
        finally:
            self.results.commit()
        seconds = max(time.monotonic() - started, 1e-9)
        for report in self.reports.values():
            report.images_per_second = round((report.done + report.failed) / seconds, 2)

    def _take_in(self, fragment_id: int, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            for column, value in outcome.values.items():
                report = self.reports[column]
                if value["error"] is None:
                    report.done += 1
                else:
                    report.failed += 1
                    report.first_error = report.first_error or f"{outcome.id}: {value['error']}"
        self.results.add(fragment_id, outcomes)
        for report in self.reports.values():
            tried = report.done + report.failed
            if report.failed > max(20, _TOO_MANY_FAILED * tried):
                raise UserError(
                    f"{report.column}: {report.failed} of {tried} images failed, so something is "
                    f"wrong with more than a few files; the first: {report.first_error}",
                    "What is done is kept. Mend it, then run again with --retry-failed.",
                )

    def _batches(self) -> Generator[tuple[int, list[Outcome]], None, None]:
        """Results in table order, a few chunks ahead of the reader at most."""
        workers = max(1, os.cpu_count() or 1)
        waiting: deque[tuple[int, Future[_Chunk]]] = deque()
        with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
            try:
                for fragment_id, rows in self._chunks():
                    waiting.append((fragment_id, pool.submit(self._in_thread, rows)))
                    if len(waiting) > workers + 1:
                        yield self._in_turn(*waiting.popleft())
                while waiting:
                    yield self._in_turn(*waiting.popleft())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _chunks(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        size = self.batch_size or max(a.batch_size for a in self.annotators.values())
        needs_image = any(a.pixels.pixels or a.pixels.data for a in self.annotators.values())
        columns = {name: name for name in CORE.names if name != "image" or needs_image}
        needs = [a.pixels for a in self.annotators.values()]
        more = [name for name in self.table.columns() if any(need.reads(name) for need in needs)]
        columns |= {name: name for name in more}
        for column, predicate in self.open_in.items():
            columns[f"open {column}"] = predicate
            if _counts_attempts(self.annotators[column]):
                columns[f"attempt {column}"] = f"{column}.attempt"
        for fragment in self.table.dataset.get_fragments():
            scanner = fragment.scanner(columns=columns, filter=self.where, batch_size=size)
            for batch in scanner.to_batches():
                if batch.num_rows:
                    yield fragment.fragment_id, batch.to_pylist()

    def _in_thread(self, rows: list[dict[str, Any]]) -> _Chunk:
        """Decode, and run the annotators that need no turn of their own."""
        outcomes = [
            Outcome(row["id"], _open_columns(row, self.annotators), _attempts(row)) for row in rows
        ]
        samples: list[Sample | None] = []
        for row, outcome in zip(rows, outcomes, strict=True):
            try:
                samples.append(_sample(row, outcome, self.annotators))
            except DataError as error:
                samples.append(None)
                for column, annotator in self.annotators.items():
                    if column in outcome.open:
                        attempt = outcome.attempts.get(column, 0)
                        outcome.values[column] = _failure(annotator, str(error), attempt)
        chunk = _Chunk(outcomes, samples)
        for column, annotator in self.annotators.items():
            if annotator.is_thread_safe:
                self._run(column, annotator, chunk)
        return chunk

    def _in_turn(self, fragment_id: int, future: Future[_Chunk]) -> tuple[int, list[Outcome]]:
        chunk = future.result()
        for column, annotator in self.annotators.items():
            if not annotator.is_thread_safe:
                self._run(column, annotator, chunk)
        return fragment_id, chunk.outcomes

    def _run(self, column: str, annotator: Annotator, chunk: _Chunk) -> None:
        todo = [
            (outcome, replace(sample, attempt=outcome.attempts.get(column, 0)))
            for outcome, sample in zip(chunk.outcomes, chunk.samples, strict=True)
            if sample is not None and column in outcome.open
        ]
        size = self.batch_size or annotator.batch_size
        for start in range(0, len(todo), size):
            part = todo[start : start + size]
            values = _values(annotator, [sample for _, sample in part])
            for (outcome, _), value in zip(part, values, strict=True):
                outcome.values[column] = value


@dataclass
class _Chunk:
    outcomes: list[Outcome]
    samples: list[Sample | None]  # None: the image did not open


def _open_predicate(table: PhotoTable, column: str, retry_failed: bool) -> str:
    if not retry_failed:
        return f"{column} IS NULL"
    predicate = f"{column} IS NULL OR {column}.error IS NOT NULL"
    if table.has("caption_check"):
        flagged = f"array_has(caption_check.columns, '{column}')"
        predicate += f" OR coalesce({flagged}, false)"
    return predicate


def _counts_attempts(annotator: Annotator) -> bool:
    return "attempt" in annotator.columns.names


def _attempts(row: dict[str, Any]) -> dict[str, int]:
    """Number of the attempt that comes now, from 0; takes the stored ones out of the row."""
    names = [name for name in row if name.startswith("attempt ")]
    stored = {name.removeprefix("attempt "): row.pop(name) for name in names}
    return {column: 0 if value is None else value + 1 for column, value in stored.items()}


def _open_columns(row: dict[str, Any], annotators: Mapping[str, Annotator]) -> frozenset[str]:
    return frozenset(column for column in annotators if row.pop(f"open {column}"))


def _sample(row: dict[str, Any], outcome: Outcome, annotators: Mapping[str, Annotator]) -> Sample:
    """Decode one image as far as the annotators that still want it need.

    Raises:
        DataError: the file is gone or does not open.
    """
    needs = [a.pixels for column, a in annotators.items() if column in outcome.open]
    image = alpha = data = None
    if any(need.pixels or need.data for need in needs):
        data = original_bytes(row)
    if any(need.pixels for need in needs):
        from sdprep.images import open_image

        assert data is not None
        # An animation is in the table only if its first frame was asked for at ingest.
        opened = open_image(data, first_frame=True)
        image, alpha = opened.image, opened.alpha
    row = {name: value for name, value in row.items() if name != "image"}
    return Sample(id=row["id"], row=row, image=image, alpha=alpha, data=data)


def _values(annotator: Annotator, samples: list[Sample]) -> list[dict[str, Any]]:
    """Results of one batch; when it fails, of its samples one by one."""
    try:
        batch = annotator.annotate(samples)
    except UserError:
        raise  # a missing extra or a wrong model concerns every image, not this one
    except Exception as error:
        if len(samples) == 1:
            return [_failure(annotator, f"{type(error).__name__}: {error}", samples[0].attempt)]
        return [_values(annotator, [sample])[0] for sample in samples]
    assert batch.num_rows == len(samples), "one row per sample"
    names = annotator.columns.names
    assert batch.schema.names in (names, [*names, "error"]), "the declared columns"
    return [{"error": None, **row} for row in batch.to_pylist()]


def _failure(annotator: Annotator, message: str, attempt: int) -> dict[str, Any]:
    values: dict[str, Any] = dict.fromkeys(annotator.columns.names)
    if _counts_attempts(annotator):
        values["attempt"] = attempt
    return {**values, "error": message}
