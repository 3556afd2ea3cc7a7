"""Both intervals cover the truth as often as they say, and the arithmetic is the published one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t

from sdtrain.paired import compare
from sdtrain.wording import sentence


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


def t_of(a: np.ndarray, b: np.ndarray, change: float) -> tuple[float, float]:
    """How many standard errors b - (1 + change) a lies from 0: on this set, for new images."""
    rest = b - (1 + change) * a
    n, m = rest.shape
    steps = rest[:, 1:] - rest[:, :-1]
    total = sum((steps[i, j] - np.mean(steps[:, j])) ** 2 for i in range(n) for j in range(m - 1))
    error = (total / (2 * (n - 1) * (m - 1) * n * m)) ** 0.5
    new = np.std(rest.mean(1), ddof=1) / np.sqrt(n)
    return rest.mean() / error, rest.mean() / new


def test_intervals_end_where_the_paired_t_test_would_begin_to_refuse() -> None:
    for shift in (0.0, 0.3):
        a, b = matrices(2, 9, 5, shift)
        found = compare(a, b)
        low, high = found.ci95_percent or (0, 0)
        new_low, new_high = found.ci95_new_images_percent or (0, 0)
        # 2/3 * 8 * 4 degrees of freedom, and 8
        assert t_of(a, b, low / 100)[0] == pytest.approx(2.0796, rel=1e-3)
        assert t_of(a, b, high / 100)[0] == pytest.approx(-2.0796, rel=1e-3)
        assert t_of(a, b, new_low / 100)[1] == pytest.approx(2.306004, rel=1e-5)
        assert t_of(a, b, new_high / 100)[1] == pytest.approx(-2.306004, rel=1e-5)
        assert low < found.change_percent < high


def test_no_change_is_tested_by_the_differences_alone() -> None:
    a, b = matrices(2, 9, 5, -0.004)
    here, new = t_of(a, b, 0.0)
    found = compare(a, b)
    assert found.p_value == pytest.approx(2 * t.sf(abs(here), 2 / 3 * 8 * 4))
    assert found.p_value_new_images == pytest.approx(2 * t.sf(abs(new), 8))
    for seed in range(40):
        found = compare(*matrices(seed, 6, 4, -0.008))
        assert (found.direction != 0) == ((found.p_value or 0) < 0.05)
        assert (found.direction_new_images != 0) == ((found.p_value_new_images or 0) < 0.05)


def test_two_images_give_a_bound_although_their_loss_itself_is_uncertain() -> None:
    a, b = matrices(6, 2, 4, -0.5)
    low, high = compare(a, b).ci95_new_images_percent or (0, 0)
    assert -1e4 < low < compare(a, b).change_percent < high < 1e4


def test_slopes_within_a_level_are_regressed_out() -> None:
    a, b = matrices(2, 9, 5, 0.0)
    u = spread(9, 5)
    difference = 100 * (b - a) / a.mean()
    total = 0.0
    for k in range(4):
        steps = difference[:, k + 1] - difference[:, k]
        line = np.polyfit(u[:, k], steps, 1)
        total += ((steps - np.polyval(line, u[:, k])) ** 2).sum()
    error = (total / (2 * (9 - 2) * (5 - 1) * 9 * 5)) ** 0.5
    assert compare(a, b, u).resolves_percent == pytest.approx(2 * error)
    tilted = a * (1.3 - 0.4 * (u * 5 % 1))  # falls in a line within every level
    sharp, blunt = compare(np.ones_like(a), tilted / a, u), compare(np.ones_like(a), tilted / a)
    sharp_low, sharp_high = sharp.ci95_percent or (0, 9)
    low, high = blunt.ci95_percent or (0, 0)
    assert sharp_high - sharp_low < 0.05 * (high - low)


def test_one_percentage_on_all_images_is_certain_however_they_differ() -> None:
    a, _ = matrices(2, 9, 5, 0.0)
    found = compare(a, 1.05 * a)
    assert found.ci95_percent == pytest.approx((5, 5))
    assert found.ci95_new_images_percent == pytest.approx((5, 5))


def test_what_did_not_move_says_nothing_of_what_would_be_seen() -> None:
    a, _ = matrices(2, 9, 5, 0.0)
    found = compare(a, a.copy())
    assert (found.change_percent, found.ci95_percent, found.p_value) == (0, (0, 0), 1)
    assert found.resolves_percent is None
    assert found.resolves_new_images_percent is None
    assert found.images_needed(0.1) is None
    assert sentence(found) == "A and B are the same here: not one loss differs."


def test_two_levels_are_judged_by_their_difference() -> None:
    a, b = matrices(5, 9, 2, 0.0)
    plain = 100 * (b - a) / a.mean()
    rest = plain - plain.mean(1, keepdims=True) - plain.mean(0) + plain.mean()
    still = ((rest**2).sum() / (9 - 1)) ** 0.5 / (9 * 2) ** 0.5
    found = compare(a, b)
    assert found.resolves_percent == pytest.approx(2 * still)
    assert found.p_value == pytest.approx(2 * t.sf(abs(100 * (b - a).mean() / a.mean()) / still, 8))


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
