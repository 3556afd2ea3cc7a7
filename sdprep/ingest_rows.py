"""What a table knows of one source, and the rows about to be written for it.

Edits of rows are gathered per id and applied to what the table holds at the moment of writing, so
nothing but ids, keys and stamps is kept in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sdprep.images import NEEDS_PLUGIN
from sdprep.schema import CORE
from sdprep.table import PhotoTable

REVIVABLE = ("source_changed", "missing_file")
"""Reasons that end when a file with the row's bytes is found again."""

_FLUSH_SECONDS = 30
_FLUSH_BYTES = 256 * 2**20
_NO_TEXT: Any = object()


@dataclass(frozen=True)
class FileState:
    """One place where a row's bytes were found, and how the file looked then."""

    key: str
    num_bytes: int | None
    mtime_ns: int | None


@dataclass
class _Edit:
    found: dict[str, FileState] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)  # keys that hold other bytes now
    path: str | None = None
    text: Any = _NO_TEXT
    row: dict[str, Any] | None = None  # a rejected row that is an image after all
    is_gone: bool = False


class RowBook:
    """Known rows, pending new ones and pending edits, for one source.

    Args:
        table: open, its writer lock held.
        source: the source's name in the table.
        min_side: as asked for now: smaller images rejected earlier may pass.
        first_frame: as asked for now.
        locate: where the file of a key lies, or None for sources without files.
    """

    def __init__(
        self,
        table: PhotoTable,
        source: str,
        *,
        min_side: int,
        first_frame: bool,
        locate: Callable[[str], Path | None],
    ) -> None:
        self.table, self.source, self.locate = table, source, locate
        self.reasons: dict[str, str | None] = {}
        self.stamps: dict[str, str] = {}
        self.superseded: list[str] = []  # keys whose former bytes are nowhere any more
        self._files: dict[str, list[tuple[str, FileState]]] = {}
        self._reopened: set[str] = set()
        self._new: dict[str, dict[str, Any]] = {}
        self._edits: dict[str, _Edit] = {}
        self._pending_bytes = 0
        self._last_flush = time.monotonic()
        self._read(min_side, first_frame)

    def _read(self, min_side: int, first_frame: bool) -> None:
        columns = ["id", "reject_ingest", "width", "height", "sources", "text.stamp"]
        rows = self.table.read([*columns, "num_bytes", "image_uri"])
        ids, reasons = rows["id"].to_pylist(), rows["reject_ingest"].to_pylist()
        self.reasons = dict(zip(ids, reasons, strict=True))
        self.num_linked = len(rows) - rows["image_uri"].null_count
        small = pc.min_element_wise(rows["width"], rows["height"]).to_pylist()
        for id_, reason, side in zip(ids, reasons, small, strict=True):
            if reason and _is_reopened(reason, side, min_side, first_frame):
                self._reopened.add(id_)
        for id_, stamp in zip(ids, rows["text.stamp"].to_pylist(), strict=True):
            if stamp is not None:
                self.stamps[id_] = stamp
        self._read_files(ids, rows["sources"].combine_chunks())
        own = {id_ for files in self._files.values() for id_, _ in files}
        sizes = zip(ids, rows["num_bytes"].to_pylist(), strict=True)
        self.foreign_bytes = sum(size or 0 for id_, size in sizes if id_ not in own)

    def _read_files(self, ids: list[str], sources: pa.ListArray) -> None:
        entries = pa.table(
            {
                "row": pc.list_parent_indices(sources),
                **dict(
                    zip(sources.type.value_type.names, sources.flatten().flatten(), strict=True)
                ),
            }
        ).filter(pc.field("source") == self.source)
        columns = [entries[name].to_pylist() for name in ("row", "key", "num_bytes", "mtime_ns")]
        for row, key, num_bytes, mtime_ns in zip(*columns, strict=True):
            place = (ids[row], FileState(key, num_bytes, mtime_ns))
            self._files.setdefault(key, []).append(place)

    # --- asking -------------------------------------------------------------------------------

    def keys(self) -> list[str]:
        """Every key of this source that stands in the table."""
        return list(self._files)

    def trusted(self, key: str, num_bytes: int | None, mtime_ns: int | None) -> str | None:
        """The id of a file that looks as it did when it was hashed, or None to look again."""
        if num_bytes is None or mtime_ns is None:
            return None
        for id_, state in self._files.get(key, ()):
            is_same = (state.num_bytes, state.mtime_ns) == (num_bytes, mtime_ns)
            if is_same and self.is_settled(id_) and self.reasons[id_] not in REVIVABLE:
                return id_
        return None

    def is_settled(self, id_: str) -> bool:
        """Whether the table's verdict on these bytes still stands, so they need no decoding."""
        return id_ in self.reasons and id_ not in self._reopened

    # --- changing -----------------------------------------------------------------------------

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, or give an earlier rejected one its image. `row` has the fields of CORE."""
        id_ = row["id"]
        before = self.reasons.get(id_)
        self.reasons[id_] = row["reject_ingest"]
        self._pending_bytes += len(row["image"] or b"")
        if id_ in self._reopened:
            self._reopened.discard(id_)
            if row["reject_ingest"] != before:
                self._edit(id_).row = row
        else:
            self._new[id_] = {**row, "sources": []}

    def place(self, id_: str, state: FileState, path: str | None) -> None:
        """Note that the file `state.key` holds the bytes `id_` now."""
        for old_id, _ in self._files.get(state.key, ()):
            if old_id != id_ and self.reasons[old_id] not in REVIVABLE:
                self._edit(old_id).lost.add(state.key)
        if id_ in self._new:
            self._new[id_]["sources"].append(self._entry(state))
        else:
            edit = self._edit(id_)
            edit.found[state.key], edit.path = state, edit.path or path
            if self.reasons[id_] in REVIVABLE:
                self.reasons[id_] = None

    def set_text(self, id_: str, text: dict[str, Any] | None) -> bool:
        """Replace a row's text; True if the row stood there before this run."""
        if id_ in self._new:
            self._new[id_]["text"] = text
            return False
        self._edit(id_).text = text
        return True

    def lose(self, keys: list[str]) -> None:
        """Note files that are not in the source any more; linked rows then have no pixels."""
        for key in keys if self.num_linked else ():
            for id_, _ in self._files[key]:
                if self.reasons[id_] is None:
                    self._edit(id_).is_gone = True

    def _edit(self, id_: str) -> _Edit:
        return self._edits.setdefault(id_, _Edit())

    def _entry(self, state: FileState) -> dict[str, Any]:
        size = {"num_bytes": state.num_bytes, "mtime_ns": state.mtime_ns}
        return {"source": self.source, "key": state.key, **size}

    # --- writing ------------------------------------------------------------------------------

    @property
    def is_due(self) -> bool:
        """Whether enough has gathered: a minute of work at most is ever at stake."""
        # Fragments grow with the table, so that a large one does not end up in crumbs.
        limit = max(1024, min(65_536, len(self.reasons) // 8))
        is_old = time.monotonic() - self._last_flush > _FLUSH_SECONDS
        is_large = len(self._new) >= limit or self._pending_bytes >= _FLUSH_BYTES
        return is_large or is_old or len(self._edits) >= 65_536

    def flush(self) -> None:
        """Write what is pending: new rows in one commit, edits in at most three more."""
        if self._new:
            rows = list(self._new.values())
            fields = [item for item in CORE if item.name != "ordinal"]
            self.table.add_images(pa.Table.from_pylist(rows, schema=pa.schema(fields)))
            self._new = {}
        if self._edits:
            self._write_edits()
            self._edits = {}
        self._pending_bytes = 0
        self._last_flush = time.monotonic()

    def _write_edits(self) -> None:
        columns = ["id", "image_uri", "sources", "text", "reject_ingest"]
        groups: dict[str, list[dict[str, Any]]] = {"plain": [], "text": [], "image": []}
        for row in self._rows(columns):
            edit = self._edits[row["id"]]
            new = self._applied(row, edit)
            if edit.row is not None:
                groups["image"].append({**edit.row, **new})
            elif new != row:
                groups["plain" if new["text"] == row["text"] else "text"].append(new)
        sidecars = [name for name in self.table.columns() if name.startswith("tags_sidecar")]
        for kind, rows in groups.items():
            if rows:
                self._update(rows, sidecars if kind == "text" else [])

    def _rows(self, columns: list[str]) -> list[dict[str, Any]]:
        if len(self._edits) <= 1000:
            quoted = ", ".join(f"'{id_}'" for id_ in self._edits)
            return self.table.read(columns, f"id IN ({quoted})").to_pylist()
        rows = self.table.read(columns)
        wanted = pa.array(list(self._edits), pa.string())
        return rows.filter(pc.is_in(rows["id"], value_set=wanted)).to_pylist()

    def _update(self, rows: list[dict[str, Any]], reset: list[str]) -> None:
        names = [name for name in rows[0] if name not in ("id", "ordinal")]
        values = {
            name: pa.array([row[name] for row in rows], CORE.field(name).type) for name in names
        }
        self.table.update_rows([row["id"] for row in rows], values, reset=reset)

    def _applied(self, row: dict[str, Any], edit: _Edit) -> dict[str, Any]:
        """One row after its edit.

        A photo that was edited in place is another photo: the row of its former bytes keeps its
        last source for the record, and is rejected as `source_changed`.
        """
        sources = [self._entry_after(entry, edit) for entry in row["sources"]]
        known = {entry["key"] for entry in row["sources"] if entry["source"] == self.source}
        sources += [self._entry(s) for key, s in edit.found.items() if key not in known]
        remaining = [entry for entry in sources if entry is not None]
        new = {**row, "sources": remaining or row["sources"]}
        if edit.text is not _NO_TEXT:
            new["text"] = edit.text
        if edit.row is not None:
            return {**new, "reject_ingest": edit.row["reject_ingest"], **_linked(edit.row)}
        if not remaining:
            new["reject_ingest"] = row["reject_ingest"] or "source_changed"
        elif edit.found and row["reject_ingest"] in REVIVABLE:
            new["reject_ingest"] = None
        if row["image_uri"] is not None:
            self._relink(new, edit)
        if new["reject_ingest"] == "source_changed" and row["reject_ingest"] is None:
            self.superseded += sorted(edit.lost)
        self.reasons[row["id"]] = new["reject_ingest"]
        return new

    def _entry_after(self, entry: dict[str, Any], edit: _Edit) -> dict[str, Any] | None:
        if entry["source"] != self.source:
            return entry
        if entry["key"] in edit.found:
            return self._entry(edit.found[entry["key"]])
        return None if entry["key"] in edit.lost else entry

    def _relink(self, new: dict[str, Any], edit: _Edit) -> None:
        """Point a linked row at a file that still holds its bytes, or reject it."""
        own = [entry for entry in new["sources"] if entry["source"] == self.source]
        located = [self.locate(entry["key"]) for entry in own if entry["key"] not in edit.lost]
        candidates = [new["image_uri"], edit.path, *(str(path) for path in located if path)]
        states = {(entry["num_bytes"], entry["mtime_ns"]) for entry in new["sources"]}
        for path in candidates:
            if path is not None and _looks_like(path) in states:
                new["image_uri"] = path
                return
        if new["reject_ingest"] is None:
            new["reject_ingest"] = "missing_file" if edit.is_gone else "source_changed"


def _linked(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"image_uri": row["image_uri"]}


def _looks_like(path: str) -> tuple[int, int] | None:
    try:
        stat = Path(path).stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _is_reopened(reason: str, side: int | None, min_side: int, first_frame: bool) -> bool:
    """Whether an earlier rejection deserves another look under the options of this run."""
    if reason == "too_small":
        return side is None or side >= min_side
    return (reason == "animated" and first_frame) or reason.startswith(NEEDS_PLUGIN)
