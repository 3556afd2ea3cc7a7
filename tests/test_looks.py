"""Many looks at one run are one chance more, not one each."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from sdtrain.looks import over_looks
from sdtrain.paired import holm


def changes_of(rng: np.random.Generator, num_looks: int, num_images: int) -> np.ndarray:
    """Looks that settle: each moves half as far from the one before, and nothing has changed."""
    steps = rng.standard_normal((num_looks, num_images)) * 0.5 ** np.arange(num_looks)[:, None]
    return steps.cumsum(0)


def alone(changes: np.ndarray) -> list[float]:
    return [float(p) for p in ttest_1samp(changes, 0, axis=1).pvalue]


def test_all_signs_are_counted_one_by_one() -> None:
    """Step-down max-t, written out for seven images and three looks."""
    changes = changes_of(np.random.default_rng(1), 3, 7) - 0.8

    def t_values(of: np.ndarray) -> np.ndarray:
        return np.abs(ttest_1samp(of, 0, axis=1).statistic)

    seen = t_values(changes)
    drawn = [t_values(changes * np.array(signs)) for signs in product((1, -1), repeat=7)]
    expected, least = {}, 0.0
    left = sorted(range(3), key=lambda look: -seen[look])
    while left:
        share = np.mean([max(t[look] for look in left) >= seen[left[0]] - 1e-9 for t in drawn])
        least = expected[left.pop(0)] = max(least, float(share))
    found = over_looks(changes, alone(changes))
    assert found == pytest.approx([expected[look] for look in range(3)])


@pytest.mark.parametrize("num_images", [8, 24])
def test_nothing_is_seldom_taken_for_something_and_something_often_seen(num_images: int) -> None:
    rng, runs = np.random.default_rng(0), 400
    false = found = by_holm = 0
    for _ in range(runs):
        changes = changes_of(rng, 20, num_images)
        false += min(over_looks(changes, alone(changes))) <= 0.05
        moved = changes - 1.15 * 3 / np.sqrt(num_images)
        found += over_looks(moved, alone(moved))[-1] <= 0.05
        by_holm += holm(alone(moved))[-1] <= 0.05
    assert false <= 0.05 * runs + 3 * np.sqrt(0.05 * 0.95 * runs)
    assert found > by_holm + 0.2 * runs


def test_one_look_and_few_images_keep_their_own_test() -> None:
    rng = np.random.default_rng(2)
    one = changes_of(rng, 1, 12) - 1
    assert over_looks(one, alone(one)) == alone(one)
    few = changes_of(rng, 4, 5) - 1
    assert over_looks(few, alone(few)) == holm(alone(few))


def test_changes_without_any_scatter_are_certain_and_none_is_none() -> None:
    changes = np.array([[-0.1] * 8, [0.0] * 8, [-0.1] * 8])
    first, none, last = over_looks(changes, [0.0, 1.0, 0.0])
    assert first == last == 2 / 2**8
    assert none == 1.0
