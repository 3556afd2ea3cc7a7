"""Who goes to validation: a pure function of ids, groups, strata, stored choices and a seed.

Nothing here reads a file or a clock, and nothing depends on the order of the rows. A stored choice
never changes: photos added later may only be added to a side, or reject an image with a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdprep.errors import DataError
from sdprep.quotas import Wanted, largest_remainder
from sdprep.seeding import integer

TRAIN, VALIDATION = "train", "validation"
JOINED_VALIDATION = "joined_validation_group"
JOINED_TRAIN = "joined_train_group"
"""Only where the other way round would leave nothing to train on."""


@dataclass(frozen=True)
class Conflict:
    """A group that was wanted on both sides.

    Args:
        group: its least id.
        validation: ids that were, or were asked to be, validation.
        train: ids that were, or were asked to be, train.
        reason: what happened, in a word or two.
    """

    group: str
    validation: tuple[str, ...]
    train: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Assignment:
    """The outcome, row by row in the order given.

    Args:
        splits: train, validation, or None for a rejected image that never had a side.
        reasons: why the split itself rejects an image, or None.
        num_images: n, the images that nobody rejects.
        size: k, the validation images wanted.
        conflicts: groups that were wanted on both sides.
        warnings: sentences for the user.
    """

    splits: list[str | None]
    reasons: list[str | None]
    num_images: int
    size: int
    conflicts: tuple[Conflict, ...]
    warnings: tuple[str, ...]


@dataclass(slots=True)
class _Group:
    """The images of one duplicate group that no other stage rejects."""

    least: str
    stratum: str
    rows: list[int]
    size: int = 0  # images that stay, once the joined ones are rejected
    num_train: int = 0  # stored
    num_validation: int = 0  # stored
    side: str | None = None

    @property
    def is_stored(self) -> bool:
        """Whether one of its images has a side."""
        return self.num_train + self.num_validation > 0


def assign(
    ids: Sequence[str],
    groups: Sequence[str],
    strata: Sequence[str],
    stored: Sequence[str | None],
    kept: Sequence[bool],
    *,
    wanted: Wanted,
    seed: int,
    labels: Sequence[str | None] | None = None,
) -> Assignment:
    """Decide the side of every image, whole groups at a time.

    Args:
        ids: unique.
        groups: name of each image's duplicate group.
        strata: name of each image's stratum; a group's is that of its least id.
        stored: the side each image has already, or None. It never changes.
        kept: False where another stage rejects the image: it has no vote and takes no place, but
            images that come new into its group follow it.
        wanted: how much validation; not looked at with `labels`.
        seed: of the ranks.
        labels: sides chosen by hand (None: not mentioned), instead of ranks.

    Raises:
        DataError: the labels leave nothing to train on.
    """
    found = _gather(ids, groups, strata, stored, kept)
    _follow_stored(found, groups, stored, kept)
    ranked = sorted(found.values(), key=lambda group: group.least)
    ranked.sort(key=lambda group: integer(seed, "split", group.least))
    _keep_something_to_train(ranked)
    reasons, conflicts = _reject_joined(ranked, ids, stored)
    open_groups = [group for group in ranked if group.side is None]
    num_images = sum(group.size for group in ranked)
    existing = sum(group.size for group in ranked if group.side == VALIDATION)
    size, warnings = wanted.size(num_images), []
    if labels is not None:
        conflicts += _follow_labels(ranked, open_groups, ids, stored, labels)
        size = sum(group.size for group in ranked if group.side == VALIDATION)
    elif size and len(ranked) > 1:
        quotas = _quotas(ranked, size, max(0, size - existing), seed)
        _scan(open_groups, quotas)
        if not any(group.side == VALIDATION for group in ranked) and open_groups:
            min(open_groups, key=lambda group: group.size).side = VALIDATION  # in order of rank
    for group in open_groups:
        group.side = group.side or TRAIN
    warnings += _warnings(ranked, wanted, num_images, size, labels is not None)
    splits = list(stored)
    for group in ranked:
        for row in group.rows:
            splits[row] = stored[row] or group.side
    return Assignment(splits, reasons, num_images, size, tuple(conflicts), tuple(warnings))


def _gather(
    ids: Sequence[str],
    groups: Sequence[str],
    strata: Sequence[str],
    stored: Sequence[str | None],
    kept: Sequence[bool],
) -> dict[str, _Group]:
    found: dict[str, _Group] = {}
    for row, name in enumerate(groups):
        if not kept[row]:
            continue
        group = found.get(name)
        if group is None:
            group = found[name] = _Group(ids[row], strata[row], [])
        elif ids[row] < group.least:
            group.least, group.stratum = ids[row], strata[row]
        group.rows.append(row)
        group.size += 1
        group.num_train += stored[row] == TRAIN
        group.num_validation += stored[row] == VALIDATION
    return found


def _follow_stored(
    found: Mapping[str, _Group],
    groups: Sequence[str],
    stored: Sequence[str | None],
    kept: Sequence[bool],
) -> None:
    """Give a group the side its images have; of rejected ones only where the others have none."""
    for group in found.values():
        if group.is_stored:
            group.side = VALIDATION if group.num_validation else TRAIN
    for row, name in enumerate(groups):
        group_or_none = None if kept[row] or stored[row] is None else found.get(name)
        if group_or_none is not None and not group_or_none.is_stored:
            is_first = group_or_none.side is None
            group_or_none.side = stored[row] if is_first else _stronger(group_or_none, stored[row])


def _stronger(group: _Group, side: str | None) -> str:
    return VALIDATION if VALIDATION in (group.side, side) else TRAIN


def _keep_something_to_train(ranked: Sequence[_Group]) -> None:
    """If joined groups would all go to validation, turn one over: train is never emptied."""
    if any(group.side != VALIDATION for group in ranked):
        return
    followers = [group for group in ranked if not group.is_stored]
    mixed = [group for group in ranked if group.num_train]
    candidates = followers or mixed
    if candidates:
        max(candidates, key=lambda group: (group.num_train, group.size)).side = TRAIN


def _reject_joined(
    ranked: Sequence[_Group], ids: Sequence[str], stored: Sequence[str | None]
) -> tuple[list[str | None], list[Conflict]]:
    """Reject the members whose stored side their group has not got."""
    reasons: list[str | None] = [None] * len(ids)
    conflicts = []
    for group in ranked:
        if not group.num_train or not group.num_validation:
            continue
        reason = JOINED_VALIDATION if group.side == VALIDATION else JOINED_TRAIN
        for row in group.rows:
            if stored[row] not in (None, group.side):
                reasons[row] = reason
                group.size -= 1
        conflicts.append(_conflict(group, ids, stored, reason))
    return reasons, conflicts


def _conflict(
    group: _Group, ids: Sequence[str], sides: Sequence[str | None], reason: str
) -> Conflict:
    def those(side: str) -> tuple[str, ...]:
        return tuple(sorted(ids[row] for row in group.rows if sides[row] == side))

    return Conflict(group.least, those(VALIDATION), those(TRAIN), reason)


def _follow_labels(
    ranked: Sequence[_Group],
    open_groups: Sequence[_Group],
    ids: Sequence[str],
    stored: Sequence[str | None],
    labels: Sequence[str | None],
) -> list[Conflict]:
    """Send a new group to validation if one of its images is labelled so; list disagreements."""
    for group in open_groups:
        is_asked = any(labels[row] == VALIDATION for row in group.rows)
        group.side = VALIDATION if is_asked else TRAIN
    if ranked and not any(group.side == TRAIN and group.size for group in ranked):
        raise DataError(
            "the manual split leaves nothing to train on: every image, or one of its duplicates, "
            "is named as validation",
            "Name fewer.",
        )
    conflicts = []
    for group in ranked:
        asked = {labels[row] for row in group.rows} - {None}
        if len(asked) == 2:
            conflicts.append(_conflict(group, ids, labels, "labelled_both_ways"))
        elif asked and asked != {group.side}:
            conflicts.append(_conflict(group, ids, stored, "stored_otherwise"))
    return conflicts


def _quotas(ranked: Sequence[_Group], size: int, need: int, seed: int) -> dict[str, int]:
    """How many more validation images each stratum takes; together at most `need`."""
    population: Counter[str] = Counter()
    existing: Counter[str] = Counter()
    available: Counter[str] = Counter()
    for group in ranked:
        population[group.stratum] += group.size
        if group.side == VALIDATION:
            existing[group.stratum] += group.size
        elif group.side is None:
            available[group.stratum] += group.size
    target = largest_remainder(size, population, seed)
    lacking = {
        name: min(max(0, target[name] - existing[name]), available[name]) for name in population
    }
    total = sum(lacking.values())
    if total >= need:  # some strata have more than their share already
        return largest_remainder(need, lacking, seed)
    spare = {name: available[name] - lacking[name] for name in population}
    more = largest_remainder(min(need - total, sum(spare.values())), spare, seed)
    return {name: lacking[name] + more[name] for name in population}


def _scan(open_groups: Sequence[_Group], quotas: dict[str, int]) -> None:
    """Take groups in order of rank while they fit what is left of their stratum's quota."""
    for group in open_groups:
        if group.size <= quotas[group.stratum]:
            quotas[group.stratum] -= group.size
            group.side = VALIDATION


