"""The Lance table: one row per image, the data is the checkpoint.

One process writes at a time. Annotator columns are nullable structs where NULL means "still to do";
folds rewrite their own columns whole. Rows never move and curation deletes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from sdprep.commits import commit_updates
from sdprep.errors import DataError, UserError, nearest
from sdprep.journal import Journal
from sdprep.lance_folder import has_version, is_unborn
from sdprep.lock import WriterLock
from sdprep.schema import CORE, FOLDS, REJECT_STAGES, SCHEMA_VERSION
from sdprep.stored_images import StoredOrder

if TYPE_CHECKING:
    import lance

FINGERPRINT = "fingerprint"


class PhotoTable:
    """One data set under curation, in a folder that ends in `.lance`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lock = WriterLock(self.path.with_suffix(".lock"))
        self.touched: set[str] = set()  # columns changed since the last stage was tagged
        self._dataset: lance.LanceDataset | None = None
        self._index: StoredOrder | None = None

    # --- opening ------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | Path, *, create: bool = False) -> PhotoTable:
        """Open a table, or make an empty one.

        Raises:
            DataError: it is missing, is no sdprep table, or has another schema version.
        """
        table = cls(path)
        if table.path.suffix != ".lance":
            raise DataError(f"{path} is no table name", "A table is a folder that ends in .lance.")
        if not has_version(table.path):
            if not create:
                raise DataError(
                    f"there is no table {path}", f"Make one with: sdprep ingest PHOTOS {path}"
                )
            table._create()
        table._check_version()
        return table

    def _create(self) -> None:
        import lance

        if self.path.exists() and not is_unborn(self.path):
            raise DataError(f"{self.path} exists and is no table", "Choose another name.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _check_hard_links(self.path.parent)
        with self.writer():
            if not has_version(self.path):
                self._dataset = lance.write_dataset(CORE.empty_table(), str(self.path))

    def _check_version(self) -> None:
        found = json.loads((self.schema.metadata or {}).get(b"sdprep", b"{}"))
        version = found.get("schema_version")
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{self.path} has schema version {version}, expected {SCHEMA_VERSION}",
                "It was made by another program or release of sdprep.",
            )

    @property
    def dataset(self) -> lance.LanceDataset:
        """The newest version, as this process knows it."""
        if self._dataset is None:
            import lance

            self._dataset = lance.dataset(str(self.path))
        return self._dataset

    def refresh(self) -> None:
        """Forget what is known and read the newest version."""
        self._dataset = None

    def writer(self) -> AbstractContextManager[None]:
        """The right to write; see `WriterLock.hold`."""
        return self.lock.hold()

    def journal(self) -> Journal:
        """What people did by hand."""
        return Journal(self.path.with_suffix(".journal.jsonl"))

    # --- reading ------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Number of the newest version."""
        return self.dataset.version

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema with field metadata."""
        return self.dataset.schema

    def columns(self) -> list[str]:
        """Names of all columns."""
        return self.schema.names

    def has(self, column: str) -> bool:
        """Whether there is such a column."""
        return column in self.schema.names

    def count(self, where: str | None = None) -> int:
        """Number of rows that match a predicate.

        Raises:
            UserError: the predicate does not parse or names no column.
        """
        with self._predicate(where):
            return self.dataset.count_rows(where)

    def read(self, columns: Sequence[str], where: str | None = None) -> pa.Table:
        """Some columns in order of arrival; `score_technical.score` reads one field of a struct.

        Raises:
            DataError: there is no such column.
            UserError: the predicate does not parse or names no column.
        """
        self._require(columns)
        wanted = {name: name for name in [*columns, "ordinal"]}
        with self._predicate(where):
            rows = self.dataset.to_table(columns=wanted, filter=where)
        ordinals = rows["ordinal"].to_numpy()
        if len(ordinals) > 1 and (ordinals[1:] < ordinals[:-1]).any():
            rows = rows.take(pc.sort_indices(rows["ordinal"]))
        return rows.select(list(columns))

    def kept(self, columns: Sequence[str]) -> pa.Table:
        """`read` of the rows that no stage has rejected."""
        return self.read(columns, self.kept_predicate())

    def kept_predicate(self, *, without: str | None = None) -> str:
        """SQL for "no stage has rejected it", leaving one stage's own reason out of account."""
        stages = [stage for stage in REJECT_STAGES if stage != without]
        names = [f"reject_{stage}" for stage in stages if self.has(f"reject_{stage}")]
        return " AND ".join(f"{name} IS NULL" for name in names)

    def image_bytes(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Original bytes of some images, embedded or linked.

        Raises:
            DataError: an id is unknown or rejected, or a linked file is gone or has changed.
        """
        if not ids:
            return {}
        if self._index is None or self._index.version != self.version:
            self._index = StoredOrder(self.dataset)
        return self._index.image_bytes(self.dataset, ids)

    def notes(self, column: str) -> dict[str, str]:
        """What was written down about a column: its fingerprint or certificate."""
        if not self.has(column):
            return {}
        metadata = self.schema.field(column).metadata or {}
        return {key.decode(): value.decode() for key, value in metadata.items()}

    def _require(self, columns: Sequence[str]) -> None:
        known = self.columns()
        for name in columns:
            root = name.split(".")[0]
            if root not in known:
                near = nearest(root, known)
                hint = f"Did you mean {near}?" if near else f"There are: {', '.join(known)}."
                raise DataError(f"{self.path} has no column {root}", hint)

    @contextmanager
    def _predicate(self, where: str | None) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if where is None or "Invalid user input" not in str(error):
                raise
            reason = re.sub(r",? \S*/rust/\S+", "", str(error)).removeprefix("Invalid user input: ")
            raise UserError(
                f"cannot use the predicate {where!r}: {reason}",
                f"Columns: {', '.join(self.columns())}",
            ) from None

    # --- writing ------------------------------------------------------------------------------

    def add_images(self, rows: pa.Table) -> None:
        """Append rows of `schema.CORE`; `ordinal` is assigned here, in the order given.

        Raises:
            ValueError: an id stands there already.
        """
        import lance

        self._must_hold_lock()
        if not rows.num_rows:
            return
        first = self.dataset.count_rows()
        ordinals = pa.array(range(first, first + rows.num_rows), pa.int64())
        named = {name: rows[name] for name in CORE.names if name != "ordinal"}
        rows = pa.table({**named, "ordinal": ordinals}).select(CORE.names).cast(CORE)
        if first == 0:
            # `load_dataset` looks at the first stored row to learn what a bytes column holds.
            rows = rows.take(pc.sort_indices(pc.is_null(rows["image"])))
        missing = [field for field in self.schema if field.name not in CORE.names]
        for field in missing:
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
        self._dataset = lance.write_dataset(
            rows.select(self.columns()).cast(self.schema), self.dataset, mode="append"
        )
        self.touched.add("id")

    def update_rows(
        self, ids: Sequence[str], values: Mapping[str, pa.Array], *, reset: Sequence[str] = ()
    ) -> None:
        """Replace some columns of just these rows, and set `reset` columns to NULL there."""
        columns = {name: array.cast(self._type(name)) for name, array in values.items()}
        columns |= {name: pa.nulls(len(ids), self._type(name)) for name in reset}
        self.replace(pa.array(ids, pa.string()), columns)

    def write_fold(
        self,
        ids: Sequence[str],
        values: Mapping[str, pa.Array],
        *,
        stage: str,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Rewrite whole columns in one commit; rows not named become NULL.

        Nothing is written where nothing changes. The notes go into the field metadata of every
        column written, after the data: a kill in between leaves old notes, and running the stage
        again mends them.
        """
        self._must_hold_lock()
        types = {name: FOLDS.get(name, array.type) for name, array in values.items()}
        self.add_columns([pa.field(name, type_) for name, type_ in types.items()])
        given = pa.array(ids, pa.string())
        current = self.read(["id", *values])
        places = pc.index_in(current["id"], value_set=given)
        changed = {}
        for name, array in values.items():
            wanted = pa.chunked_array([array.cast(types[name])]).take(places)
            if wanted.combine_chunks() != current[name].combine_chunks():
                changed[name] = wanted
        self.replace(current["id"], changed)
        for name in values:
            self.write_notes(name, {"stage": stage, **(notes or {})})

    def write_notes(self, column: str, notes: Mapping[str, str]) -> None:
        """Replace what is written down about a column; nothing happens if it says so already."""
        self._must_hold_lock()
        if self.notes(column) != dict(notes):
            self.dataset.update_field_metadata({column: dict(notes)}, replace=True)
            self.refresh()
            self.touched.add(column)

    def drop_column(self, column: str) -> None:
        """Forget a column; earlier versions still hold it."""
        self._must_hold_lock()
        self.dataset.drop_columns([column])
        self.refresh()
        self.touched.add(column)

    def ensure_annotator(
        self, column: str, fields: pa.Schema, fingerprint: str, *, redo: bool = False
    ) -> None:
        """Make the nullable struct column of an annotator, or check that it is the same one.

        Raises:
            UserError: it was made with other options and `redo` is not set.
        """
        self._must_hold_lock()
        struct = pa.struct([*fields, pa.field("error", pa.string())])
        notes = self.notes(column)
        if self.has(column):
            is_same = notes.get(FINGERPRINT) == fingerprint
            is_same = is_same and self._type(column) == struct
            if is_same and (not redo or notes.get("redo") == "running"):
                return
            if not redo:
                raise UserError(
                    f"{column} was made with other options: {notes.get(FINGERPRINT)}; "
                    f"asked for: {fingerprint}",
                    'Keep both with --as NAME (recipe: as = "name"), or replace it with --redo.',
                )
            self.drop_column(column)
        metadata = {FINGERPRINT: fingerprint} | ({"redo": "running"} if redo else {})
        self.add_columns([pa.field(column, struct, metadata=metadata)])

    def finish_redo(self, column: str) -> None:
        """Say that `--redo` reached its end, so that the next one starts afresh."""
        notes = self.notes(column)
        if notes.pop("redo", None):
            self.write_notes(column, notes)

    def add_columns(self, fields: Sequence[pa.Field]) -> None:
        """Make the columns that are not there yet, all NULL."""
        self._must_hold_lock()
        new = [field for field in fields if not self.has(field.name)]
        if new:
            self.dataset.add_columns(pa.schema(new))  # metadata only: every row starts as NULL
            self.refresh()
            self.touched.update(field.name for field in new)

    def replace(
        self, ids: pa.Array | pa.ChunkedArray, values: Mapping[str, pa.Array | pa.ChunkedArray]
    ) -> None:
        """Replace columns of the rows named, over all fragments, in one commit."""
        self._must_hold_lock()
        if not values:
            return
        rows = pa.table({"id": ids, **values}).combine_chunks()
        updates = {}
        for fragment in self.dataset.get_fragments():
            present = fragment.to_table(columns=["id"])["id"].combine_chunks()
            here = rows.filter(pc.is_in(rows["id"], value_set=present))
            if here.num_rows:
                updates[fragment.fragment_id] = here
        self.commit(updates)

    def commit(self, updates: Mapping[int, pa.Table], *, only_open: bool = False) -> None:
        """Commit new values of some rows, all fragments together; see `commits.commit_updates`."""
        self._must_hold_lock()
        if updates:
            self._dataset = commit_updates(self.dataset, updates, only_open=only_open)
            for rows in updates.values():
                self.touched.update(set(rows.column_names) - {"id"})

    def _type(self, column: str) -> pa.DataType:
        self._require([column])
        return self.schema.field(column).type

    def _must_hold_lock(self) -> None:
        assert self.lock.is_held, "write methods run inside `with table.writer():`"


def _check_hard_links(folder: Path) -> None:
    """Lance commits by hard link: say so if the file system has none.

    Raises:
        DataError: it has none.
    """
    import os
    import tempfile

    with tempfile.TemporaryDirectory(prefix=".sdprep-", dir=folder) as scratch:
        file = Path(scratch) / "a"
        file.touch()
        try:
            os.link(file, Path(scratch) / "b")
        except OSError as error:
            raise DataError(
                f"{folder} is on a file system without hard links ({error.strerror})",
                "Put the table on another disk; exFAT and some network drives have none.",
            ) from None
