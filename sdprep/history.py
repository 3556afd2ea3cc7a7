"""Finished stages of a table: tagged versions, who made them, and how to take one back.

Each stage that changed something tags its version; versions without a tag are cleaned up after an
hour. To undo the last change of a column is to write back what it held at the stage before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from sdprep.errors import UserError, nearest
from sdprep.schema import CORE
from sdprep.table import PhotoTable

_PREFIX = "stage-"


@dataclass(frozen=True)
class Stage:
    """One finished stage."""

    tag: str
    version: int
    name: str
    command: str
    columns: tuple[str, ...]  # what it changed; "id" stands for added rows
    finished: str  # ISO time, UTC
    undoes: str = ""  # tag of the stage that this one took back


@contextmanager
def stage(table: PhotoTable, name: str, command: str) -> Iterator[None]:
    """Run one stage: hold the writer lock, and at its end make it durable and tag its version.

    A stage that changes nothing leaves no trace; one that fails is recorded as stopped, with what
    it had committed.
    """
    with table.writer():
        table.refresh()
        table.touched.clear()
        started = time.time()
        try:
            yield
        except BaseException:
            name = f"{name} (stopped)"
            raise
        finally:
            if table.touched:
                _flush(table.path, since=started)
                _tag(table, name, command)
                clean_up(table)


def _tag(table: PhotoTable, name: str, command: str, undoes: str = "") -> None:
    tags = table.dataset.tags
    number = 1 + max((int(tag.removeprefix(_PREFIX)) for tag in _stage_tags(table)), default=0)
    tag = f"{_PREFIX}{number:06d}"
    tags.create(tag, table.version)
    metadata = {
        "stage": name,
        "command": command,
        "columns": ",".join(sorted(table.touched)),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    tags.replace_metadata(tag, metadata | ({"undoes": undoes} if undoes else {}))


def _stage_tags(table: PhotoTable) -> list[str]:
    return [tag for tag in table.dataset.tags.list() if tag.startswith(_PREFIX)]


def history(table: PhotoTable) -> list[Stage]:
    """Finished stages, oldest first."""
    table.refresh()
    found = table.dataset.tags.list()
    stages = []
    for tag in sorted(_stage_tags(table)):
        metadata = found[tag]["metadata"]
        columns = metadata.get("columns", "")
        stages.append(
            Stage(
                tag=tag,
                version=found[tag]["version"],
                name=metadata.get("stage", "?"),
                command=metadata.get("command", ""),
                columns=tuple(columns.split(",")) if columns else (),
                finished=metadata.get("finished", ""),
                undoes=metadata.get("undoes", ""),
            )
        )
    return stages


def undo(table: PhotoTable, column: str | None = None) -> Stage:
    """Take back the last change of one column, or the whole last stage.

    Nobody's later work in another column is touched.

    Returns:
        the stage that was taken back.

    Raises:
        UserError: nothing is left to undo, or rows would have to go that later stages built on.
    """
    with table.writer():
        table.refresh()
        table.touched.clear()
        started = time.time()
        stages = history(table)
        undone = _undone(stages)
        live = [s for s in stages if not s.undoes and (s.tag, column or "") not in undone]
        live = [s for s in live if column is None or column in s.columns]
        if column is None:
            live = [s for s in live if any((s.tag, name) not in undone for name in s.columns)]
        if not live:
            raise UserError(*_nothing_to_undo(table, stages, column))
        last = live[-1]
        before = _version_before(stages, last)
        names = (column,) if column else last.columns
        names = tuple(name for name in names if (last.tag, name) not in undone)
        if "id" in names:
            _remove_added_rows(table, stages, undone, last, before)
        for name in names:
            if name != "id":
                _restore(table, name, before)
        table.touched.update(names)
        _flush(table.path, since=started)
        _tag(table, f"undo {last.name}", f"undo {column or ''}".strip(), undoes=last.tag)
        return last


def _undone(stages: list[Stage]) -> set[tuple[str, str]]:
    """(stage tag, column) pairs that were taken back already."""
    return {(s.undoes, name) for s in stages if s.undoes for name in s.columns}


def _nothing_to_undo(table: PhotoTable, stages: list[Stage], column: str | None) -> tuple[str, str]:
    if column is None:
        return f"{table.path} has no stage to undo", ""
    known = sorted({name for s in stages for name in s.columns} - {"id"})
    near = nearest(column, known)
    hint = f"Did you mean {near}? " if near and near != column else ""
    return f"no stage changed {column}", f"{hint}There are: {', '.join(known) or 'none'}."


def _version_before(stages: list[Stage], last: Stage) -> int | None:
    earlier = [s.version for s in stages if s.tag < last.tag]
    return earlier[-1] if earlier else None


def _old_rows(table: PhotoTable, version: int | None, columns: list[str]) -> pa.Table | None:
    """Columns as they were at a version; None if one did not exist."""
    import lance

    if version is None:
        return None
    old = lance.dataset(str(table.path), version=version)
    if any(name not in old.schema.names for name in columns):
        return None
    return old.to_table(columns=columns)


def _restore(table: PhotoTable, column: str, version: int | None) -> None:
    import lance

    old = _old_rows(table, version, ["id", column])
    if old is None:
        if column in CORE.names:
            return  # the rows it belonged to are gone
        if table.has(column):
            table.drop_column(column)
        return
    field = lance.dataset(str(table.path), version=version).schema.field(column)
    now = table.schema.field(column) if table.has(column) else None
    if now is None or now.type != field.type:
        if now is not None:
            table.drop_column(column)
        table.add_columns([field])
    ids = table.read(["id"])["id"]
    places = pc.index_in(ids, value_set=old["id"].combine_chunks())
    table.replace(ids, {column: old[column].take(places)})
    metadata = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
    table.write_notes(column, metadata)


def _remove_added_rows(
    table: PhotoTable,
    stages: list[Stage],
    undone: set[tuple[str, str]],
    last: Stage,
    version: int | None,
) -> None:
    later = [s for s in stages if s.tag > last.tag and not s.undoes]
    if any((s.tag, name) not in undone for s in later for name in s.columns):
        raise UserError(
            f"later stages built on the images that {last.command!r} added",
            "Undo those first (sdprep history lists them), or reject the images with select.",
        )
    old = _old_rows(table, version, ["ordinal"])
    first = 0 if old is None or not old.num_rows else pc.max(old["ordinal"]).as_py() + 1
    table.dataset.delete(f"ordinal >= {first}")
    table.refresh()


def clean_up(table: PhotoTable) -> None:
    """Remove untagged versions older than an hour, with the files only they need."""
    table.dataset.cleanup_old_versions(
        older_than=timedelta(hours=1), error_if_tagged_old_versions=False
    )


def _flush(folder: Path, *, since: float) -> None:
    """Push what was written since a time to the disk itself: Lance leaves that to the system."""
    for parent, _, names in os.walk(folder):
        fresh = [name for name in names if _mtime(Path(parent, name)) >= since - 2]
        for name in fresh:
            _fsync(Path(parent, name))
        if fresh and os.name == "posix":  # Windows cannot open a folder
            _fsync(Path(parent))


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _fsync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return  # cleaned up meanwhile, or read-only: nothing of ours to flush
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
