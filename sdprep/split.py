"""Split: train and validation, whole duplicate groups at a time, with a certificate.

A side that was stored never changes. Adding photos later sends new groups to a side, or rejects an
image with its reason; to start over, take the stage back (`sdprep undo TABLE split`) or ask for
`redo`. Images that other stages reject take no place, but keep the side they had.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from sdprep.assignment import TRAIN, VALIDATION, Assignment, assign
from sdprep.certificate import NOTE, facts, strata_counts
from sdprep.closest import cross_split, told_apart
from sdprep.console import warn
from sdprep.manual_split import manual_labels
from sdprep.quotas import Wanted, exact_share
from sdprep.recipe import Section
from sdprep.schema import REJECT_STAGES
from sdprep.seeding import integer
from sdprep.split_rows import SplitRows, rows_of
from sdprep.strata import PARTS, Part, StratumColumns
from sdprep.table import PhotoTable

_CONFLICTS_SHOWN = 100


class SplitConfig(Section):
    """How much is held out for validation, and by which rule."""

    validation: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="Share of the images held out; 0 is none."
    )
    validation_count: int | None = Field(None, ge=0, description="Number of images held out.")
    manual: str | None = Field(
        None,
        min_length=1,
        description="Hold out by hand: a column's name, ids:FILE, folder:NAME, or source.",
    )
    stratify: tuple[Part, ...] = Field(
        PARTS, description="What both sides hold in the same mix; empty for a plain draw."
    )
    resolution_px: int = Field(
        1024, ge=8, description="Side in pixels of the square whose buckets make strata."
    )
    seed: int | None = Field(None, ge=0, description="Seed of the draw; None takes the recipe's.")

    @field_validator("validation")
    @classmethod
    def _is_a_share(cls, share: float | None) -> float | None:
        if share is not None and share >= 1:
            raise ValueError("must be < 1; for a number of images: validation_count")
        return share

    @model_validator(mode="after")
    def _is_one_mode(self) -> SplitConfig:
        given = [
            name
            for name in ("validation", "validation_count", "manual")
            if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one")
        return self

    @property
    def wanted(self) -> Wanted:
        """The size asked for, as exact numbers."""
        share = None if self.validation is None else exact_share(self.validation)
        return Wanted(share, self.validation_count)


@dataclass(frozen=True)
class SplitReport:
    """What the split came to.

    Args:
        train: images.
        validation: images.
        groups: duplicate groups on both sides together.
        rejected: images that the split itself rejects.
        certificate: see `sdprep.certificate`.
        warnings: sentences for the user; they were printed already.
    """

    train: int
    validation: int
    groups: int
    rejected: int
    certificate: dict[str, Any]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {
            "train": self.train,
            "validation": self.validation,
            "groups": self.groups,
            "rejected": self.rejected,
            "certificate": self.certificate,
            "warnings": list(self.warnings),
        }


def split_table(
    table: PhotoTable, config: SplitConfig | None = None, *, redo: bool = False
) -> SplitReport:
    """Assign every image and write `split`, `stable_train`, `reject_split` and the certificate.

    Args:
        table: read once over its small columns.
        config: how much to hold out; automatic without.
        redo: forget the sides stored so far. Validation curves before and after do not compare.

    Raises:
        UserError: a manual split that names no side, no file or no column.
        DataError: a manual split that leaves nothing to train on.
    """
    config = config or SplitConfig()
    plan = StratumColumns.of(table, config.stratify, config.resolution_px)
    with table.writer():
        rows = table.read(_columns(table, plan))
        labels, warnings = manual_labels(table, config.manual) if config.manual else (None, [])
        warnings = _about_groups(rows) + warnings
        ids, strata, kept = rows["id"].to_pylist(), plan.names(rows), _kept(rows)
        outcome = assign(
            ids,
            _groups(rows),
            strata,
            [None] * len(ids) if redo else _stored(rows),
            kept,
            wanted=config.wanted,
            seed=config.seed or 0,
            labels=labels,
        )
        live = [row for row in range(len(ids)) if kept[row] and outcome.reasons[row] is None]
        sides = [outcome.splits[row] or TRAIN for row in live]
        shown = rows_of(rows.take(pa.array(live, pa.int64())), sides, [strata[row] for row in live])
        certificate = _certificate(table, config, plan, outcome, shown)
        _write(table, ids, outcome, _stable_train(shown, config.seed or 0), set(live), certificate)
    warnings += [*outcome.warnings, *_about_outcome(certificate, outcome)]
    for warning in warnings:
        warn(warning)
    counts = certificate["counts"]
    return SplitReport(
        counts[TRAIN],
        counts[VALIDATION],
        certificate["groups"]["count"],
        sum(reason is not None for reason in outcome.reasons),
        certificate,
        tuple(warnings),
    )


def _columns(table: PhotoTable, plan: StratumColumns) -> list[str]:
    rejects = [f"reject_{stage}" for stage in REJECT_STAGES if stage != "split"]
    names = ["id", "group_id", "split", "signature", *rejects]
    return [name for name in names if table.has(name)] + plan.columns


def _kept(rows: pa.Table) -> list[bool]:
    """Whether no other stage rejects each image."""
    kept = np.ones(rows.num_rows, bool)
    for name in rows.column_names:
        if name.startswith("reject_"):
            kept &= rows[name].is_null().to_numpy()
    return kept.tolist()


def _groups(rows: pa.Table) -> list[str]:
    if "group_id" not in rows.column_names:
        return rows["id"].to_pylist()
    return pc.coalesce(rows["group_id"], rows["id"]).to_pylist()


def _stored(rows: pa.Table) -> list[str | None]:
    there = "split" in rows.column_names
    return rows["split"].to_pylist() if there else [None] * rows.num_rows


def _about_groups(rows: pa.Table) -> list[str]:
    advice = "near duplicates may stand on both sides; run sdprep dedup before sdprep split"
    if "group_id" not in rows.column_names:
        return [f"duplicates were never looked for, so every image is its own group: {advice}"]
    is_new = pc.and_(rows["group_id"].is_null(), rows["reject_ingest"].is_null())
    count = pc.sum(is_new).as_py() or 0
    if not count:
        return []
    return [f"{count} images came after the last search for duplicates: {advice}"]


def _stable_train(shown: SplitRows, seed: int) -> set[str]:
    """As many train images as there are validation images: those of lowest rank."""
    train = [id_ for id_, side in zip(shown.ids, shown.splits, strict=True) if side == TRAIN]
    size = min(len(train), len(shown.ids) - len(train))
    ranked = heapq.nsmallest(size, train, key=lambda id_: (integer(seed, "stable_train", id_), id_))
    return set(ranked)


def _certificate(
    table: PhotoTable,
    config: SplitConfig,
    plan: StratumColumns,
    outcome: Assignment,
    shown: SplitRows,
) -> dict[str, Any]:
    duplicates = _duplicates(table)
    conflicts = [asdict(conflict) for conflict in outcome.conflicts[:_CONFLICTS_SHOWN]]
    certificate = {
        "seed": config.seed or 0,
        "mode": "manual" if config.manual else config.wanted.mode,
        "v": None if config.validation is None else str(exact_share(config.validation)),
        "k": outcome.size,
        "n": outcome.num_images,
        **facts(shown),
        "strata": {
            "by": list(plan.parts),
            "resolution_px": plan.resolution_px,
            "score": plan.score,
            "counts": strata_counts(shown),
        },
        "duplicates": duplicates,
        "cross_split": cross_split(
            shown, _threshold(duplicates), tell_apart=lambda pairs: told_apart(table, pairs)
        ),
        "conflicts": {"count": len(outcome.conflicts), "first": conflicts},
        "table_version": table.version,
    }
    return json.loads(json.dumps(certificate))  # as it will be read back: lists for tuples


def _about_outcome(certificate: Mapping[str, Any], outcome: Assignment) -> list[str]:
    said = []
    if close := certificate["cross_split"]["close"]:
        first = close[0]
        said.append(
            f"{len(close)} pairs across the split look like duplicates, such as "
            f"{first[VALIDATION]} and {first[TRAIN]} ({first['distance']} bits apart); "
            "run sdprep dedup, then sdprep split again"
        )
    for conflict in outcome.conflicts[:3]:
        said.append(
            f"group {conflict.group} was wanted on both sides ({conflict.reason}): "
            f"validation {', '.join(conflict.validation[:3]) or 'none'}; "
            f"train {', '.join(conflict.train[:3]) or 'none'}"
        )
    if len(outcome.conflicts) > 3:
        said.append(f"{len(outcome.conflicts)} such groups in all; the certificate lists them")
    return said


def _duplicates(table: PhotoTable) -> dict[str, Any] | None:
    """What the search for duplicates wrote down: edges by kind, thresholds, signature version."""
    text = table.notes("group_id").get("duplicates")
    return json.loads(text) if text else None


def _threshold(duplicates: Mapping[str, Any] | None) -> int | None:
    """Bits up to which two images belong on one side; None if that was never asked for."""
    settings = (duplicates or {}).get("settings", {})
    return settings["stands_alone"] if settings.get("near") else None


def _write(
    table: PhotoTable,
    ids: Sequence[str],
    outcome: Assignment,
    stable: Collection[str],
    live: Collection[int],
    certificate: dict[str, Any],
) -> None:
    """Write columns and certificate; a certificate that says the same keeps its table version."""
    old = json.loads(table.notes("split").get(NOTE, "{}"))
    if {**old, "table_version": None} == {**certificate, "table_version": None}:
        certificate["table_version"] = old["table_version"]
    named = [row for row, side in enumerate(outcome.splits) if side is not None]
    marks = [ids[row] in stable if row in live else None for row in named]
    values = {
        "split": pa.array([outcome.splits[row] for row in named], pa.string()),
        "stable_train": pa.array(marks, pa.bool_()),
        "reject_split": pa.array([outcome.reasons[row] for row in named], pa.string()),
    }
    text = json.dumps(certificate, ensure_ascii=False, sort_keys=True)
    table.write_fold([ids[row] for row in named], values, stage="split", notes={NOTE: text})
