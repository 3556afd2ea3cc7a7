"""Tags and source of the images of a probe, so that its numbers can be broken down by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdtrain.dataset import Rows
from sdtrain.paired import Comparison, compare, holm

FEWEST_IMAGES = 4
"""Groups of fewer images are left out: their intervals would say nothing."""
ALPHA = 0.05


@dataclass(frozen=True)
class Labels:
    """What one image is filed under; it fixes no number, so it is no part of a probe's name."""

    tags: tuple[str, ...] = ()
    source: str | None = None


@dataclass(frozen=True)
class Group:
    """The images of one tag or source, measured twice.

    Args:
        kind: `tag` or `source`.
        name: of the tag or source.
        found: the comparison of these images alone.
        differs: whether the loss of such images changed, corrected for all groups of the kind.
    """

    kind: str
    name: str
    found: Comparison
    differs: bool

    def to_json(self) -> dict[str, Any]:
        """As metrics and `--json` hold it."""
        found = self.found
        return {
            "name": self.name,
            "images": found.num_images,
            "mean": found.mean_b,
            "change_percent": found.change_percent,
            "ci95_percent": found.ci95_percent,
            "ci95_new_images_percent": found.ci95_new_images_percent,
            "differs": self.differs,
        }


def labels_of(rows: Rows, wanted: Sequence[int]) -> tuple[Labels, ...]:
    """Tags and source of some rows; data sets that have none give empty ones."""
    sources = rows.sources(wanted)
    return tuple(
        Labels(_tags(record), source)
        for record, source in zip(rows.records(wanted), sources, strict=True)
    )


def _tags(record: Mapping[str, Any]) -> tuple[str, ...]:
    names = (tag["name"] if isinstance(tag, Mapping) else str(tag) for tag in record["tags"] or [])
    return tuple(dict.fromkeys(names))


def groups(
    a: np.ndarray, b: np.ndarray, labels: Sequence[Labels], u: np.ndarray | None = None
) -> list[Group]:
    """Compare two matrices tag by tag and source by source, the most improved first of each kind.

    A group that all images share is left out: it is the whole set.

    Args:
        a: (n, m) weighted losses.
        b: the same points of another model.
        labels: (n) of the images; fewer means that the probe knows none.
        u: (n, m) their noise levels, for narrower intervals.
    """
    if len(labels) != len(a):
        return []
    found = []
    for kind in ("tag", "source"):
        members = _members(kind, labels)
        compared = {
            name: compare(a[rows], b[rows], None if u is None else u[rows])
            for name, rows in members.items()
        }
        # A group of four images or more always has an interval for new ones, but not with no loss.
        p_values = [each.p_value_new_images for each in compared.values()]
        corrected = holm([1.0 if p is None else p for p in p_values])
        of_kind = [
            Group(kind, name, compared[name], p <= ALPHA)
            for name, p in zip(compared, corrected, strict=True)
        ]
        found += sorted(of_kind, key=lambda group: (group.found.change_percent, group.name))
    return found


def _members(kind: str, labels: Sequence[Labels]) -> dict[str, list[int]]:
    members: dict[str, list[int]] = {}
    for row, each in enumerate(labels):
        names = each.tags if kind == "tag" else (each.source,) if each.source else ()
        for name in names:
            members.setdefault(name, []).append(row)
    return {
        name: rows
        for name, rows in sorted(members.items())
        if FEWEST_IMAGES <= len(rows) < len(labels)
    }


def extremes(found: Sequence[Group], kind: str, most: int) -> list[Group]:
    """The most improved and the most worsened groups of a kind, `most` of each at most."""
    of_kind = [group for group in found if group.kind == kind]
    return of_kind if len(of_kind) <= 2 * most else of_kind[:most] + of_kind[-most:]
