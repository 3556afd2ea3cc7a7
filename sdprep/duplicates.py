"""Duplicates: find images that are one photo, name their groups, and keep the best of each.

Columns: `signature` (of the whole), `pixel_hash` (only where signatures are equal), `dup_id`
(verified, up to 20 bits: one of these is enough), `group_id` (every edge, sets of posts included:
these share a split) and `reject_duplicates`. Every image that ingest accepted takes part in the
groups, whatever other stages reject, so that groups depend on pixels alone.

A later run compares the new images with all, and joins the stored groups with what it finds:
groups may merge, never split. Other settings, or a stored column that was taken back, start over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from sdprep import near_edges, second_look
from sdprep.annotate import annotate
from sdprep.console import warn
from sdprep.duplicate_columns import Rows, embedding_column, pixel_hashes, read_rows, read_views
from sdprep.duplicate_groups import (
    best_of_groups,
    group_edges,
    links,
    members,
    refuse_large,
    set_links,
    unite_tags,
)
from sdprep.errors import UserError
from sdprep.near_edges import Edges, Views, find_edges
from sdprep.recipe import Section
from sdprep.schema import FOLDS
from sdprep.signatures import COLUMN, FLAT_SD, SIGNATURE_VERSION, SignatureViews
from sdprep.table import PhotoTable

MAX_EXHAUSTIVE = 50_000


class DuplicatesConfig(Section):
    """How duplicates are found and which of them stay."""

    near: bool = Field(True, description="Also near duplicates; false: equal pixels only.")
    keep: Literal["best", "all"] = Field(
        "best", description="best rejects the rest of a group of duplicates; all rejects none."
    )
    score: str | None = Field(
        None,
        min_length=1,
        description="Column that decides between equal sizes, such as score_aesthetic.score; "
        "without it preference, aesthetic or technical, the first that has a score.",
    )
    accept_large_groups: bool = Field(
        False, description="Go on though a group exceeds max(100, 0.1 % of the images)."
    )


@dataclass(frozen=True)
class DuplicatesReport:
    """What was found.

    Args:
        exact_groups: sets of two or more files with equal bytes or equal pixels.
        near_groups: groups of images that differ in pixels.
        images_in_groups: images that share their group with another one.
        images: images that took part.
        rejected: images that gave way to a better one.
        flat: images too flat to have near duplicates.
        failed: images without a signature.
        largest_group: images in it.
        edges: pixels, near_close (up to 16 bits), near_far (17 to 28), sets.
        second_look: near pairs whose thumbnails agreed, and pairs that were refused.
    """

    exact_groups: int
    near_groups: int
    images_in_groups: int
    images: int
    rejected: int
    flat: int
    failed: int
    largest_group: int
    edges: dict[str, int] = field(default_factory=dict)
    second_look: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self)


def find_duplicates(table: PhotoTable, config: DuplicatesConfig | None = None) -> DuplicatesReport:
    """Find duplicates, write their columns, reject all but the best of each.

    Raises:
        UserError: a group is suspiciously large, the set is too large to compare every pair, or
            `score` names no column. Nothing but signatures is written then.
    """
    config = config or DuplicatesConfig()
    with table.writer():
        _sign(table)
        rows = read_rows(table, config.score)
        found = _find(table, rows, config)
        if not config.accept_large_groups:
            refuse_large(rows.ids, found.group_ids, rows.names())
        better: dict[int, int] = {}
        if config.keep == "best":
            better = best_of_groups(rows.ids, found.dup_ids, rows.qualities, rows.is_live)
        _write(table, rows, found, better, config)
        _unite_tags(table, rows.ids, better)
    return _report(rows, found, better)


@dataclass(frozen=True)
class _Found:
    """Edges folded into groups; row i of each list is image i."""

    signatures: list[bytes | None]
    num_flat: int
    pixel_hashes: list[str | None]
    dup_ids: list[str]
    group_ids: list[str]
    edges: dict[str, int]  # by kind; refused ones too


def _find(table: PhotoTable, rows: Rows, config: DuplicatesConfig) -> _Found:
    views, has_views = read_views(table, rows.ids)
    before = _Before.read(table, rows, has_views, config)
    near = _near_edges(views, has_views, before, config)
    signatures = [
        signature.tobytes() if has else None
        for signature, has in zip(views.upright[:, 0], has_views, strict=True)
    ]
    hashes = pixel_hashes(table, rows.ids, signatures, before.pixel_hash)
    pixels, sets = links(hashes), set_links(rows.parents, rows.sources)
    close = [edge[:2] for edge in near.edges if edge[2] <= near_edges.VERIFIED]
    dup_ids = group_edges(rows.ids, [*pixels, *close, *links(before.dup_id)])
    every = [*links(dup_ids), *(edge[:2] for edge in near.edges), *sets]
    counts = {
        "near_close": near.num_close + before.edges["near_close"],
        "near_far": near.num_far + before.edges["near_far"],
        "refused": near.num_refused + before.edges["refused"],
        "pixels": len(pixels),
        "sets": len(sets),
    }
    return _Found(
        signatures,
        int((has_views & ~views.usable[:, 0]).sum()),
        hashes,
        dup_ids,
        group_edges(rows.ids, [*every, *links(before.group_id)]),
        counts,
    )


def _write(
    table: PhotoTable, rows: Rows, found: _Found, better: dict[int, int], config: DuplicatesConfig
) -> None:
    reasons = [
        f"duplicate_of:{rows.ids[better[row]]}" if row in better else None
        for row in range(len(rows.ids))
    ]
    values: dict[str, Sequence[Any]] = {
        "signature": found.signatures,
        "pixel_hash": found.pixel_hashes,
        "dup_id": found.dup_ids,
        "group_id": found.group_ids,
        "reject_duplicates": reasons,
    }
    notes = {
        "images": len(rows.ids),
        "settings": _settings(table, config),
        "edges": found.edges,
    }
    table.write_fold(
        rows.ids,
        {name: pa.array(value, FOLDS[name]) for name, value in values.items()},
        stage="dedup",
        notes={"duplicates": json.dumps(notes, sort_keys=True)},
    )


def _sign(table: PhotoTable) -> None:
    """Compute the signatures that are missing; all of them after a change of their definition."""
    annotator = SignatureViews()
    is_outdated = table.has(COLUMN) and (
        table.notes(COLUMN).get("fingerprint") != annotator.fingerprint
    )
    if is_outdated:
        warn(f"{COLUMN} was made by another release; all signatures are computed again")
    report = annotate(table, {COLUMN: annotator}, redo=is_outdated)[0]
    if report.failed:
        warn(f"{report.failed} images have no signature; the first: {report.first_error}")


def _settings(table: PhotoTable, config: DuplicatesConfig) -> dict[str, Any]:
    """What groups depend on besides the images."""
    return {
        "signature_version": SIGNATURE_VERSION,
        "near": config.near,
        "stands_alone": near_edges.STANDS_ALONE,
        "radius": near_edges.RADIUS,
        "verified": near_edges.VERIFIED,
        "flat_sd": FLAT_SD,
        "embeddings": embedding_column(table),
        "min_cosine": near_edges.MIN_COSINE,
        "min_gradient_correlation": {
            "close": second_look.MIN_G_CLOSE,
            "far": second_look.MIN_G_FAR,
            "plain": second_look.MIN_G_PLAIN,
        },
        "mode": "exhaustive",
    }


@dataclass(frozen=True)
class _Before:
    """What an earlier run with the same settings left; nothing where there was none."""

    is_known: np.ndarray  # (n,) bool; compared with all others already
    group_id: list[str | None]
    dup_id: list[str | None]
    pixel_hash: list[str | None]
    edges: dict[str, int]

    @classmethod
    def read(
        cls, table: PhotoTable, rows: Rows, has_views: np.ndarray, config: DuplicatesConfig
    ) -> _Before:
        nothing: list[str | None] = [None] * len(rows.ids)
        none_known = np.zeros(len(rows.ids), bool)
        no_edges = {"near_close": 0, "near_far": 0, "refused": 0}
        notes = _notes(table)
        if notes is None or notes["settings"]["signature_version"] != SIGNATURE_VERSION:
            return cls(none_known, nothing, nothing, nothing, no_edges)
        hashes = rows.stored("pixel_hash")
        if notes["settings"] != _settings(table, config):
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


def _near_edges(
    views: Views, has_views: np.ndarray, before: _Before, config: DuplicatesConfig
) -> Edges:
    if not config.near:
        return Edges()
    if len(views) > MAX_EXHAUSTIVE:
        raise UserError(
            f"{len(views):,} images; near duplicates are searched among {MAX_EXHAUSTIVE:,} at most",
            "Use --no-near (equal pixels only), or split the set into several tables.",
        )
    return find_edges(views, ~before.is_known & has_views)


def _unite_tags(table: PhotoTable, ids: list[str], better: dict[int, int]) -> None:
    """Give the images that stay the tags of those that gave way; see `unite_tags`."""
    if not better or not table.has("tags"):
        return
    stored = table.read(["id", "tags"])
    by_id = dict(zip(stored["id"].to_pylist(), stored["tags"].to_pylist(), strict=True))
    removed = [
        (action.get("id", ""), action.get("tag", ""))
        for action in table.journal().fold()
        if action["action"] == "remove_tag"
    ]
    united = unite_tags(ids, [by_id[id_] for id_ in ids], better, removed)
    if united:
        changed = [ids[row] for row in united]
        table.update_rows(changed, {"tags": pa.array(list(united.values()), FOLDS["tags"])})


def _report(rows: Rows, found: _Found, better: dict[int, int]) -> DuplicatesReport:
    same = group_edges(rows.ids, links(found.pixel_hashes))
    files: dict[str, int] = {}
    for name, found_at in zip(same, rows.sources, strict=True):
        files[name] = files.get(name, 0) + max(1, len(found_at or []))
    groups, counts = members(found.group_ids), found.edges
    return DuplicatesReport(
        exact_groups=sum(number > 1 for number in files.values()),
        near_groups=sum(len({same[row] for row in group}) > 1 for group in groups.values()),
        images_in_groups=sum(map(len, groups.values())),
        images=len(rows.ids),
        rejected=len(better),
        flat=found.num_flat,
        failed=sum(signature is None for signature in found.signatures),
        largest_group=max(map(len, groups.values()), default=min(1, len(rows.ids))),
        edges={kind: counts[kind] for kind in ("pixels", "near_close", "near_far", "sets")},
        second_look={
            "agreed": counts["near_close"] + counts["near_far"],
            "refused": counts["refused"],
        },
    )
