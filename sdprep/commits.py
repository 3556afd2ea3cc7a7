"""Committing new column values to a Lance table, once, whoever else commits in between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    import lance

_ATTEMPTS = 10


def commit_updates(
    dataset: lance.LanceDataset, updates: Mapping[int, pa.Table], *, only_open: bool = False
) -> lance.LanceDataset:
    """Replace columns of some rows in one commit.

    If somebody else's commit came in between, the values are applied again, fragment by fragment,
    to what is there now; nothing is computed again.

    Args:
        dataset: the version that the values were computed from.
        updates: fragment id → table of `id` and the columns to replace.
        only_open: on a conflict, keep what another writer has filled in meanwhile.
    Returns:
        the version that holds them.
    """
    try:
        return _commit_once(dataset, updates)
    except Exception as error:
        if not _is_conflict(error):
            raise
    for fragment_id, rows in updates.items():
        dataset = _commit_again(dataset, fragment_id, rows, only_open=only_open)
    return dataset


def _commit_once(
    dataset: lance.LanceDataset, updates: Mapping[int, pa.Table]
) -> lance.LanceDataset:
    import lance

    fragments: list[lance.FragmentMetadata] = []
    fields: set[int] = set()
    for fragment_id, rows in updates.items():
        fragment = fragment_of(dataset, fragment_id)
        metadata, modified = fragment.update_columns(rows, left_on="id", right_on="id")[:2]
        fragments.append(metadata)
        fields.update(modified)
    operation = lance.LanceOperation.Update(
        updated_fragments=fragments, fields_modified=sorted(fields)
    )
    # Without retries inside: it is for us to reread and decide what still applies.
    return lance.LanceDataset.commit(
        dataset.uri, operation, read_version=dataset.version, max_retries=0
    )


def _commit_again(
    dataset: lance.LanceDataset, fragment_id: int, rows: pa.Table, *, only_open: bool
) -> lance.LanceDataset:
    import lance

    for attempt in range(_ATTEMPTS):
        dataset = lance.dataset(dataset.uri)
        wanted = _still_open(dataset, fragment_id, rows) if only_open else rows
        if not wanted.num_rows:
            break
        try:
            return _commit_once(dataset, {fragment_id: wanted})
        except Exception as error:
            if not _is_conflict(error) or attempt == _ATTEMPTS - 1:
                raise
    return dataset


def _still_open(dataset: lance.LanceDataset, fragment_id: int, rows: pa.Table) -> pa.Table:
    """The rows that still lack a value in one of the columns; filled values are put back."""
    names = [name for name in rows.column_names if name != "id"]
    now = fragment_of(dataset, fragment_id).to_table(columns=["id", *names]).combine_chunks()
    places = pc.index_in(rows["id"].combine_chunks(), value_set=now["id"].combine_chunks())
    merged, is_open = {}, pa.array([False] * rows.num_rows)
    for name in names:
        current = now[name].combine_chunks().take(places)
        is_open = pc.or_(is_open, pc.is_null(current))
        new = rows[name].combine_chunks()
        merged[name] = pc.if_else(pc.is_null(current), new, current)
    return pa.table({"id": rows["id"], **merged}).filter(is_open)


def fragment_of(dataset: lance.LanceDataset, fragment_id: int) -> lance.LanceFragment:
    """One fragment by its number; it must exist."""
    fragment = dataset.get_fragment(fragment_id)
    assert fragment is not None, f"fragment {fragment_id} of {dataset.uri}"
    return fragment


def _is_conflict(error: Exception) -> bool:
    return "conflict" in type(error).__name__.lower() or "commit conflict" in str(error).lower()
