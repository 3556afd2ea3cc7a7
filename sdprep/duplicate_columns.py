"""The columns that the search for duplicates reads, and the hash of decoded pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from sdprep.console import progress
from sdprep.duplicate_groups import Quality
from sdprep.errors import UserError
from sdprep.images import open_image
from sdprep.near_search import Views
from sdprep.schema import REJECT_STAGES
from sdprep.signatures import COLUMN, LUMA_PX, NUM_MIRRORED, NUM_UPRIGHT, THUMBNAIL_PX
from sdprep.table import PhotoTable

STORED = ("signature", "pixel_hash", "dup_id", "group_id")
SCORERS = ("preference", "aesthetic", "technical")
_DECODED_AT_ONCE = 64


@dataclass(frozen=True)
class Rows:
    """The images that ingest accepted, by id."""

    ids: list[str]
    qualities: list[Quality]
    is_live: list[bool]  # rejected by no stage but this one
    sources: list[list[dict[str, Any]] | None]
    parents: list[str | None]
    columns: dict[str, list[Any]]

    def stored(self, name: str) -> list[Any]:
        """What an earlier run wrote; None where it wrote nothing."""
        return self.columns.get(name) or [None] * len(self.ids)

    def names(self) -> list[str]:
        """Where each image was found first."""
        return [found[0]["key"] if found else "" for found in self.sources]


def read_rows(table: PhotoTable, score: str | None) -> Rows:
    """Read what groups and the choice of the best depend on.

    Raises:
        UserError: `score` is no column of numbers.
    """
    rejects = [f"reject_{stage}" for stage in REJECT_STAGES if stage != "duplicates"]
    rejects = [name for name in rejects if table.has(name)]
    stored = [name for name in STORED if table.has(name)]
    score = score or _default_score(table)
    wanted = ["id", "width", "height", "num_bytes", "sources", "text.parent_id", *rejects, *stored]
    rows = table.read(wanted + ([score] if score else []), "reject_ingest IS NULL")
    rows = rows.sort_by("id")
    if score and not _is_number(rows.schema.field(score).type):
        raise UserError(
            f"duplicates.score = {score} holds {rows.schema.field(score).type}, not numbers",
            "Name a field of a scorer's column, such as score_aesthetic.score.",
        )
    scores = rows[score].to_pylist() if score else [None] * rows.num_rows
    sizes = [rows[name].to_pylist() for name in ("width", "height", "num_bytes")]
    return Rows(
        rows["id"].to_pylist(),
        [_quality(*row) for row in zip(*sizes, scores, strict=True)],
        [not any(row.values()) for row in rows.select(rejects).to_pylist()]
        if rejects
        else [True] * rows.num_rows,
        rows["sources"].to_pylist(),
        rows["text.parent_id"].to_pylist(),
        {name: rows[name].to_pylist() for name in stored},
    )


def _default_score(table: PhotoTable) -> str | None:
    for scorer in SCORERS:
        column = f"score_{scorer}"
        if table.has(column) and table.schema.field(column).type.get_field_index("score") >= 0:
            return f"{column}.score"
    return None


def _is_number(type_: pa.DataType) -> bool:
    return pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_)


def _quality(
    width: int | None, height: int | None, num_bytes: int | None, score: float | None
) -> Quality:
    pixels = (width or 0) * (height or 0)
    value = float("-inf") if score is None or score != score else float(score)  # NaN: no score
    return Quality(pixels, 8 * (num_bytes or 0) / max(1, pixels), value)


def read_views(table: PhotoTable, ids: Sequence[str]) -> tuple[Views, np.ndarray]:
    """Signatures in the order of `ids`, without thumbnails, and (n,) bool: who has them.

    Images without are all zero, and unusable.
    """
    names = ("upright", "mirrored", "usable", "trim")
    paths = [f"{COLUMN}.{name}" for name in names]
    rows = table.read(["id", *paths], "reject_ingest IS NULL").sort_by("id")
    assert rows["id"].to_pylist() == list(ids)
    fields = {name: rows[path].combine_chunks() for name, path in zip(names, paths, strict=True)}
    has_views = np.array(fields["upright"].is_valid(), bool)

    def array(name: str, dtype: str, *shape: int) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        data = b"".join(value or bytes(size) for value in fields[name].to_pylist())
        return np.frombuffer(data, dtype).reshape(len(ids), *shape)

    trim = array("trim", "<u2", 4).astype(int)
    trim[~has_views] = (0, 0, LUMA_PX, LUMA_PX)
    bits = fields["usable"].fill_null(0).to_numpy()
    views = Views(
        array("upright", "u1", NUM_UPRIGHT, 16),
        array("mirrored", "u1", NUM_MIRRORED, 16),
        (bits[:, None] >> np.arange(NUM_UPRIGHT)) & 1 == 1,
        trim,
        np.empty((0, THUMBNAIL_PX, THUMBNAIL_PX), np.uint8),
        _embeddings(table),
    )
    return views, has_views


def read_thumbnails(
    table: PhotoTable, ids: Sequence[str], wanted: np.ndarray
) -> dict[int, np.ndarray]:
    """(64, 64) uint8 of some images, by row of `ids`; no others are held in memory."""
    rows = {ids[row]: row for row in np.unique(wanted).tolist()}
    found: dict[int, np.ndarray] = {}
    if not rows:
        return found
    columns = {"id": "id", "thumbnail": f"{COLUMN}.thumbnail"}
    for batch in table.dataset.scanner(columns=columns, batch_size=4096).to_batches():
        for id_, data in zip(batch["id"].to_pylist(), batch["thumbnail"], strict=True):
            if id_ in rows:
                levels = np.frombuffer(data.as_py(), np.uint8)
                found[rows[id_]] = levels.reshape(THUMBNAIL_PX, THUMBNAIL_PX)
    return found


def embedding_column(table: PhotoTable) -> str | None:
    """The first column `embed_*` by name: its path, if it holds vectors of one size."""
    for name in sorted(column for column in table.columns() if column.startswith("embed_")):
        type_ = table.schema.field(name).type
        if pa.types.is_fixed_size_list(type_):
            return name
        for field in type_ if pa.types.is_struct(type_) else []:
            if pa.types.is_fixed_size_list(field.type):
                return f"{name}.{field.name}"
    return None


def _embeddings(table: PhotoTable) -> np.ndarray | None:
    """(n, d) float32, NaN where NULL; None without such a column."""
    path = embedding_column(table)
    if path is None:
        return None
    rows = table.read(["id", path], "reject_ingest IS NULL").sort_by("id")
    missing = [float("nan")] * rows.schema.field(path).type.list_size
    return np.array([row or missing for row in rows[path].to_pylist()], np.float32)


def pixel_hashes(
    table: PhotoTable,
    ids: Sequence[str],
    signatures: Sequence[bytes | None],
    known: Sequence[str | None],
) -> list[str | None]:
    """Hash of the decoded pixels where another image has the same signature; else what is known."""
    shared = Counter(signatures)
    found = list(known)
    todo = [
        row
        for row, key in enumerate(signatures)
        if key is not None and shared[key] > 1 and found[row] is None
    ]
    with progress("equal pixels", len(todo)) as bar, ThreadPoolExecutor() as pool:
        for start in range(0, len(todo), _DECODED_AT_ONCE):
            rows = todo[start : start + _DECODED_AT_ONCE]
            data = table.image_bytes([ids[row] for row in rows])
            for row, digest in zip(
                rows, pool.map(_pixel_hash, (data[ids[row]] for row in rows)), strict=True
            ):
                found[row] = digest
                bar.advance()
    return found


def _pixel_hash(data: bytes) -> str:
    """Hex of blake2b-128 over size and upright RGB8 pixels."""
    image = open_image(data, first_frame=True).image
    size = image.width.to_bytes(4, "little") + image.height.to_bytes(4, "little")
    return blake2b(size + image.tobytes(), digest_size=16).hexdigest()
