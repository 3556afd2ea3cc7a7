"""Losses: their formulas, their anchors, and one number per sample."""

from __future__ import annotations

import math

import pytest
import torch

from sdprep.plugins import config_for, configs
from sdtrain.ddpm import DdpmObjective, alphas_cumprod_of
from sdtrain.robust import bend

LEVELS = torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64)
LOGSNR = DdpmObjective(alphas_cumprod_of({}), "epsilon").logsnr(LEVELS)


def level(count: int) -> dict[str, torch.Tensor]:
    return {"u": torch.full((count,), 0.5), "logsnr": torch.zeros(count)}


def test_every_loss_is_tested_here() -> None:
    assert list(configs("loss")) == ["huber", "l1", "log_cosh", "mse", "smooth_l1"]


@pytest.mark.parametrize("name", ["huber", "l1", "log_cosh", "mse", "smooth_l1"])
def test_formulas_give_one_number_per_sample(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 5, 6, generator=generator)
    d = (prediction - target).double()
    root = (d**2 + 0.01).sqrt() - 0.1
    values = {"mse": d**2, "huber": 0.2 * root, "smooth_l1": 2 * root, "l1": d.abs()}
    expected = {**values, "log_cosh": d.cosh().log()}[name].mean((1, 2, 3))
    loss = config_for("loss", name)().build()
    got = loss(prediction, target, **level(3))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    half = loss(prediction.half(), target.half(), **level(3))
    assert half.dtype == torch.float32


def test_mse_needs_no_noise_level_and_does_not_overflow_in_half_precision() -> None:
    loss = config_for("loss", "mse")().build()
    big = torch.full((2, 8), 600.0, dtype=torch.float16)
    assert loss(big, -big).tolist() == [1_440_000.0, 1_440_000.0]


def test_anchors_of_the_bend() -> None:
    u = LEVELS.float()
    exponential = bend("exponential", 0.1, u=u, logsnr=LOGSNR)
    assert [round(float(c), 6) for c in exponential] == [1.0, 0.316228, 0.100231]
    snr = bend("snr", 0.1, u=u, logsnr=LOGSNR)
    assert [round(float(c), 6) for c in snr] == [0.94971, 0.231284, 0.103691]
    assert bend("constant", 0.1, u=u, logsnr=LOGSNR).tolist() == pytest.approx([0.1] * 3)
    ends = bend("snr", 0.1, u=torch.zeros(2), logsnr=torch.tensor([-math.inf, math.inf]))
    assert ends.tolist() == pytest.approx([0.1, 1.0])


@pytest.mark.parametrize("name", ["huber", "smooth_l1"])
def test_the_bend_follows_each_sample(name: str) -> None:
    loss = config_for("loss", name)(schedule="snr").build()
    prediction, target = torch.ones(3, 4), torch.zeros(3, 4)
    got = loss(prediction, target, u=LEVELS.float(), logsnr=LOGSNR)
    c = torch.tensor([0.949710, 0.231284, 0.103691], dtype=torch.float64)
    root = (1 + c**2).sqrt() - c
    expected = 2 * c * root if name == "huber" else 2 * root
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def test_robust_losses_keep_their_digits_and_gradients_for_tiny_errors() -> None:
    prediction = torch.full((1, 4), 1e-5, requires_grad=True)
    loss = config_for("loss", "huber")().build()(prediction, torch.zeros(1, 4), **level(1))
    assert float(loss.detach()) == pytest.approx(1e-10, rel=1e-3)  # 2c·d²/2c
    loss.sum().backward()
    assert prediction.grad is not None
    assert prediction.grad[0, 0].item() == pytest.approx(2e-5 / 4, rel=1e-3)
    zero = torch.zeros(1, 4, requires_grad=True)
    config_for("loss", "huber")().build()(zero, torch.zeros(1, 4), **level(1)).sum().backward()
    assert zero.grad is not None
    assert bool(torch.isfinite(zero.grad).all())


def test_log_cosh_at_both_ends() -> None:
    loss = config_for("loss", "log_cosh")().build()
    values = torch.tensor([[1e-4], [0.999999], [1.0], [-1.0], [500.0], [-500.0], [0.0]])
    prediction = values.clone().requires_grad_()
    got = loss(prediction, torch.zeros(7, 1), **level(7))
    exact = values[:4, 0].double().cosh().log().tolist()
    expected = [*exact, 500 - math.log(2), 500 - math.log(2), 0.0]
    assert got.tolist() == pytest.approx(expected, rel=1e-5)
    got.sum().backward()
    assert prediction.grad is not None
    assert prediction.grad.flatten().tolist() == pytest.approx(
        values.flatten().tanh().tolist(), rel=1e-5
    )