def _warnings(
    ranked: Sequence[_Group], wanted: Wanted, num_images: int, size: int, is_manual: bool
) -> list[str]:
    found = sum(group.size for group in ranked if group.side == VALIDATION)
    said = []
    if not num_images:
        return ["no image is left to split"]
    if num_images == found:
        said.append("train is empty: every image that is left was assigned to validation earlier")
    if is_manual:
        return said if found else [*said, "the manual split names no image for validation"]
    if num_images < 2:
        said.append("one image cannot be split: it stays on its side and nothing is held out")
    elif wanted.mode == "none":
        kept = f"; {found} were assigned earlier and stay" if found else ""
        said.append(f"no validation images are asked for{kept}")
    elif not found:
        only = (
            "all images are in one duplicate group"
            if len(ranked) == 1
            else ("all images are in train already, and a stored side never changes")
        )
        said.append(f"validation is empty: {only}")
    elif found < size:
        said.append(
            f"validation holds {found} of the {size} images wanted: "
            "duplicate groups go whole, and stored sides never change"
        )
    elif found > size:
        said.append(
            f"validation holds {found} images where {size} are wanted: "
            "duplicate groups go whole, and stored sides never change"
        )
    if wanted.count is not None and wanted.count > num_images - 1 > 0:
        said.append(f"{wanted.count} validation images of {num_images} were asked for; {size} fit")
    return said
