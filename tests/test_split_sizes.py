"""Split and duplicate groups at every size from 2 to 500, not only at those one thinks of."""

from __future__ import annotations

from collections import Counter, defaultdict
from decimal import ROUND_HALF_UP, Decimal

import numpy as np

from sdprep.assignment import TRAIN, VALIDATION, Assignment, assign
from sdprep.duplicate_groups import group_edges
from sdprep.near_edges import find_edges
from sdprep.near_search import Views
from sdprep.quotas import Wanted, exact_share
from sdprep.seeding import digest, rng_for
from sdprep.signatures import WHOLE

SIZES = range(2, 501)
NUM_SIZES = 499
IDS = [digest("image", number) for number in range(SIZES[-1])]


# --- split ----------------------------------------------------------------------------------------


def half_up(number: Decimal) -> int:
    return int(number.quantize(Decimal(1), ROUND_HALF_UP))


def automatic_size(n: int) -> int:
    """The rule as it stands in the specification."""
    size = max(half_up(Decimal("0.05") * n), min(8, half_up(Decimal("0.15") * n)))
    return max(1, min(size, 2048, n - 1))


def drawn(n: int) -> tuple[list[str], list[str], list[bool]]:
    """Groups of 1 to about 6 images, strata and verdicts of the first n images."""
    rng = rng_for("split sizes", n)
    groups = [f"g{group}" for group in rng.integers(0, max(2, n - n // (2 + n % 5)), n)]
    strata = [f"s{stratum}" for stratum in rng.integers(0, 1 + n % 6, n)]
    kept = [bool(keep) for keep in rng.random(n) < 0.9]
    return groups, strata, kept


def run(
    n: int,
    groups: list[str],
    strata: list[str],
    stored: list[str | None],
    kept: list[bool],
    wanted: Wanted,
) -> Assignment:
    return assign(IDS[:n], groups, strata, stored, kept, wanted=wanted, seed=n)


def test_singletons_give_exactly_k_at_every_size() -> None:
    checked = 0
    for n in SIZES:
        nothing: list[str | None] = [None] * n
        for wanted in (
            Wanted(),
            Wanted(exact_share((n * 37 % 99 + 1) / 100)),
            Wanted(count=n // 3),
        ):
            found = run(n, IDS[:n], drawn(n)[1], nothing, [True] * n, wanted)
            sides = Counter(found.splits)
            share = wanted.share or Decimal(0)
            expected = max(1, min(half_up(n * share) if share else n // 3, n - 1))
            if wanted == Wanted():
                expected = automatic_size(n)
            elif wanted.count == 0:
                expected = 0
            assert sides == Counter({VALIDATION: expected, TRAIN: n - expected}) - Counter(), n
            checked += 1
    assert checked == 3 * NUM_SIZES


def test_groups_stay_whole_whatever_the_order_at_every_size() -> None:
    checked = 0
    for n in SIZES:
        groups, strata, kept = drawn(n)
        found = run(n, groups, strata, [None] * n, kept, Wanted())
        sides = defaultdict(set)
        for row in range(n):
            assert (found.splits[row] is not None) >= kept[row]  # complete
            if kept[row]:
                assert found.splits[row] in (TRAIN, VALIDATION)
                sides[groups[row]].add(found.splits[row])
        assert all(len(both) == 1 for both in sides.values()), n  # pure
        held_out = [row for row in range(n) if kept[row] and found.splits[row] == VALIDATION]
        sizes = Counter(group for group, keep in zip(groups, kept, strict=True) if keep)
        k = automatic_size(sum(kept)) if sum(kept) > 1 else 0
        assert found.num_images == sum(kept)
        assert found.size == k
        if len(sizes) > 1:
            assert held_out, n
            assert {side for both in sides.values() for side in both} == {TRAIN, VALIDATION}
            assert len(held_out) <= max(k, min(sizes.values())), n
        order = rng_for("order", n).permutation(n).tolist()
        mixed = assign(
            [IDS[row] for row in order],
            [groups[row] for row in order],
            [strata[row] for row in order],
            [None] * n,
            [kept[row] for row in order],
            wanted=Wanted(),
            seed=n,
        )
        assert mixed.splits == [found.splits[row] for row in order], n
        checked += 1
    assert checked == NUM_SIZES


def test_growth_to_every_size_moves_no_image() -> None:
    """Half of the images come first; the others join old groups, or found new ones."""
    checked, moved_in = 0, 0
    for n in SIZES:
        groups, strata, _ = drawn(n)
        half, kept = n // 2, [True] * n
        before = run(half, groups[:half], strata[:half], [None] * half, kept[:half], Wanted())
        stored = before.splits + [None] * (n - half)
        after = run(n, groups, strata, stored, kept, Wanted())
        assert after.splits[:half] == before.splits, n
        assert after.reasons == [None] * n  # no group was joined with another one
        old = dict(zip(groups[:half], before.splits, strict=True))
        for row in range(half, n):
            if groups[row] in old:
                assert after.splits[row] == old[groups[row]], n
                moved_in += 1
        again = run(n, groups, strata, after.splits, kept, Wanted())
        assert again.splits == after.splits
        checked += 1
    assert checked == NUM_SIZES
    assert moved_in > 10_000


# --- groups of duplicates -------------------------------------------------------------------------


def strangers(n: int) -> Views:
    """Images whose signatures are about half of the bits apart, only the whole of each usable."""
    rng = rng_for("strangers", n)
    upright = np.zeros((n, 8, 16), np.uint8)
    upright[:, WHOLE] = rng.integers(0, 256, (n, 16))
    upright[:, WHOLE, 15] &= 254  # the spare bit: not flat
    usable = np.zeros((n, 8), bool)
    usable[:, WHOLE] = True
    trim = np.tile([0, 0, 256, 256], (n, 1))
    cells = rng.integers(0, 256, (n, 16, 16), np.uint8)
    thumbnails = np.kron(cells, np.ones((1, 4, 4), np.uint8))
    mirrored = rng.integers(0, 256, (n, 2, 16)).astype(np.uint8)
    return Views(upright, mirrored, usable, trim, thumbnails)


def flipped(signature: np.ndarray, bits: int, rng: np.random.Generator) -> np.ndarray:
    places = rng.permutation(127)[:bits]
    mask = np.zeros(128, np.uint8)
    mask[places] = 1
    return signature ^ np.packbits(mask)


def planted(n: int) -> tuple[Views, list[tuple[int, int]]]:
    """Strangers with up to six twins among them, and up to four pairs that only look alike.

    Twins are 0 to 28 bits apart, some mirrored, some in chains. Of those that look alike, some have
    close signatures and other thumbnails, some the same signature and no contrast.
    """
    views, rng = strangers(n), rng_for("planted", n)
    rows = rng.permutation(n).tolist()
    edges: list[tuple[int, int]] = []
    for number in range(min(6, n // 2)):
        one = edges[-1][1] if number % 4 == 3 else rows.pop()  # a chain of three
        two = rows.pop()
        bits = int(rng.integers(0, 29))
        twin = flipped(views.upright[one, WHOLE], bits, rng)
        thumbnail = views.thumbnails[one]
        if number % 3 == 1:
            views.mirrored[two, WHOLE] = twin
            views.thumbnails[two] = thumbnail[:, ::-1]
        else:
            views.upright[two, WHOLE] = twin
            views.thumbnails[two] = thumbnail
        edges.append((one, two))
    for number in range(min(4, len(rows) // 2)):
        one, two = rows.pop(), rows.pop()
        bits = 0 if number % 2 else int(rng.integers(0, 29))
        views.upright[two, WHOLE] = flipped(views.upright[one, WHOLE], bits, rng)
        if number % 2:
            views.thumbnails[two] = views.thumbnails[one]
            views.usable[two, WHOLE] = False
            views.upright[two, WHOLE, 15] |= 1
    return views, edges


def components(n: int, edges: list[tuple[int, int]]) -> set[frozenset[int]]:
    """Groups by painting: every edge gives both sides one colour, until nothing changes."""
    colours = list(range(n))
    changed = True
    while changed:
        changed = False
        for one, two in edges:
            low = min(colours[one], colours[two])
            changed |= colours[one] != low or colours[two] != low
            colours[one] = colours[two] = low
    return {frozenset(r for r in range(n) if colours[r] == c) for c in set(colours)}


def groups_of(views: Views, ids: list[str]) -> set[frozenset[str]]:
    found = find_edges(views, threads=1)
    names = group_edges(ids, [edge[:2] for edge in found.edges])
    by_name = defaultdict(set)
    for id_, name in zip(ids, names, strict=True):
        by_name[name].add(id_)
    assert all(name == min(members) for name, members in by_name.items())
    return {frozenset(members) for members in by_name.values()}


def test_planted_twins_are_found_and_no_stranger_is_merged_at_every_size() -> None:
    checked, num_edges = 0, 0
    for n in SIZES:
        views, edges = planted(n)
        expected = {frozenset(IDS[row] for row in group) for group in components(n, edges)}
        assert groups_of(views, IDS[:n]) == expected, n
        order = rng_for("mixed", n).permutation(n)
        parts = {name: part[order] for name, part in vars(views).items() if part is not None}
        assert groups_of(Views(**parts), [IDS[row] for row in order]) == expected, n
        checked += 1
        num_edges += len(edges)
    assert checked == NUM_SIZES
    assert num_edges > 2900
