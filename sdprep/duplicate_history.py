"""What an earlier search for duplicates left in the table, and whether it still counts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdprep import near_edges, near_search, second_look
from sdprep.duplicate_columns import Rows, embedding_column
from sdprep.signatures import FLAT_SD, SIGNATURE_VERSION
from sdprep.table import PhotoTable


def settings(table: PhotoTable, *, near: bool) -> dict[str, Any]:
    """What groups depend on besides the images."""
    return {
        "signature_version": SIGNATURE_VERSION,
        "near": near,
        "stands_alone": near_edges.STANDS_ALONE,
        "radius": near_search.RADIUS,
        "verified": near_edges.VERIFIED,
        "flat_sd": FLAT_SD,
        "embeddings": embedding_column(table),
        "min_cosine": near_edges.MIN_COSINE,
        "min_gradient_correlation": {
            "close": second_look.MIN_G_CLOSE,
            "far": second_look.MIN_G_FAR,
            "plain": second_look.MIN_G_PLAIN,
        },
    }


@dataclass(frozen=True)
class Before:
    """What an earlier run with the same settings left; nothing where there was none."""

    is_known: np.ndarray  # (n,) bool; compared with all others already
    group_id: list[str | None]
    dup_id: list[str | None]
    pixel_hash: list[str | None]
    edges: dict[str, float]

    @classmethod
    def read(cls, table: PhotoTable, rows: Rows, has_views: np.ndarray, *, near: bool) -> Before:
        """Read what is stored."""
        nothing: list[str | None] = [None] * len(rows.ids)
        none_known = np.zeros(len(rows.ids), bool)
        no_edges = {"near_close": 0, "near_far": 0, "refused": 0, "near_estimated": 0.0}
        notes = _notes(table)
        if notes is None or notes["settings"]["signature_version"] != SIGNATURE_VERSION:
            return cls(none_known, nothing, nothing, nothing, no_edges)
        hashes = rows.stored("pixel_hash")
        if notes["settings"] != settings(table, near=near):
            return cls(none_known, nothing, nothing, hashes, no_edges)
        groups, dups = rows.stored("group_id"), rows.stored("dup_id")
        named = np.array([None not in pair for pair in zip(groups, dups, strict=True)], bool)
        if named.sum() != notes["images"]:  # some were purged: their edges cannot be counted
            return cls(none_known, groups, dups, hashes, no_edges)
        # An image whose signature was computed since then counts as new.
        signed = np.array([signature is not None for signature in rows.stored("signature")], bool)
        edges = {kind: notes["edges"][kind] for kind in no_edges}
        return cls(named & signed & has_views, groups, dups, hashes, edges)


def _notes(table: PhotoTable) -> dict[str, Any] | None:
    """Of the last run, if all columns it wrote are still as it wrote them."""
    columns = ("signature", "pixel_hash", "dup_id", "group_id")
    found = {table.notes(name).get("duplicates") for name in columns}
    text = found.pop()
    return json.loads(text) if text is not None and not found else None
