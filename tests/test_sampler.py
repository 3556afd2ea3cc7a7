"""The global order: every row once an epoch, the same for any start, storage and micro-batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdprep.buckets import bucket_list
from sdprep.errors import DataError
from sdprep.seeding import integer
from sdtrain.buckets import GlobalOrder, Slot, Text, assign, micro_batches, require_enough
from sdtrain.loader import plan_micro_batches

BUCKETS = bucket_list(64, 8)


class SizedRows:
    """Rows that have ids and sizes, and no pictures."""

    def __init__(self, ids: Sequence[str], sizes_hw: Sequence[tuple[int, int]]) -> None:
        self.ids, self.sizes_hw = list(ids), np.array(sizes_hw, np.int64).reshape(-1, 2)
        self.refused: dict[int, str] = {}
        self.repeats = np.ones(len(self.ids), np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return [{"id": self.ids[row]} for row in rows]

    def image(self, row: int) -> Any:
        raise NotImplementedError


def some_rows(count: int) -> SizedRows:
    sizes = [(100, 100), (80, 160), (160, 80), (120, 100)]
    return SizedRows([f"id{n:03d}" for n in range(count)], [sizes[n % 4] for n in range(count)])


def order_of(rows: SizedRows, *, run_samples: int = 4, window: int = 7, **options: Any) -> Any:
    def render(wanted: Sequence[int], visits: Sequence[int]) -> list[Text]:
        ids = [rows.ids[row] for row in wanted]
        pairs = zip(ids, visits, strict=True)
        return [Text(f"{i} {v}", False, 1 + integer("c", i, v) % 2) for i, v in pairs]

    assignment = assign(rows, BUCKETS, 1.0)
    options = {"seed": 1, "run_samples": run_samples, "window": window, **options}
    return GlobalOrder(rows.ids, assignment, render, **options)


def keys(slots: Sequence[Slot]) -> list[tuple[str, int]]:
    return [(slot.sample_id, slot.visit) for slot in slots]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 50),
    st.integers(1, 20),
    st.integers(0, 3),
)
def test_every_row_comes_once_per_epoch(
    count: int, run: int, window: int, stripe: int, seed: int
) -> None:
    rows = some_rows(count)
    order = order_of(rows, seed=seed, run_samples=run, window=window, stripe=stripe)
    slots = list(islice(order.slots(), 3 * count))
    for epoch in range(3):
        part = slots[epoch * count : (epoch + 1) * count]
        assert {slot.visit for slot in part} == {epoch}
        assert Counter(slot.sample_id for slot in part) == Counter(some_rows(count).ids)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 130), st.integers(1, 50), st.integers(1, 20))
def test_a_resumed_stream_is_the_suffix(count: int, start: int, window: int, stripe: int) -> None:
    order = order_of(some_rows(count), window=window, stripe=stripe)
    whole = list(islice(order.slots(), start + 50))
    assert list(islice(order.slots(start), 50)) == whole[start:]


@pytest.mark.parametrize("start", [0, 150, 399, 400, 777])
def test_only_the_prompts_of_one_stripe_are_rendered_ahead(start: int) -> None:
    rendered: list[int] = []
    rows = some_rows(400)

    def render(wanted: Sequence[int], visits: Sequence[int]) -> list[Text]:
        rendered.extend(wanted)
        return [Text("", False, 1)] * len(wanted)

    options: dict[str, Any] = {"seed": 1, "run_samples": 1, "window": 200, "stripe": 40}
    order = GlobalOrder(rows.ids, assign(rows, BUCKETS, 1.0), render, **options)
    next(order.slots(start))
    assert 0 < len(rendered) < 40 + 16  # a stripe ends with a block, of 16 runs


def test_a_stripe_has_few_buckets_and_few_short_runs() -> None:
    def num_runs(**options: Any) -> int:
        rows = some_rows(4_000)
        assignment = assign(rows, BUCKETS, 1.0)
        order = GlobalOrder(
            rows.ids,
            assignment,
            lambda wanted, visits: [Text("", False, 1 + row % 3 // 2) for row in wanted],
            seed=1,
            **{"run_samples": 16, **options},
        )
        kinds = [(s.bucket, s.text.num_chunks) for s in islice(order.slots(), 4_000)]
        return 1 + sum(a != b for a, b in zip(kinds, kinds[1:], strict=False))

    together, plain = num_runs(window=4_000, stripe=500), num_runs(window=500)
    assert together < 0.93 * plain
    assert together < 1.08 * num_runs(window=4_000)


def test_the_order_does_not_depend_on_how_rows_are_stored() -> None:
    rows = some_rows(30)
    backwards = SizedRows(rows.ids[::-1], [tuple(size) for size in rows.sizes_hw[::-1]])
    for options in ({}, {"window": 20, "stripe": 6}):
        expected = keys(list(islice(order_of(rows, **options).slots(), 60)))
        assert keys(list(islice(order_of(backwards, **options).slots(), 60))) == expected


def test_epochs_and_seeds_differ() -> None:
    def ids(seed: int, start: int) -> list[str]:
        stream = order_of(some_rows(30), seed=seed).slots(start)
        return [slot.sample_id for slot in islice(stream, 30)]

    assert ids(1, 0) != ids(1, 30)
    assert ids(1, 0) != ids(2, 0)


def test_runs_are_of_one_bucket_and_chunk_count() -> None:
    order = order_of(some_rows(64), run_samples=4, window=64)
    kinds = [(s.bucket, s.text.num_chunks) for s in islice(order.slots(), 64)]
    changes = sum(a != b for a, b in zip(kinds, kinds[1:], strict=False))
    # 64 rows in about 6 kinds and runs of four: some 20 runs, where chance would change 50 times.
    assert changes <= 64 // 4 + len(set(kinds)) - 1
    assert len(set(kinds)) >= 5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 60), st.integers(1, 9))
def test_only_the_last_step_is_short(count: int, total: int, batch: int) -> None:
    steps = list(order_of(some_rows(count)).steps(0, total, batch))
    sizes = [len(step.slots) for step in steps]
    assert sum(sizes) == total
    assert all(size == batch for size in sizes[:-1])
    assert [step.samples_seen for step in steps] == [batch * i for i in range(len(steps))]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9))
def test_micro_batches_cover_a_step_and_never_mix_shapes(count: int, size: int) -> None:
    slots = list(islice(order_of(some_rows(30)).slots(), count))
    groups = micro_batches(slots, size)
    assert sorted(position for group in groups for position in group) == list(range(count))
    for group in groups:
        assert len(group) <= size
        assert len({(slots[p].bucket, slots[p].text.num_chunks) for p in group}) == 1


class UniformLevels:
    """The part of a family that noise levels pass through."""

    @staticmethod
    def density(v: Any, tokens: int | None = None) -> Any:
        return v


def levels(size: int, timesteps: str = "stratified") -> dict[tuple[str, int], float]:
    steps = order_of(some_rows(20)).steps(0, 40, 8)
    family: Any = UniformLevels()
    found = {}
    for micro in plan_micro_batches(steps, family, seed=3, size=size, timesteps=timesteps):
        found |= dict(zip(keys(micro.slots), micro.u, strict=True))
    return found


def test_noise_levels_do_not_depend_on_the_micro_batch() -> None:
    assert levels(1) == levels(3) == levels(8)
    assert len(levels(1)) == 40


def test_noise_levels_are_spread_over_the_whole_step() -> None:
    values = list(levels(3).items())
    first = order_of(some_rows(20)).steps(0, 8, 8)
    wanted = keys(next(first).slots)
    strata = sorted(int(u * 8) for key, u in values if key in wanted)
    assert strata == list(range(8))
    assert levels(3, "iid") != levels(3)


def test_upscaled_rows_are_refused_with_the_reason() -> None:
    rows = SizedRows(["big", "small"], [(100, 100), (32, 100)])
    assignment = assign(rows, BUCKETS, 1.0)
    assert assignment.kept.tolist() == [0]
    assert "small of 100x32 px would grow" in assignment.refused[1]
    assert assignment.reasons() == {"upscale": 1}
    assert assign(rows, BUCKETS, 2.0).kept.tolist() == [0, 1]


def test_an_image_of_exactly_the_bucket_is_kept() -> None:
    rows = SizedRows(["exact", "short"], [(64, 64), (63, 64)])
    assert assign(rows, BUCKETS, 1.0).kept.tolist() == [0]


def test_more_than_a_fifth_refused_stops_the_run() -> None:
    sizes = [(100, 100)] * 8 + [(20, 20)] * 2
    rows = SizedRows([str(n) for n in range(10)], sizes)
    require_enough(assign(rows, BUCKETS, 1.0), "train", 10)  # exactly a fifth
    rows = SizedRows([str(n) for n in range(10)], [(20, 20), *sizes[1:]])
    with pytest.raises(DataError, match=r"3 of 10 rows are refused \(upscale 3\)"):
        require_enough(assign(rows, BUCKETS, 1.0), "train", 10)
    with pytest.raises(DataError, match="has no rows"):
        require_enough(assign(SizedRows([], []), BUCKETS, 1.0), "train", 0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=20),
    st.integers(1, 30),
    st.integers(0, 90),
)
def test_repeats_come_so_often_per_epoch_with_visits_of_their_own(
    repeats: list[int], window: int, start: int
) -> None:
    rows = some_rows(len(repeats))
    order = order_of(rows, window=window, repeats=np.array(repeats))
    assert order.epoch_samples == sum(repeats)
    slots = list(islice(order.slots(), 3 * sum(repeats)))
    for epoch in range(3):
        part = slots[epoch * sum(repeats) : (epoch + 1) * sum(repeats)]
        expected = [
            (f"id{row:03d}", epoch * times + copy)
            for row, times in enumerate(repeats)
            for copy in range(times)
        ]
        assert sorted(keys(part)) == expected
        assert all(slot.text.prompt == f"{slot.sample_id} {slot.visit}" for slot in part)
    assert list(islice(order.slots(start), 20)) == list(islice(order.slots(), start + 20))[start:]


def test_repeats_of_once_change_nothing_and_refused_rows_do_not_shift_them() -> None:
    rows = some_rows(30)
    plain = list(islice(order_of(rows).slots(), 60))
    assert list(islice(order_of(rows, repeats=np.ones(30, np.int64)).slots(), 60)) == plain
    rows.refused = {0: "broken: id000", 7: "broken: id007"}
    order = order_of(rows, repeats=np.arange(1, 31))
    counts = Counter(slot.sample_id for slot in islice(order.slots(), order.epoch_samples))
    assert counts == {f"id{n:03d}": n + 1 for n in range(30) if n not in (0, 7)}


def test_a_million_refusals_are_counted_without_their_words() -> None:
    sizes = [(100, 100)] * 5 + [(20, 20)] * 3
    rows = SizedRows([f"id{n}" for n in range(8)], sizes)
    rows.refused = {2: "truncated: id2"}
    refused = assign(rows, BUCKETS, 1.0).refused
    assert refused.reasons() == {"truncated": 1, "upscale": 3}
    assert list(refused) == [2, 5, 6, 7]
    assert refused.examples(2) == ["truncated: id2", refused[5]]
    assert "id5 of 20x20 px" in refused[5]
    assert 0 not in refused
