"""The small columns that tell who is on which side, from a table or from a published folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdprep.errors import DataError
from sdprep.schema import SPLITS
from sdprep.strata import StratumColumns
from sdprep.table import PhotoTable

NO_SIDE = ""


@dataclass(frozen=True)
class SplitRows:
    """Images that nobody rejects, in any order.

    Args:
        ids: hex.
        groups: name of each image's duplicate group; its own id where none is known.
        splits: train, validation, or empty for an image without a side.
        signatures: (n, 16) uint8; all zero where there is none.
        has_signature: (n,) bool.
        stable: (n,) bool, marked `stable_train`.
        strata: name of each image's stratum, or None if they are not known here.
    """

    ids: list[str]
    groups: list[str]
    splits: list[str]
    signatures: np.ndarray
    has_signature: np.ndarray
    stable: np.ndarray
    strata: list[str] | None = None


def table_rows(table: PhotoTable, strata: StratumColumns | None) -> SplitRows:
    """The kept rows of a table."""
    optional = ("group_id", "split", "signature", "stable_train")
    names = ["id", *(name for name in optional if table.has(name))]
    names += [name for name in (strata.columns if strata else []) if name not in names]
    found = table.kept(names)
    return rows_of(found, None, strata.names(found) if strata else None)


def published_rows(folder: Path) -> SplitRows:
    """All rows of a published folder, Parquet or Lance; images are not read.

    Raises:
        DataError: it holds no train or validation files.
    """
    parts = [(split, part) for split in SPLITS for part in _files(folder, split)]
    if not parts:
        raise DataError(
            f"{folder} holds no data of a split",
            "Expected data/train-*.parquet and data/validation-*.parquet, or train.lance.",
        )
    splits, tables = [], []
    for split, part in parts:
        rows = _small_columns(part)
        tables.append(rows)
        splits += [split] * rows.num_rows
    return rows_of(pa.concat_tables(tables), splits)


def _files(folder: Path, split: str) -> Iterator[Path]:
    for place in (folder, folder / "data"):
        yield from sorted(place.glob(f"{split}-*.parquet"))
        yield from sorted(place.glob(f"{split}.lance"))


_SMALL = {
    "id": pa.string(),
    "group_id": pa.string(),
    "signature": pa.binary(),
    "stable_train": pa.bool_(),
}


def _small_columns(part: Path) -> pa.Table:
    if part.suffix == ".lance":
        import lance

        dataset = lance.dataset(str(part))
        names = [name for name in _SMALL if name in dataset.schema.names]
        rows = dataset.to_table(columns=names)
    else:
        import pyarrow.parquet as pq

        names = [name for name in _SMALL if name in pq.read_schema(part).names]
        rows = pq.read_table(part, columns=names, partitioning=None)
    if "id" not in names:
        raise DataError(f"{part} has no column id; it was not published by sdprep")
    return pa.table(
        {
            name: rows[name].cast(type_) if name in names else pa.nulls(rows.num_rows, type_)
            for name, type_ in _SMALL.items()
        }
    )


def rows_of(
    found: pa.Table, splits: list[str] | None, strata: list[str] | None = None
) -> SplitRows:
    """Take the columns apart.

    Args:
        found: `id`, and what there is of `group_id`, `split`, `signature`, `stable_train`.
        splits: sides that take the place of the column `split`.
        strata: names of the strata, where they are known.
    """
    ids = found["id"]
    groups = pc.coalesce(found["group_id"], ids) if "group_id" in found.column_names else ids
    if splits is None:
        there = "split" in found.column_names
        sides = pc.fill_null(found["split"], NO_SIDE).to_pylist() if there else None
        splits = sides or [NO_SIDE] * found.num_rows
    signatures, has_signature = _signatures(found)
    stable = np.zeros(found.num_rows, bool)
    if "stable_train" in found.column_names:
        stable = pc.fill_null(found["stable_train"], False).to_numpy().astype(bool)
    return SplitRows(
        ids.to_pylist(), groups.to_pylist(), splits, signatures, has_signature, stable, strata
    )


def _signatures(found: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    if "signature" not in found.column_names:
        return np.zeros((found.num_rows, 16), np.uint8), np.zeros(found.num_rows, bool)
    column = found["signature"].cast(pa.binary())
    filled = pc.fill_null(column, bytes(16))
    joined = b"".join(filled.to_pylist())
    if len(joined) != 16 * found.num_rows:
        raise DataError("a signature is not 16 bytes long: this is no signature of sdprep")
    has_signature = np.asarray(column.is_valid().combine_chunks().to_numpy(zero_copy_only=False))
    return np.frombuffer(joined, np.uint8).reshape(-1, 16), has_signature.astype(bool)
