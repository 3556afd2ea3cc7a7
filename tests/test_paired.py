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


def spread(n: int, m: int, seed: int = 0) -> np.ndarray:
    """(n, m) levels as the lattice lays them: each column the reverse of the one before."""
    order = np.random.default_rng(seed).permutation(n)[:, None]
    place = np.where(np.arange(m) % 2 == 0, order, n - 1 - order)
    return (np.arange(m) + (place + 0.5) / n) / m


def test_intervals_follow_the_formulas() -> None:
    a, b = matrices(2, 9, 5, 0.0)
    ratio = b.mean() / a.mean()
    departure = 100 * (b - ratio * a) / a.mean()
    n, m = departure.shape
    steps = departure[:, 1:] - departure[:, :-1]
    total = sum((steps[i, j] - np.mean(steps[:, j])) ** 2 for i in range(n) for j in range(m - 1))
    error = (total / (2 * (n - 1) * (m - 1) * n * m)) ** 0.5
    found = compare(a, b)
    assert found.resolves_percent == pytest.approx(2 * error)
    new = np.std(departure.mean(1), ddof=1) / np.sqrt(n)
    low, high = found.ci95_new_images_percent or (0, 0)
    assert (high - low) / 2 == pytest.approx(2.306004 * new, rel=1e-5)  # t, 8 degrees of freedom


def test_slopes_within_a_level_are_regressed_out() -> None:
    a, b = matrices(2, 9, 5, 0.0)
    u = spread(9, 5)
    departure = 100 * (b - b.mean() / a.mean() * a) / a.mean()
    total = 0.0
    for k in range(4):
        steps = departure[:, k + 1] - departure[:, k]
        line = np.polyfit(u[:, k], steps, 1)
        total += ((steps - np.polyval(line, u[:, k])) ** 2).sum()
    error = (total / (2 * (9 - 2) * (5 - 1) * 9 * 5)) ** 0.5
    assert compare(a, b, u).resolves_percent == pytest.approx(2 * error)
    tilted = a * (1.3 - 0.4 * (u * 5 % 1))  # falls in a line within every level
    sharp, blunt = compare(np.ones_like(a), tilted / a, u), compare(np.ones_like(a), tilted / a)
    assert sharp.resolves_percent == pytest.approx(0, abs=1e-9)
    assert (blunt.resolves_percent or 0) > 1


def test_one_percentage_on_all_images_is_certain_however_they_differ() -> None:
    a, _ = matrices(2, 9, 5, 0.0)
    found = compare(a, 1.05 * a)
    assert found.ci95_percent == pytest.approx((5, 5))
    assert found.ci95_new_images_percent == pytest.approx((5, 5))


def test_two_levels_are_judged_by_their_difference() -> None:
    a, b = matrices(5, 9, 2, 0.0)
    departure = 100 * (b - b.mean() / a.mean() * a) / a.mean()
    residual = departure - departure.mean(1, keepdims=True) - departure.mean(0) + departure.mean()
    error = ((residual**2).sum() / (9 - 1)) ** 0.5 / (9 * 2) ** 0.5  # of images and levels
    found = compare(a, b)
    assert found.resolves_percent == pytest.approx(2 * error)
    low, high = found.ci95_percent or (0, 0)
    assert (high - low) / 2 == pytest.approx(2.306004 * error, rel=1e-5)


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
    for shift in (-0.01, 0.3):  # in percent of a loss that is itself one of these images only
        hits = 0
        for seed in range(400):
            a, b = matrices(seed, 16, 4, shift)
            low, high = compare(a, b).ci95_new_images_percent or (0, 0)
            hits += low <= 100 * shift <= high
        assert 0.92 < hits / 400 < 0.98


def test_images_needed_shrinks_with_the_difference() -> None:
    a, b = matrices(4, 16, 4, -0.01)
    found = compare(a, b)
    few, many = found.images_needed(2.0), found.images_needed(0.2)
    assert few is not None
    assert many is not None
    assert many > 50 * few
