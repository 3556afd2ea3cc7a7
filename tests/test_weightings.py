"""Weightings against the table of the specification, and against what they are derived from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from sdprep.errors import UserError
from sdprep.plugins import config_for, configs
from sdtrain.ddpm import DdpmObjective, alphas_cumprod_of
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import open_setup
from sdtrain.weighting import Weighting

LEVELS = torch.arange(1000, dtype=torch.float64) / 1000
PREDICTIONS = ("epsilon", "v_prediction", "flow")

# t: ᾱ, SNR, min-SNR5 epsilon, min-SNR5 v, debiased epsilon, as printed in spec/train.md
TABLE = {
    0: ("0.99915000", "1175.47", "0.004254", "0.004250", "0.031623"),
    1: ("0.99829603", "585.864", "0.008534", "0.008520", "0.041314"),
    10: ("0.99043131", "103.508", "0.048306", "0.047843", "0.098291"),
    100: ("0.89422348", "8.45389", "0.591443", "0.528883", "0.343931"),
    200: ("0.75369205", "3.05996", "1", "0.753692", "0.571666"),
    500: ("0.27633268", "0.381850", "1", "0.276333", "1.618279"),
    800: ("0.03686962", "0.0382810", "1", "0.036870", "5.111028"),
    999: ("0.00466010", "0.00468192", "1", "0.004660", "14.614641"),
}


def weighting(name: str, **options: object) -> Weighting:
    return config_for("weighting", name)(**options).build()


@pytest.fixture(scope="module")
def snr() -> torch.Tensor:
    return DdpmObjective(alphas_cumprod_of({}), "epsilon").logsnr(LEVELS).exp()


def test_every_weighting_is_tested_here() -> None:
    assert list(configs("weighting")) == [
        *("cosmap", "debiased", "min_snr", "none", "p2", "sigma_sqrt")
    ]


@pytest.mark.parametrize("t", list(TABLE))
def test_the_table_to_its_printed_digits(t: int, snr: torch.Tensor) -> None:
    alphas_cumprod = alphas_cumprod_of({})[t]
    values = [
        alphas_cumprod,
        alphas_cumprod / (1 - alphas_cumprod),
        weighting("min_snr")(snr, "epsilon")[t],
        weighting("min_snr")(snr, "v_prediction")[t],
        weighting("debiased")(snr, "epsilon")[t],
    ]
    for value, printed in zip(values, TABLE[t], strict=True):
        digits = len(printed.partition(".")[2])
        # The weights are float32: allow its rounding beyond the printed digits.
        assert float(value) == pytest.approx(float(printed), abs=0.5 * 10**-digits, rel=2e-7)


def test_mean_weights_over_all_levels(snr: torch.Tensor) -> None:
    mean = {
        (gamma, kind): float(weighting("min_snr", gamma=gamma)(snr, kind).double().mean())
        for gamma, kind in [(5.0, "epsilon"), (1.0, "epsilon"), (5.0, "v_prediction")]
    }
    assert mean[5.0, "epsilon"] == pytest.approx(0.916571, abs=5e-7)
    assert mean[1.0, "epsilon"] == pytest.approx(0.766736, abs=5e-7)
    assert mean[5.0, "v_prediction"] == pytest.approx(0.294330, abs=5e-7)


def test_mean_weight_with_zero_terminal_snr() -> None:
    alphas_cumprod = alphas_cumprod_of({"rescale_betas_zero_snr": True})
    snr = DdpmObjective(alphas_cumprod, "v_prediction").logsnr(LEVELS).exp()
    weights = weighting("min_snr")(snr, "v_prediction")
    assert float(weights.double().mean()) == pytest.approx(0.277607, abs=5e-7)
    assert float(weights[100]) == pytest.approx(0.566194, abs=1e-6)
    assert float(weights[999]) == 0


@pytest.mark.slow
def test_the_ratio_is_that_of_diffusers(snr: torch.Tensor) -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    theirs = compute_snr(scheduler, torch.arange(1000))
    torch.testing.assert_close(snr, theirs, rtol=2e-4, atol=0)  # they accumulate in float32


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_v_and_flow_forms_weight_the_clean_picture_as_epsilon_does(gamma: float) -> None:
    """Epsilon-MSE = S·E, v-MSE = (S+1)·E and flow-MSE = E/u², E the error of the clean picture."""
    snr = torch.logspace(-4, 4, 50, dtype=torch.float64)
    error = torch.linspace(0.5, 2, 50, dtype=torch.float64)
    u = 1 / (1 + snr.sqrt())
    losses = {
        "epsilon": snr * error,
        "v_prediction": (snr + 1) * error,
        "flow": error / u**2,
    }
    weigh = weighting("min_snr", gamma=gamma)
    for kind, loss in losses.items():
        expected = snr.clamp(max=gamma) * error
        torch.testing.assert_close(weigh(snr, kind) * loss, expected, rtol=1e-6, atol=0)
    for kind, loss in losses.items():
        # Debiased: the root of the error's own weight, so that epsilon gets 1/√S.
        derived = weighting("debiased")(snr.clamp(max=999), kind)
        factor = snr / snr.clamp(max=999)
        expected = error * snr.clamp(max=999).sqrt()
        got = derived * loss / {"epsilon": factor, "v_prediction": 1, "flow": 1}[kind]
        keep = snr <= 999
        torch.testing.assert_close(got[keep], expected[keep], rtol=1e-6, atol=0)


def test_the_v_forms_of_other_trainers() -> None:
    snr = torch.tensor([0.0, 1.0, 3.0, 5000.0])
    forms = {
        "derived": [0.0, 0.5, 3**0.5 / 4, 5000**0.5 / 5001],
        "sd_scripts": [1.0, 0.5, 0.25, 1 / 1001],
        "onetrainer": [1.0, 0.5**0.5, 0.5, 1001**-0.5],
    }
    for form, expected in forms.items():
        got = weighting("debiased", v_form=form)(snr, "v_prediction")
        torch.testing.assert_close(got, torch.tensor(expected))


RULES = {  # which prediction types each weighting has a formula for
    "cosmap": ("flow",),
    "debiased": PREDICTIONS,
    "min_snr": PREDICTIONS,
    "none": PREDICTIONS,
    "p2": ("epsilon", "v_prediction"),
    "sigma_sqrt": ("flow",),
}


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, kinds in RULES.items() for k in kinds])
def test_weights_are_finite_at_both_ends(name: str, kind: str) -> None:
    snr = torch.tensor([0.0, 1e-30, 1.0, 1e30, float("inf")])
    forms = ("derived", "sd_scripts", "onetrainer") if name == "debiased" else (None,)
    for form in forms:
        weights = weighting(name, **({"v_form": form} if form else {}))(snr, kind)
        assert weights.dtype == torch.float32
        assert weights.shape == snr.shape
        assert bool(torch.isfinite(weights).all()), weights
        assert bool((weights >= 0).all())


def test_p2_is_a_power_of_the_share_of_noise(snr: torch.Tensor) -> None:
    noise = 1 - alphas_cumprod_of({})  # 1/(1 + SNR) is the share of noise
    for gamma in (0.0, 0.5, 1.0, 2.0):
        for kind in RULES["p2"]:
            got = weighting("p2", gamma=gamma)(snr, kind).double()
            torch.testing.assert_close(got, noise**gamma, rtol=1e-5, atol=0)
    assert weighting("p2")(torch.tensor([0.0, 3.0]), "epsilon").tolist() == [1.0, 0.25]


def test_the_flow_columns_by_the_fraction_of_noise() -> None:
    u = torch.tensor([0.002, 0.1, 0.5, 0.9], dtype=torch.float64)
    snr = ((1 - u) / u) ** 2
    one_minus = 1 - 2 * u + 2 * u**2
    expected = {
        "cosmap": 2 / (torch.pi * one_minus),
        "sigma_sqrt": u**-2,
        "min_snr": u**2 * snr.clamp(max=5),
        "debiased": u * (1 - u),
    }
    for name, values in expected.items():
        got = weighting(name)(snr, "flow").double()
        torch.testing.assert_close(got, values, rtol=1e-6, atol=0)
    middle = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    levels = weighting("cosmap")(((1 - middle) / middle) ** 2, "flow")
    assert float(levels.double().mean()) == pytest.approx(1, abs=1e-6)
    assert float(weighting("sigma_sqrt")(torch.tensor([float("inf")]), "flow")) == pytest.approx(
        1e6
    )


def test_the_flow_columns_are_what_diffusers_computes() -> None:
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    u = torch.tensor([0.01, 0.3, 0.5, 0.97], dtype=torch.float64)
    snr = ((1 - u) / u) ** 2
    for name in ("cosmap", "sigma_sqrt"):
        theirs = compute_loss_weighting_for_sd3(name, sigmas=u).double()
        got = weighting(name)(snr, "flow").double()
        torch.testing.assert_close(got, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in RULES if name != "none"])
def test_a_prediction_type_without_a_rule_is_refused(name: str) -> None:
    others = [kind for kind in (*PREDICTIONS, "sample") if kind not in RULES[name]]
    assert others
    for kind in others:
        with pytest.raises(UserError, match=f"{name} has no rule for prediction type '{kind}'"):
            weighting(name)(torch.ones(2), kind)


def test_a_clamp_at_infinity_is_refused() -> None:
    with pytest.raises(ValidationError, match="finite"):
        weighting("min_snr", gamma=float("inf"))  # inf / inf where there is no noise


def test_a_v_form_that_nobody_would_ask_is_refused(train_recipe: Callable[..., Path]) -> None:
    settings = ["weighting.type=debiased", "weighting.v_form=onetrainer"]
    with pytest.raises(UserError, match="is for v prediction, and this model predicts epsilon"):
        open_setup(load_train_recipe(train_recipe(), settings))
    open_setup(load_train_recipe(train_recipe(), settings[:1]))
    as_v = [*settings, "model.prediction_type=v_prediction"]
    open_setup(load_train_recipe(train_recipe(), as_v))
