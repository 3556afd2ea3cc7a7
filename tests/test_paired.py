"""Both intervals cover the truth as often as they say, and the arithmetic is the published one."""

from __future__ import annotations

import numpy as np
import pytest

from sdtrain.paired import compare


def matrices(seed: int, n: int, m: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    level = np.exp(-np.linspace(0, 3, m))[None, :] * rng.gamma(20, 0.05, size=(n, 1))
    a = level * (1 + 0.02 * rng.standard_normal((n, m)))
    effect = shift + 0.01 * rng.standard_normal((n, 1))  # images differ in what they gain
    b = a + level * (effect + 0.01 * rng.standard_normal((n, m)))
    return a, b


def test_change_is_the_difference_of_the_means() -> None:
    a, b = matrices(1, 8, 4, -0.02)
    found = compare(a, b)
    assert found.mean_a == pytest.approx(a.mean())
    assert found.change_percent == pytest.approx(100 * (b.mean() - a.mean()) / a.mean())
    assert found.direction == -1
    assert compare(a, a).change_percent == 0


def test_intervals_follow_the_formulas() -> None:
    a, b = matrices(2, 9, 5, 0.0)
    difference = 100 * (b - a) / a.mean()
    n, m = difference.shape
    steps = difference[:, 1:] - difference[:, :-1]
    total = sum((steps[i, j] - np.mean(steps[:, j])) ** 2 for i in range(n) for j in range(m - 1))
    error = (total / (2 * (n - 1) * (m - 1) * n * m)) ** 0.5
    found = compare(a, b)
    assert found.resolves_percent == pytest.approx(2 * error)
    new = np.std(difference.mean(1), ddof=1) / np.sqrt(n)
    low, high = found.ci95_new_images_percent or (0, 0)
    assert (high - low) / 2 == pytest.approx(2.306004 * new, rel=1e-5)  # t, 8 degrees of freedom


def test_too_little_data_gives_no_interval_rather_than_a_wrong_one() -> None:
    a, b = matrices(3, 1, 4, -0.5)
    assert compare(a, b).ci95_percent is None
    assert compare(a, b).ci95_new_images_percent is None
    assert compare(a, b).direction == 0
    a, b = matrices(3, 6, 1, -0.5)
    assert compare(a, b).ci95_percent is None
    assert compare(a, b).ci95_new_images_percent is not None
    a, b = matrices(3, 6, 2, -0.5)
    assert compare(a, b).ci95_percent is not None
    with pytest.raises(ValueError, match="one shape"):
        compare(a, b[:3])
    with pytest.raises(ValueError, match="finite"):
        compare(a, b * np.nan)


def test_the_interval_for_new_images_covers_the_truth() -> None:
    hits = 0
    for seed in range(400):
        a, b = matrices(seed, 16, 4, -0.01)
        low, high = compare(a, b).ci95_new_images_percent or (0, 0)
        hits += low <= -1.0 <= high
    assert hits / 400 > 0.92


def test_images_needed_shrinks_with_the_difference() -> None:
    a, b = matrices(4, 16, 4, -0.01)
    found = compare(a, b)
    few, many = found.images_needed(2.0), found.images_needed(0.2)
    assert few is not None
    assert many is not None
    assert many > 50 * few
