"""The lattice is equispaced, its warp integrates to one, and the estimate is unbiased."""

from __future__ import annotations

import numpy as np
import pytest

from sdtrain.lattice import FLAT, NUM_STRATA, Warp, lattice, pilot_points, warp_from_pilot


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (7, 3), (64, 4), (5, 16)])
def test_points_are_equispaced_and_every_image_sees_every_part(n: int, m: int) -> None:
    points = lattice(5, "validation", n, m)
    assert points.shape == (n, m)
    gaps = np.diff(np.sort(points.ravel()))
    assert gaps == pytest.approx(np.full(n * m - 1, 1 / (n * m)), abs=1e-12)
    assert (np.floor(points * m) == np.arange(m)).all()


def test_neighbouring_levels_reverse_the_order_of_images() -> None:
    points = lattice(5, "validation", 8, 4) * 4 % 1
    assert (np.argsort(points[:, 0]) == np.argsort(points[:, 1])[::-1]).all()
    assert (np.argsort(points[:, 0]) == np.argsort(points[:, 2])).all()


def test_sets_and_seeds_have_points_of_their_own() -> None:
    base = lattice(5, "validation", 8, 4)
    assert (lattice(5, "validation", 8, 4) == base).all()
    assert (lattice(6, "validation", 8, 4) != base).any()
    assert (lattice(5, "train_probe", 8, 4) != base).any()


def test_warp_is_a_density_and_its_quantile_inverts_it() -> None:
    means = np.exp(-np.linspace(0, 8, NUM_STRATA))
    warp = warp_from_pilot(means)
    assert sum(warp.steps) == NUM_STRATA * 64
    assert min(warp.steps) >= 6
    assert all(a >= b for a, b in zip(warp.steps, warp.steps[1:], strict=False))
    v = (np.arange(100_000) + 0.5) / 100_000
    u = warp.quantile(v)
    assert (np.diff(u) > 0).all()
    assert u.min() >= 0
    assert u.max() < 1
    # drawing u = Q(v) and dividing by q(u) integrates any function over uniform u
    assert np.mean(np.sin(3 * u) / warp.density(u)) == pytest.approx((1 - np.cos(3)) / 3, abs=1e-4)
    assert FLAT.quantile(v) == pytest.approx(v)


def test_a_tiny_difference_between_devices_does_not_move_the_warp() -> None:
    means = np.random.default_rng(0).gamma(2.0, size=NUM_STRATA)
    assert warp_from_pilot(means) == warp_from_pilot(means * (1 + 1e-6))
    assert warp_from_pilot(np.zeros(NUM_STRATA)) == FLAT
    with pytest.raises(AssertionError):
        Warp((64,) * 31 + (65,))


def test_the_pilot_visits_every_stratum_and_cycles_through_the_images() -> None:
    images, levels = pilot_points(1, "validation", 5)
    assert (np.floor(levels * NUM_STRATA) == np.repeat(np.arange(NUM_STRATA), 2)).all()
    assert images.tolist() == [k % 5 for k in range(64)]


def test_warped_estimate_resolves_a_small_change_on_the_published_surrogate() -> None:
    """RMSE of the relative change with 16, 32 and 64 levels; train.md's offline surrogate."""
    t = np.arange(1000)
    betas = np.linspace(np.sqrt(0.00085), np.sqrt(0.012), 1000) ** 2
    alphas = np.cumprod(1 - betas)
    s = np.log(alphas / (1 - alphas))
    level = np.exp(-2.10348 + 0.6008 * s - 0.0374 * s**2 - 0.00194 * s**3)
    for count, most in ((16, 0.10), (32, 0.070), (64, 0.049)):
        errors, iid, buckets = [], [], []
        for z_seed in range(5):
            z = np.random.default_rng(z_seed).standard_normal(1000)
            delta = level * (-0.022094 + 0.003134 * s + z * (0.0012 + 0.019 * (t / 1000) ** 1.7))
            truth = delta.sum() / level.sum()

            def miss(
                step: np.ndarray,
                weight: np.ndarray | float = 1.0,
                delta: np.ndarray = delta,
                truth: float = truth,
            ) -> float:
                return float(100 * ((delta[step] * weight).mean() / level.mean() - truth))

            for pilot in range(5):
                _, at = pilot_points(pilot, "validation", 8)
                means = level[(at * 1000).astype(int)].reshape(NUM_STRATA, -1).mean(1)
                warp = warp_from_pilot(means)
                for offset in range(40):
                    v = (np.arange(count) + (offset + 0.5) / 40) / count
                    u = warp.quantile(v)
                    errors.append(miss((u * 1000).astype(int), 1 / warp.density(u)))
            rng = np.random.default_rng(100 + z_seed)
            for _ in range(400):
                iid.append(miss(rng.integers(1000, size=count)))
                quarter = 250 * (np.arange(count) % 4)
                buckets.append(miss(quarter + rng.integers(250, size=count)))
        rmse, of_iid, of_buckets = (np.sqrt(np.mean(np.square(e))) for e in (errors, iid, buckets))
        assert rmse <= most, f"{count} levels: {rmse:.4f} %"
        assert of_iid / rmse >= 3.8, f"{count} levels: iid {of_iid:.4f} %"
        assert of_buckets / rmse >= 1.4, f"{count} levels: four buckets {of_buckets:.4f} %"
        assert abs(np.mean(errors)) <= 0.005
