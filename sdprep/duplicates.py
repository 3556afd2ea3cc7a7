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

from sdprep import near_edges
from sdprep.annotate import annotate
from sdprep.console import warn
from sdprep.duplicate_columns import (
    Rows,
    pixel_hashes,
    read_rows,
    read_thumbnails,
    read_views,
)
from sdprep.duplicate_groups import (
    best_of_groups,
    group_edges,
    links,
    members,
    refuse_large,
    set_links,
    unite_tags,
)
from sdprep.duplicate_history import Before, settings
from sdprep.near_edges import Edges, verify
from sdprep.near_sampled import compare_sampled, recall
from sdprep.near_search import Views, compare_all
from sdprep.recipe import Section
from sdprep.schema import FOLDS
from sdprep.signatures import COLUMN, SignatureViews
from sdprep.table import PhotoTable
from sdprep.tag_composition import read_edits
from sdprep.tag_rules import normalise_tag

MAX_EXHAUSTIVE = 50_000  # images; two to five minutes of one core


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
        edges: pixels, near_close (up to 16 bits), near_far (17 to 28), sets; near_estimated: near
            ones there are, as far as the recall of the search tells (a large set is sampled).
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
    edges: dict[str, float] = field(default_factory=dict)
    second_look: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self)


def find_duplicates(table: PhotoTable, config: DuplicatesConfig | None = None) -> DuplicatesReport:
    """Find duplicates, write their columns, reject all but the best of each.

    Raises:
        UserError: a group is suspiciously large, or `score` names no column of numbers. Nothing
            but signatures is written then.
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
    edges: dict[str, float]  # by kind; refused ones too


def _find(table: PhotoTable, rows: Rows, config: DuplicatesConfig) -> _Found:
    views, has_views = read_views(table, rows.ids)
    before = Before.read(table, rows, has_views, near=config.near)
    near = _near_edges(table, rows, views, ~before.is_known & has_views, config)
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
        "near_estimated": round(near.num_estimated + before.edges["near_estimated"], 1),
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
        "mode": "exhaustive" if len(rows.ids) <= MAX_EXHAUSTIVE else "sampled",
        "settings": settings(table, near=config.near),
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


def _near_edges(
    table: PhotoTable, rows: Rows, views: Views, is_new: np.ndarray, config: DuplicatesConfig
) -> Edges:
    if not config.near:
        return Edges()
    if len(rows.ids) <= MAX_EXHAUSTIVE:
        hits = compare_all(views, is_new)
        return verify(views, hits, read_thumbnails(table, rows.ids, hits[:, :2]))
    hits = compare_sampled(views, is_new)
    return verify(views, hits, read_thumbnails(table, rows.ids, hits[:, :2]), recall)


def _unite_tags(table: PhotoTable, ids: list[str], better: dict[int, int]) -> None:
    """Give the images that stay the tags of those that gave way; see `unite_tags`."""
    if not better or not table.has("tags"):
        return
    stored = table.read(["id", "tags"])
    by_id = dict(zip(stored["id"].to_pylist(), stored["tags"].to_pylist(), strict=True))
    removed = []
    for id_, edit in read_edits(table.journal().fold()).items():
        last_word = {normalise_tag(name): added for name, added, _ in edit.tags}
        removed += [(id_, name) for name, added in last_word.items() if not added]
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
        edges={kind: count for kind, count in counts.items() if kind != "refused"},
        second_look={
            "agreed": int(counts["near_close"] + counts["near_far"]),
            "refused": int(counts["refused"]),
        },
    )
