"""Schedules as functions of samples seen, and the optimizer they drive."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdprep.errors import RecipeError, UserError
from sdprep.plugins import config_for, configs
from sdprep.recipe import options
from sdtrain.schedule import Schedule

NAMES = ("constant", "cosine", "linear", "polynomial", "wsd")
"""Those that rise once, to the full rate."""


def schedule(name: str, total: int, **settings: object) -> Schedule:
    return config_for("schedule", name)(**settings).build(total)


def test_every_schedule_is_tested_here() -> None:
    assert sorted(configs("schedule")) == sorted(
        [*NAMES, "cyclical", "one_cycle", "ramp", "restarts"]
    )


def test_a_ramp_grows_by_the_same_factor_every_step_between_its_ends() -> None:
    ramp = schedule("ramp", 300, start_factor=1e-2, end_factor=10.0)
    assert (ramp(0), ramp(300)) == pytest.approx((1e-2, 10.0))
    ratios = [ramp(seen + 3) / ramp(seen) for seen in range(0, 300, 3)]
    assert ratios == pytest.approx([1000 ** (1 / 100)] * 100)
    with pytest.raises(RecipeError, match="above start_factor"):
        options(config_for("schedule", "ramp"), ["start_factor=1", "end_factor=0.5"])


@given(st.sampled_from(NAMES), st.integers(1, 500), st.integers(1, 500), st.integers(0, 1000))
def test_factors_stay_between_zero_and_one(name: str, warmup: int, rest: int, seen: int) -> None:
    total = warmup + rest
    factor = schedule(name, total, warmup_samples=warmup)(min(seen, total))
    assert 0 <= factor <= 1
    if seen < total:
        assert factor > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_warm_up_rises_in_a_line_from_above_zero_to_the_full_rate(name: str) -> None:
    factors = [schedule(name, 1000, warmup_samples=99)(seen) for seen in range(101)]
    assert factors[0] == pytest.approx(0.01)
    steps = [after - before for before, after in zip(factors[:99], factors[1:100], strict=True)]
    assert steps == pytest.approx([0.01] * 99)
    assert factors[99] == 1
    assert schedule(name, 1000)(0) == 1


def test_curves() -> None:
    cosine = schedule("cosine", 1100, warmup_samples=100)
    for seen in range(100, 1101, 50):
        expected = 0.5 * (1 + math.cos(math.pi * (seen - 100) / 1000))
        assert cosine(seen) == pytest.approx(expected, abs=1e-12)
    linear = schedule("linear", 1100, warmup_samples=100, final_factor=0.2)
    assert linear(600) == pytest.approx(0.6)
    assert linear(1100) == pytest.approx(0.2)
    assert linear(5000) == pytest.approx(0.2)  # never rises again beyond the end
    assert {schedule("constant", 1100)(seen) for seen in (0, 500, 1099)} == {1.0}
    assert schedule("cosine", 1100, final_factor=1.0)(1099) == pytest.approx(1.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_as_long_as_the_run_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"warmup_samples = 1,000"):
        schedule(name, 1000, warmup_samples=1000)
    assert schedule(name, 1001, warmup_samples=1000)(1000) == 1


def test_cosine_is_that_of_transformers() -> None:
    from transformers import get_cosine_schedule_with_warmup

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, 0, 100)
    ours = schedule("cosine", 400)
    for step in range(100):
        assert ours(4 * step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_polynomial_is_that_of_transformers() -> None:
    from transformers import get_polynomial_decay_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_polynomial_decay_schedule_with_warmup(optimizer, 0, 100, lr_end=0.1, power=3.0)
    ours = schedule("polynomial", 400, power=3.0, final_factor=0.1)
    for step in range(100):
        assert ours(4 * step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
    assert schedule("polynomial", 400)(200) == pytest.approx(0.25)
    assert ours(4000) == pytest.approx(0.1)


def test_wsd_is_constant_and_then_falls() -> None:
    for shape, half in (("sqrt", 1 - math.sqrt(0.5)), ("linear", 0.5), ("cosine", 0.5)):
        factor = schedule("wsd", 1100, warmup_samples=100, shape=shape, decay_share=0.4)
        assert [factor(seen) for seen in (100, 400, 700)] == [1, 1, 1]
        assert factor(701) < 1
        assert factor(900) == pytest.approx(half)
        assert factor(1100) == factor(5000) == pytest.approx(0)
    kept = schedule("wsd", 1000, shape="linear", decay_share=1.0, final_factor=0.2)
    assert kept(500) == pytest.approx(0.6)
    assert kept(1000) == pytest.approx(0.2)


def test_cyclical_is_that_of_torch_and_warms_up_to_its_lowest_rate() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.25, 1.0, 40, cycle_momentum=False)
    ours = schedule("cyclical", 1600, half_cycle_samples=160)
    for step in range(400):
        assert ours(4 * step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
    warm = schedule("cyclical", 1099, warmup_samples=99, half_cycle_samples=200, min_factor=0.5)
    assert warm(0) == pytest.approx(0.005)
    assert [warm(99 + 100 * n) for n in range(5)] == pytest.approx([0.5, 0.75, 1, 0.75, 0.5])


def test_one_cycle_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    # Theirs peaks at pct·total - 1 and ends at total - 1; ours at share·total and at total.
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, 101, pct_start=31 / 101, cycle_momentum=False
    )
    ours = schedule("one_cycle", 400)
    for step in range(100):
        assert ours(4 * step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()
    assert ours(0) == pytest.approx(0.04)
    assert ours(120) == 1
    assert ours(400) == ours(4000) == pytest.approx(4e-6)


def test_restarts_have_the_anchors_of_safe_ones() -> None:
    config = config_for("schedule", "restarts")(cycles=3)
    factor = config.build(6000, 2)  # a cycle is 1,000 steps: rises take 100
    anchors = {
        **{0: 1.0, 1000: 0.55, 1999: 0.1, 2000: 0.1, 2100: 0.4, 2200: 0.7, 3100: 0.385},
        **{3999: 0.07, 4000: 0.07, 4200: 0.49, 5999: 0.049, 6000: 0.049, 9000: 0.049},
    }
    for seen, expected in anchors.items():
        assert factor(seen) == pytest.approx(expected, abs=1e-5), seen
    long = config_for("schedule", "restarts")(cycles=2).build(20_000, 1)
    assert [long(seen) for seen in (10_000, 10_100, 10_200)] == pytest.approx([0.1, 0.4, 0.7])
    wide = config_for("schedule", "restarts")(cycles=2, floor=0.3, peak_decay=0.5)
    bounds = [wide.build(20_000)(seen) for seen in (9_999, 10_200, 20_000)]
    assert bounds == pytest.approx([0.3, 0.5, 0.15], abs=1e-6)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 300), st.integers(101, 700))
def test_no_step_of_restarts_changes_the_rate_by_more_than_a_tenth(
    cycles: int, batch: int, warmup: int, steps: int
) -> None:
    total = cycles * steps * batch + warmup
    config = config_for("schedule", "restarts")(cycles=cycles, warmup_samples=warmup)
    try:
        factor = config.build(total, batch)
    except UserError:
        assert steps < 150
        return
    rates = [factor(clock) for clock in range(0, total, batch)]
    after = rates[-(-warmup // batch) :]
    for before, now in zip(after, after[1:], strict=False):
        assert 1 / 1.1001 < now / before < 1.1001
    assert all(later > 0 for later in rates)
    assert min(after) >= 0.1 * 0.7 ** (cycles - 1) - 1e-12


def test_restarts_and_cycles_that_would_jump_are_refused_with_the_worst_ratio() -> None:
    restarts = config_for("schedule", "restarts")
    with pytest.raises(UserError, match=r"leaves 100 samples a cycle, and each needs 100"):
        restarts(cycles=2).build(200)
    with pytest.raises(UserError, match=r"changes the rate by ×\d\.\d+ in one step, at \d+ of 220"):
        restarts(cycles=2).build(220)
    restarts(cycles=2).build(400)
    with pytest.raises(UserError, match="each needs 1,600"):
        restarts(cycles=4).build(6400, 16)  # 400 steps in all, whatever the number of samples
    cyclical = config_for("schedule", "cyclical")
    with pytest.raises(UserError, match=r"by ×1\.3 in one step, at 320 of 1,000"):
        cyclical(half_cycle_samples=160).build(1000, 16)
    cyclical(half_cycle_samples=160).build(1000, 4)
    cyclical(half_cycle_samples=5000).build(1000, 2000)  # a run of a single step


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("restarts", "peak_decay=0.71"),
        ("restarts", "floor=0.09"),
        ("restarts", "cycles=0"),
        ("cyclical", "min_factor=0.0"),
        ("one_cycle", "rise_share=1.0"),
        ("polynomial", "power=0.0"),
        ("wsd", "decay_share=0.0"),
        ("wsd", "decay_shape='sqrt'"),
    ],
)
def test_bounds_and_unknown_options_are_refused(name: str, wrong: str) -> None:
    given = ["half_cycle_samples=100"] if name == "cyclical" else []
    with pytest.raises(RecipeError, match=wrong.partition("=")[0]):
        options(config_for("schedule", name), [*given, wrong])
    with pytest.raises(RecipeError, match="must be below peak_decay"):
        options(config_for("schedule", "restarts"), ["floor=0.5", "peak_decay=0.4"])


def test_adamw_follows_the_paper() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    settings = {"weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-6}
    config = config_for("optimizer", "adamw")(**settings)
    optimizer = config.build([{"params": [parameter], "lr": 0.01, "name": "all"}])
    assert optimizer.param_groups[0]["name"] == "all"
    value = parameter.detach().clone().double()
    mean = square = torch.zeros(2, dtype=torch.float64)
    for step in range(1, 4):
        gradient = torch.tensor([0.5 * step, -1.0])
        parameter.grad = gradient
        optimizer.step()
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.9 * square + 0.1 * gradient**2
        value = value - 0.01 * 0.1 * value
        update = mean / (1 - 0.8**step) / ((square / (1 - 0.9**step)).sqrt() + 1e-6)
        value = value - 0.01 * update
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-6, atol=1e-7)


def test_adamw_defaults_and_bounds() -> None:
    config = config_for("optimizer", "adamw")()
    assert (config.betas, config.eps, config.weight_decay) == ((0.9, 0.999), 1e-8, 0.01)
    assert config.max_grad_norm == 1.0
    adamw = config_for("optimizer", "adamw")
    assert options(adamw, ["betas=[0.5, 0.6]"]).betas == (0.5, 0.6)
    for wrong in ("betas=[0.9, 1.0]", "eps=0", "weight_decay=-1", "max_grad_norm=-1"):
        with pytest.raises(RecipeError, match=wrong.partition("=")[0]):
            options(adamw, [wrong])
