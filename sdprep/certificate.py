"""The split's certificate, and the check that a table or a published set still lives up to it.

The check looks at properties and digests. It does not assign again: an assignment depends on what
the table held when each image arrived.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from sdprep.assignment import TRAIN, VALIDATION
from sdprep.closest import cross_split
from sdprep.errors import DataError
from sdprep.split_rows import SplitRows, published_rows, table_rows
from sdprep.strata import StratumColumns
from sdprep.table import PhotoTable

NOTE = "certificate"
SIDES = (TRAIN, VALIDATION)
_SHOWN = 3


def facts(rows: SplitRows) -> dict[str, Any]:
    """What can be counted again from ids, groups and sides alone.

    Group sizes are listed per side as [size, number of such groups].
    """
    size_of = Counter(zip(rows.splits, rows.groups, strict=True))
    sizes = {
        side: sorted(Counter(n for (s, _), n in size_of.items() if s == side).items())
        for side in SIDES
    }
    return {
        "counts": {side: rows.splits.count(side) for side in SIDES},
        "groups": {
            "count": len(set(rows.groups)),
            "sizes": {side: [list(pair) for pair in pairs] for side, pairs in sizes.items()},
        },
        "digests": {
            "id_split": _digest(rows.ids, rows.splits),
            "id_group": _digest(rows.ids, rows.groups),
        },
    }


def strata_counts(rows: SplitRows) -> dict[str, dict[str, int]]:
    """Stratum to side to number of images."""
    found = Counter(zip(rows.strata or (), rows.splits, strict=bool(rows.strata)))
    names = sorted({name for name, _ in found})
    return {name: {side: found[name, side] for side in SIDES} for name in names}


def _digest(ids: list[str], values: list[str]) -> str:
    """Of all (id, value), whatever their order."""
    lines = sorted(f"{id_}\t{value}\n" for id_, value in zip(ids, values, strict=True))
    return blake2b("".join(lines).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class VerifyReport:
    """What the check found.

    Args:
        train: images.
        validation: images.
        groups: duplicate groups on both sides together.
        min_distance: bits between the closest images across the split; None without signatures.
        problems: properties that do not hold; empty if the split stands.
        notes: what could not be checked, and why.
    """

    train: int
    validation: int
    groups: int
    min_distance: int | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every property holds."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {"ok": self.ok, **asdict(self)}


def verify(target: PhotoTable | str | Path) -> VerifyReport:
    """Check the split of a table or of a published folder against its certificate.

    Raises:
        DataError: there is nothing to check, or no certificate.
    """
    table = _as_table(target)
    if table is not None:
        certificate = _certificate(table.notes("split").get(NOTE), table.path)
        plan = certificate["strata"]
        columns = StratumColumns(tuple(plan["by"]), plan["resolution_px"], plan["score"])
        rows = table_rows(table, columns if _has_all(table, columns) else None)
    else:
        folder = Path(target)  # type: ignore[arg-type]
        certificate = _certificate(_published_certificate(folder), folder)
        rows = published_rows(folder)
    return _check(rows, certificate)


def restated(certificate: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """The certificate of a published folder that left some images of the table out.

    Strata are dropped, as a published set has not got what they are made of.
    """
    rows = published_rows(Path(folder))
    known = certificate["cross_split"]
    crossing = cross_split(rows, known["threshold"], dict(known)["different"])
    of_table = {"digests": certificate["digests"], "counts": certificate["counts"]}
    kept = {**certificate, **facts(rows), "cross_split": crossing, "of_table": of_table}
    return {**kept, "strata": {**certificate["strata"], "counts": {}}}


def _as_table(target: PhotoTable | str | Path) -> PhotoTable | None:
    if isinstance(target, PhotoTable):
        return target
    path = Path(target)
    if not path.exists():
        raise DataError(f"there is no table and no published folder {path}")
    return None if (path / "sdprep.json").is_file() else PhotoTable.open(path)


def _published_certificate(folder: Path) -> str | None:
    try:
        found = json.loads((folder / "sdprep.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {folder / 'sdprep.json'}: {error}") from None
    certificate = found.get(NOTE) if isinstance(found, dict) else None
    return json.dumps(certificate) if certificate else None


def _certificate(text: str | None, place: Path) -> dict[str, Any]:
    if not text:
        raise DataError(f"{place} has no split certificate", f"Make one: sdprep split {place}")
    try:
        certificate = json.loads(text)
        _ = [certificate[key] for key in ("counts", "groups", "digests", "strata", "cross_split")]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the split certificate of {place} is damaged: {error!r}") from None
    return certificate


def _has_all(table: PhotoTable, columns: StratumColumns) -> bool:
    return all(table.has(name.split(".")[0]) for name in columns.columns)


def _check(rows: SplitRows, certificate: Mapping[str, Any]) -> VerifyReport:
    found = facts(rows)
    problems = [*_disjoint(rows), *_complete(rows), *_group_pure(rows), *_stable(rows)]
    problems += _as_certified(rows, found, certificate)
    notes = []
    known = certificate["cross_split"]
    crossing = cross_split(rows, known["threshold"], known["different"])
    if not rows.has_signature.any():
        notes.append("there are no signatures: distances across the split were not compared")
    elif crossing["compared"] != "all":
        notes.append(f"distances across the split: {crossing['compared']}")
    for pair in crossing["close"][:_SHOWN]:
        problems.append(
            f"images {pair['validation']} (validation) and {pair['train']} (train) are "
            f"{pair['distance']} bits apart; up to {known['threshold']} belong on one side"
        )
    if len(crossing["close"]) > _SHOWN:
        problems.append(f"{len(crossing['close'])} such pairs in all")
    return VerifyReport(
        found["counts"][TRAIN],
        found["counts"][VALIDATION],
        found["groups"]["count"],
        crossing["min_distance"],
        tuple(problems),
        tuple(notes),
    )


def _disjoint(rows: SplitRows) -> list[str]:
    twice = sorted(id_ for id_, count in Counter(rows.ids).items() if count > 1)
    return [f"{len(twice)} images are there twice: {_some(twice)}"] if twice else []


def _complete(rows: SplitRows) -> list[str]:
    without = [id_ for id_, side in zip(rows.ids, rows.splits, strict=True) if side not in SIDES]
    if not without:
        return []
    return [f"{len(without)} images have no side: {_some(sorted(without))}; run sdprep split again"]


def _group_pure(rows: SplitRows) -> list[str]:
    side_of: dict[str, str] = {}
    torn = set()
    for group, side in zip(rows.groups, rows.splits, strict=True):
        if side_of.setdefault(group, side) != side:
            torn.add(group)
    if not torn:
        return []
    return [f"{len(torn)} duplicate groups are on both sides: {_some(sorted(torn))}"]


def _stable(rows: SplitRows) -> list[str]:
    marked = [side for side, flag in zip(rows.splits, rows.stable, strict=True) if flag]
    wrong = sum(side != TRAIN for side in marked)
    return [f"{wrong} images marked stable_train are not in train"] if wrong else []


def _as_certified(
    rows: SplitRows, found: Mapping[str, Any], certificate: Mapping[str, Any]
) -> list[str]:
    problems = [
        f"{side} holds {found['counts'][side]} images, certified are {certified}"
        for side, certified in certificate["counts"].items()
        if found["counts"].get(side) != certified
    ]
    if found["groups"] != certificate["groups"]:
        problems.append("group counts or sizes are not those certified")
    certified_strata = certificate["strata"]["counts"]
    if rows.strata is not None and strata_counts(rows) != certified_strata:
        problems.append("the images of the strata are not those certified")
    for side in SIDES if certified_strata else ():
        if sum(stratum[side] for stratum in certified_strata.values()) != found["counts"][side]:
            problems.append(f"the certified strata do not add up to the images of {side}")
    for name, what in (("id_split", "side of an image"), ("id_group", "group of an image")):
        if found["digests"][name] != certificate["digests"][name]:
            problems.append(f"the {what} has changed since the split: digest {name} differs")
    if problems:
        problems.append("if images were added or rejected since, run sdprep split again")
    return problems


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
