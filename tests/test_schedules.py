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

NAMES = ("constant", "cosine", "linear")


def schedule(name: str, total: int, **settings: object) -> Schedule:
    return config_for("schedule", name)(**settings).build(total)


def test_every_schedule_and_optimizer_is_tested_here() -> None:
    assert tuple(configs("schedule")) == NAMES
    assert list(configs("optimizer")) == ["adamw"]


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
