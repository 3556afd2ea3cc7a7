"""Finished values of a run that wait to be committed together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sdprep.commits import fragment_of
from sdprep.table import PhotoTable


@dataclass
class Outcome:
    """What annotators found out about one image."""

    id: str
    open: frozenset[str]  # the columns that have no value yet
    attempts: dict[str, int]  # of columns that count them: how many there were
    values: dict[str, dict[str, Any]] = field(default_factory=dict)


class Results:
    """Finished values that are not committed yet."""

    def __init__(self, table: PhotoTable, columns: list[str], retry_failed: bool) -> None:
        self.table = table
        self.columns = columns
        self.retry_failed = retry_failed
        self.by_fragment: dict[int, list[Outcome]] = {}

    def add(self, fragment_id: int, outcomes: list[Outcome]) -> None:
        """Take in what is finished of one fragment."""
        self.by_fragment.setdefault(fragment_id, []).extend(outcomes)

    def commit(self) -> None:
        """Write all of them in one commit."""
        updates = {
            fragment_id: self._rows(fragment_id, outcomes)
            for fragment_id, outcomes in self.by_fragment.items()
        }
        self.by_fragment.clear()
        self.table.commit(updates, only_open=not self.retry_failed)

    def _rows(self, fragment_id: int, outcomes: list[Outcome]) -> pa.Table:
        """New values; where an image had one already, that one again."""
        schema = self.table.schema
        ids = pa.array([outcome.id for outcome in outcomes], pa.string())
        fragment = fragment_of(self.table.dataset, fragment_id)
        partial = [c for c in self.columns if any(c not in o.values for o in outcomes)]
        old = fragment.to_table(columns=["id", *partial]) if partial else None
        values = {}
        for column in self.columns:
            type_ = schema.field(column).type
            new = pa.array([outcome.values.get(column) for outcome in outcomes], type_)
            if old is not None and column in partial:
                places = pc.index_in(ids, value_set=old["id"].combine_chunks())
                kept = old[column].combine_chunks().take(places)
                is_new = pa.array([column in outcome.values for outcome in outcomes])
                new = pc.if_else(is_new, new, kept)
            values[column] = new
        return pa.table({"id": ids, **values})
