"""Who goes to validation: exact counts, whole groups, no dependence on order, no move on growth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdprep.assignment import (
    JOINED_TRAIN,
    JOINED_VALIDATION,
    TRAIN,
    VALIDATION,
    Assignment,
    assign,
)
from sdprep.errors import DataError, UserError
from sdprep.quotas import Wanted, exact_share, largest_remainder
from sdprep.seeding import digest, integer

PROJECT = Path(__file__).resolve().parent.parent
AUTOMATIC = Wanted()


def ids_of(count: int, salt: str = "") -> list[str]:
    return [digest("image", salt, index) for index in range(count)]


def split(
    ids: list[str],
    wanted: Wanted = AUTOMATIC,
    groups: list[str] | None = None,
    strata: list[str] | None = None,
    stored: list[str | None] | None = None,
    kept: list[bool] | None = None,
    seed: int = 7,
    labels: list[str | None] | None = None,
) -> Assignment:
    return assign(
        ids,
        groups or ids,
        strata or ["all"] * len(ids),
        stored or [None] * len(ids),
        kept or [True] * len(ids),
        wanted=wanted,
        seed=seed,
        labels=labels,
    )


def live(found: Assignment, kept: list[bool] | None = None) -> list[str | None]:
    return [
        side
        for row, (side, reason) in enumerate(zip(found.splits, found.reasons, strict=True))
        if reason is None and (kept is None or kept[row])
    ]


# --- how many ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_images", "size"),
    [
        (0, 0), (1, 0), (2, 1), (3, 1), (10, 2), (20, 3), (30, 5), (50, 8), (100, 8), (160, 8),
        (170, 9), (190, 10), (1000, 50), (40_960, 2048), (10**6, 2048),
    ],
)  # fmt: skip
def test_automatic_sizes(num_images: int, size: int) -> None:
    assert AUTOMATIC.size(num_images) == size


def test_proportion_is_exact_and_rounds_half_up_for_every_n_and_v() -> None:
    checked = 0
    for hundredths in range(1, 100):
        wanted = Wanted(exact_share(hundredths / 100))
        for n in range(2, 401):
            half_up = int(Fraction(n * hundredths, 100) + Fraction(1, 2))
            assert wanted.size(n) == max(1, min(half_up, n - 1))
            checked += 1
    assert checked == 99 * 399
    assert Wanted(exact_share("0.58")).size(25) == 15  # 14.5


@pytest.mark.parametrize("given_as", [0.58, "0.58", Decimal("0.58"), " 0.58 ", "58e-2"])
def test_a_share_is_the_decimal_that_was_typed(given_as: str | float | Decimal) -> None:
    assert exact_share(given_as) == Decimal("0.58")


@pytest.mark.parametrize(
    "wrong", [1, 1.0, "1", 2, -0.1, "-0.0001", float("nan"), "nan", "inf", "five", "", "0,05"]
)
def test_a_share_out_of_range_is_an_error(wrong: str | float) -> None:
    with pytest.raises(UserError, match="at least 0 and below 1"):
        exact_share(wrong)


@pytest.mark.parametrize(("count", "size"), [(0, 0), (1, 1), (19, 19), (20, 19), (2048, 19)])
def test_counts_leave_something_to_train(count: int, size: int) -> None:
    found = split(ids_of(20), Wanted(count=count))
    assert found.splits.count(VALIDATION) == found.size == size
    assert any("were asked for" in said for said in found.warnings) == (count > 19)


def test_none_sends_everything_to_train_and_says_so() -> None:
    for wanted in (Wanted(exact_share(0)), Wanted(exact_share("0.00")), Wanted(count=0)):
        found = split(ids_of(20), wanted)
        assert wanted.mode == "none"
        assert set(found.splits) == {TRAIN}
        assert "no validation images" in found.warnings[0]


def test_one_image_or_none_trains_with_a_warning() -> None:
    assert split(ids_of(1)).splits == [TRAIN]
    assert "one image cannot be split" in split(ids_of(1)).warnings[0]
    assert split([]).splits == []
    assert "no image" in split([]).warnings[0]


# --- invariants -------------------------------------------------------------------------------


def check_invariants(ids: list[str], groups: list[str], found: Assignment) -> None:
    assert len(found.splits) == len(ids)
    assert set(found.splits) <= {TRAIN, VALIDATION}  # complete, and one side each
    sides = defaultdict(set)
    for group, side in zip(groups, found.splits, strict=True):
        sides[group].add(side)
    assert all(len(both) == 1 for both in sides.values())
    assert TRAIN in found.splits


def test_singletons_give_exactly_k_for_all_n_and_v() -> None:
    """Every n to 400 and every v to .99, three v for each n, so that all are visited."""
    for n in range(2, 401):
        ids = ids_of(n)
        strata = [str(integer("s", id_) % (1 + n % 7)) for id_ in ids]
        for hundredths in range(n % 33, 100, 33):
            wanted = Wanted(exact_share(hundredths / 100))
            found = split(ids, wanted, strata=strata, seed=n)
            check_invariants(ids, ids, found)
            assert found.splits.count(VALIDATION) == found.size == wanted.size(n)


def test_strata_get_their_share_within_one() -> None:
    ids = ids_of(400)
    strata = [("few", "some", "many")[min(2, integer(id_) % 7)] for id_ in ids]
    found = split(ids, Wanted(exact_share(0.1)), strata=strata)
    held = Counter(
        name for name, side in zip(strata, found.splits, strict=True) if side == VALIDATION
    )
    for name, population in Counter(strata).items():
        assert abs(held[name] - population / 10) < 1


GROUPED = st.lists(
    st.tuples(st.integers(0, 14), st.integers(0, 3)), min_size=2, max_size=60
)  # group, stratum


@settings(max_examples=150, deadline=None)
@given(GROUPED, st.integers(0, 99), st.randoms(use_true_random=False))
def test_groups_stay_whole_and_order_does_not_matter(
    drawn: list[tuple[int, int]], hundredths: int, random: object
) -> None:
    ids = ids_of(len(drawn))
    groups = [f"g{group}" for group, _ in drawn]
    strata = [f"s{stratum}" for _, stratum in drawn]
    wanted = Wanted(exact_share(hundredths / 100))
    found = split(ids, wanted, groups, strata)
    check_invariants(ids, groups, found)
    sizes = Counter(groups)
    taken = {g for g, side in zip(groups, found.splits, strict=True) if side == VALIDATION}
    held = sum(sizes[group] for group in taken)
    is_smallest_alone = len(taken) == 1 and held == min(sizes.values())
    assert held <= found.size or is_smallest_alone
    if found.size and len(sizes) > 1:
        assert held >= 1
    order = list(range(len(ids)))
    random.shuffle(order)  # type: ignore[attr-defined]
    again = split(
        *([values[row] for row in order] for values in (ids,)),
        wanted,
        [groups[row] for row in order],
        [strata[row] for row in order],
    )
    assert again.splits == [found.splits[row] for row in order]
    assert (again.warnings, again.conflicts) == (found.warnings, found.conflicts)


def test_a_group_takes_the_stratum_of_its_least_id() -> None:
    ids = sorted(ids_of(40))
    groups = [f"g{row % 20}" for row in range(40)]  # rows r and r + 20 are a group
    low = ["a" if row < 10 else "b" for row in range(20)]
    first = split(ids, Wanted(count=8), groups, [*low, *["c"] * 20])
    second = split(ids, Wanted(count=8), groups, [*low, *["d"] * 20])
    assert first.splits == second.splits
    held = [groups[row] for row in range(20) if first.splits[row] == VALIDATION]
    assert Counter(low[int(group[1:])] for group in held) == {"a": 2, "b": 2}


def test_groups_that_do_not_fit_are_skipped_for_later_ones_in_rank() -> None:
    ids = ids_of(12)
    groups = ["big"] * 8 + ids[8:]
    for seed in range(20):
        found = split(ids, Wanted(count=3), groups, seed=seed)
        assert found.splits[:8] == [TRAIN] * 8
        assert found.splits.count(VALIDATION) == 3


def test_the_smallest_group_is_taken_when_none_fits() -> None:
    ids = ids_of(9)
    groups = ["a"] * 4 + ["b"] * 3 + ["c"] * 2
    found = split(ids, Wanted(count=1), groups)
    assert found.splits == [TRAIN] * 7 + [VALIDATION] * 2
    assert "validation holds 2 images where 1 are wanted" in found.warnings[0]
    ties = {
        tuple(split(ids[:6], Wanted(count=1), ["a"] * 2 + ["b"] * 2 + ["c"] * 2, seed=s).splits)
        for s in range(30)
    }
    assert len(ties) == 3  # by rank, so by seed


def test_one_group_trains_with_a_warning() -> None:
    found = split(ids_of(5), groups=["one"] * 5)
    assert found.splits == [TRAIN] * 5
    assert "one duplicate group" in found.warnings[0]


def test_another_seed_is_another_split() -> None:
    ids = ids_of(200)
    draws = {tuple(split(ids, seed=seed).splits) for seed in range(5)}
    assert len(draws) == 5


def test_the_draw_is_uniform_over_ids() -> None:
    ids = ids_of(50)
    held: Counter[str] = Counter()
    for seed in range(300):
        found = split(ids, Wanted(count=10), seed=seed)
        held.update(i for i, side in zip(ids, found.splits, strict=True) if side == VALIDATION)
    # 300 draws at p = .2: mean 60, sd 6.9; five sd each way
    assert all(25 < held[id_] < 95 for id_ in ids)


def test_another_process_and_hash_seed_give_the_same_split() -> None:
    program = (
        "import json; from tests.test_split import *;"
        "ids = ids_of(97); groups = [f'g{i % 61}' for i in range(97)];"
        "strata = [f's{i % 5}' for i in range(97)];"
        "print(json.dumps(split(ids, Wanted(exact_share('.13')), groups, strata).splits))"
    )
    outputs = []
    for hash_seed in ("0", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        outputs.append(
            subprocess.run(
                [sys.executable, "-c", program],
                env=environment, cwd=PROJECT, check=True, capture_output=True, text=True,
            ).stdout
        )  # fmt: skip
    ids, groups = ids_of(97), [f"g{i % 61}" for i in range(97)]
    strata = [f"s{i % 5}" for i in range(97)]
    here = split(ids, Wanted(exact_share(".13")), groups, strata).splits
    assert [json.loads(text) for text in outputs] == [here, here]


# --- growth -----------------------------------------------------------------------------------


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, list[tuple[int, int]], list[int]]]:
    """Steps of (new images, pairs that a new edge joins, images that are rejected by then)."""
    steps, total = [], 0
    for _ in range(draw(st.integers(2, 5))):
        new = draw(st.integers(0 if total else 2, 12))
        total += new
        index = st.integers(0, total - 1)
        edges = draw(st.lists(st.tuples(index, index), max_size=4))
        steps.append((new, edges, draw(st.lists(index, max_size=3))))
    return steps


class Groups:
    """Union-find; a group is named by its least id."""

    def __init__(self, ids: list[str]) -> None:
        self.name = {id_: id_ for id_ in ids}

    def join(self, first: str, second: str) -> None:
        one, two = self.name[first], self.name[second]
        for id_, name in self.name.items():
            if name in (one, two):
                self.name[id_] = min(one, two)


@settings(max_examples=200, deadline=None)
@given(histories(), st.sampled_from(["automatic", ".1", ".5", "count", "none"]))
def test_growth_moves_nothing(
    steps: list[tuple[int, list[tuple[int, int]], list[int]]], mode: str
) -> None:
    wanted = {
        "automatic": AUTOMATIC,
        "count": Wanted(count=5),
        "none": Wanted(count=0),
    }.get(mode) or Wanted(exact_share(mode))
    everyone = ids_of(sum(new for new, _, _ in steps), mode)
    joined = Groups(everyone)
    stored: dict[str, str] = {}
    arrived = 0
    for new, edges, out in steps:
        arrived += new
        ids = everyone[:arrived]
        for first, second in edges:
            joined.join(ids[first], ids[second])
        groups = [joined.name[id_] for id_ in ids]
        kept = [row not in out for row in range(arrived)]
        before: list[str | None] = [stored.get(id_) for id_ in ids]
        found = split(ids, wanted, groups, None, before, kept, seed=3)
        for row in range(arrived):
            if before[row] is not None:
                assert found.splits[row] == before[row]  # nothing moves
            if kept[row]:
                assert found.splits[row] in (TRAIN, VALIDATION)
            else:
                assert found.reasons[row] is None  # not ours to reject
            if found.reasons[row] is not None:
                assert found.reasons[row] in (JOINED_VALIDATION, JOINED_TRAIN)
                assert before[row] is not None
        sides = defaultdict(set)
        for row, group in enumerate(groups):
            if kept[row] and found.reasons[row] is None:
                sides[group].add(found.splits[row])
        assert all(len(both) == 1 for both in sides.values())
        had_train = any(side == TRAIN for row, side in enumerate(before) if kept[row])
        is_anyone_new = any(kept[row] and before[row] is None for row in range(arrived))
        if had_train and sides:
            assert TRAIN in live(found, kept)
        assert found.num_images == len(live(found, kept))
        if wanted.mode != "none" and is_anyone_new and not stored and len(sides) > 1:
            assert VALIDATION in live(found, kept)
        stored |= {i: s for i, s in zip(ids, found.splits, strict=True) if s is not None}


def test_new_images_compete_for_what_is_lacking() -> None:
    ids = ids_of(1000)
    first = split(ids[:100], Wanted(exact_share(".05")))
    grown = split(ids, Wanted(exact_share(".05")), stored=[*first.splits, *[None] * 900])
    assert grown.splits[:100] == first.splits
    assert grown.splits.count(VALIDATION) == 50
    smaller = split(ids, Wanted(exact_share(".01")), stored=grown.splits)
    assert smaller.splits == grown.splits
    assert "50 images where 10 are wanted" in smaller.warnings[0]


def test_needs_of_strata_never_pass_what_is_lacking_in_all() -> None:
    """One stratum has too many already, so the others together may not take their full share."""
    ids = ids_of(60)
    strata = ["a"] * 20 + ["b"] * 20 + ["c"] * 20
    stored: list[str | None] = [VALIDATION] * 8 + [TRAIN] * 12 + [None] * 40
    found = split(ids, Wanted(count=12), strata=strata, stored=stored)
    assert found.splits.count(VALIDATION) == 12
    held = Counter(s for s, side in zip(strata, found.splits, strict=True) if side == VALIDATION)
    assert held == {"a": 8, "b": 2, "c": 2}
    stored[20:36] = [TRAIN] * 16  # b has four new images left, c twenty; both lack four
    found = split(ids, Wanted(count=12), strata=strata, stored=stored)
    held = Counter(s for s, side in zip(strata, found.splits, strict=True) if side == VALIDATION)
    assert held == {"a": 8, "b": 2, "c": 2}


def test_what_a_stratum_cannot_give_the_others_do() -> None:
    ids = ids_of(60)
    strata = ["a"] * 30 + ["b"] * 30
    stored: list[str | None] = [TRAIN] * 29 + [None] * 31
    found = split(ids, Wanted(count=20), strata=strata, stored=stored)
    held = Counter(s for s, side in zip(strata, found.splits, strict=True) if side == VALIDATION)
    assert held == {"a": 1, "b": 19}


A, B, C, D = ids_of(4, "case")
OTHERS = ids_of(6, "others")


def joined(
    stored: dict[str, str | None], out: tuple[str, ...] = (), rest: str = TRAIN
) -> dict[str, tuple[str | None, str | None]]:
    """One group of A to D, beside six other images on one side."""
    ids = [*stored, *OTHERS]
    found = split(
        ids,
        Wanted(count=1),
        ["one"] * len(stored) + OTHERS,
        stored=[*stored.values(), *[rest] * len(OTHERS)],
        kept=[id_ not in out for id_ in ids],
    )
    answers = zip(found.splits, found.reasons, strict=True)
    return {id_: answer for id_, answer in zip(ids, answers, strict=True) if id_ in stored}


def test_a_new_image_follows_the_group_it_joins() -> None:
    assert joined({A: VALIDATION, B: None}) == {A: (VALIDATION, None), B: (VALIDATION, None)}
    assert joined({A: TRAIN, B: None}) == {A: (TRAIN, None), B: (TRAIN, None)}


def test_where_two_sides_are_joined_validation_stays() -> None:
    assert joined({A: VALIDATION, B: TRAIN, C: None}) == {
        A: (VALIDATION, None),
        B: (TRAIN, JOINED_VALIDATION),
        C: (VALIDATION, None),
    }


def test_rejected_images_have_no_vote_where_others_have_a_side() -> None:
    """A is out for another reason: B still trains; A takes its side up again when it is back."""
    gone = joined({A: VALIDATION, B: TRAIN, C: None}, out=(A,))
    assert gone == {A: (VALIDATION, None), B: (TRAIN, None), C: (TRAIN, None)}
    back = joined({A: VALIDATION, B: TRAIN, C: TRAIN})
    assert back[B] == back[C] == (TRAIN, JOINED_VALIDATION)


def test_new_images_follow_a_rejected_twin() -> None:
    """So that a better copy of a validation image does not end in train."""
    assert joined({A: VALIDATION, B: None}, out=(A,))[B] == (VALIDATION, None)
    assert joined({A: TRAIN, B: None}, out=(A,))[B] == (TRAIN, None)
    assert joined({A: TRAIN, B: VALIDATION, C: None}, out=(A, B))[C] == (VALIDATION, None)


def test_a_rejected_image_without_a_side_gets_none() -> None:
    assert joined({A: None, B: None}, out=(A,))[A] == (None, None)


def test_train_is_never_emptied_by_a_join() -> None:
    ids = [A, B, C]
    found = split(ids, groups=["one"] * 3, stored=[VALIDATION, TRAIN, None])
    assert found.splits == [VALIDATION, TRAIN, TRAIN]
    assert found.reasons == [JOINED_TRAIN, None, None]
    assert joined({A: VALIDATION, B: TRAIN}, rest=VALIDATION)[A] == (VALIDATION, JOINED_TRAIN)


def test_the_conflict_is_listed() -> None:
    ids = [*sorted([A, B]), C]
    found = split([*ids, D], groups=["one"] * 3 + [D], stored=[VALIDATION, TRAIN, None, TRAIN])
    assert len(found.conflicts) == 1
    conflict = found.conflicts[0]
    assert conflict.group == min(ids)
    assert (conflict.validation, conflict.train) == ((ids[0],), (ids[1],))
    assert conflict.reason == JOINED_VALIDATION


def test_a_group_renamed_by_a_smaller_id_keeps_its_side() -> None:
    small, *rest = sorted(ids_of(30))
    first = split(rest)
    assert VALIDATION in first.splits
    row = first.splits.index(VALIDATION)
    groups = [small if index == row else id_ for index, id_ in enumerate(rest)]
    grown = split([*rest, small], groups=[*groups, small], stored=[*first.splits, None])
    assert grown.splits == [*first.splits, VALIDATION]


# --- by hand ----------------------------------------------------------------------------------


def test_whole_groups_follow_a_label() -> None:
    ids = ids_of(6)
    groups = ["a", "a", "b", "b", "c", "c"]
    labels = [VALIDATION, None, TRAIN, None, None, None]
    found = split(ids, groups=groups, labels=labels)
    assert found.splits == [VALIDATION] * 2 + [TRAIN] * 4
    assert found.size == 2
    assert found.conflicts == ()


def test_labels_on_both_sides_of_a_group_are_listed() -> None:
    ids = ids_of(4)
    found = split(ids, groups=["a", "a", "b", "b"], labels=[VALIDATION, TRAIN, TRAIN, None])
    assert found.splits == [VALIDATION] * 2 + [TRAIN] * 2
    assert [conflict.reason for conflict in found.conflicts] == ["labelled_both_ways"]
    assert found.conflicts[0].train == (ids[1],)


def test_a_stored_side_outlives_a_label_and_is_listed() -> None:
    ids = ids_of(3)
    found = split(ids, stored=[TRAIN, None, None], labels=[VALIDATION, VALIDATION, None])
    assert found.splits == [TRAIN, VALIDATION, TRAIN]
    assert [conflict.reason for conflict in found.conflicts] == ["stored_otherwise"]


def test_labels_may_not_empty_train() -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        split(ids_of(3), groups=["a", "a", "b"], labels=[VALIDATION, None, VALIDATION])


# --- largest remainder ------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.text(max_size=3), st.integers(0, 10**9), min_size=1, max_size=12),
    st.fractions(0, 1),
)
def test_largest_remainder(weights: dict[str, int], part: Fraction) -> None:
    whole = sum(weights.values())
    total = int(whole * part)
    shares = largest_remainder(total, weights, 1)
    assert sum(shares.values()) == total
    for name, weight in weights.items():
        assert 0 <= shares[name] <= weight
        if whole:
            assert abs(shares[name] - Fraction(total * weight, whole)) < 1
