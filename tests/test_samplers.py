"""Samplers keep what the model knows about its noise, and refuse where they cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sdprep.errors import UserError
from sdtrain import samplers
from sdtrain.sampling import Style, pictures_of
from tests.tiny import load_tiny

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def own(**options: object) -> object:
    from diffusers import DDIMScheduler

    return DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False, **options)


@pytest.mark.parametrize("name", samplers.NAMES)
def test_every_sampler_keeps_betas_prediction_and_offset(name: str) -> None:
    found = samplers.build(name, own(), "v_prediction")
    assert found.config["prediction_type"] == "v_prediction"
    assert found.config["steps_offset"] == 1
    assert torch.allclose(found.alphas_cumprod, own().alphas_cumprod)


def test_zero_terminal_snr_is_kept_or_refused_by_name() -> None:
    zero = own(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    kept = 0
    for name in samplers.NAMES:
        if name in ("pndm", "heun"):
            with pytest.raises(UserError, match=f"sampler {name} cannot start from pure noise"):
                samplers.build(name, zero, "v_prediction")
            continue
        found = samplers.build(name, zero, "v_prediction")
        assert found.config["rescale_betas_zero_snr"]
        assert found.config["timestep_spacing"] == "trailing"
        assert found.alphas_cumprod[-1] < 1e-6
        kept += 1
    assert kept == len(samplers.NAMES) - 2


def test_a_name_means_the_same_whatever_the_model_came_with() -> None:
    from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    karras = EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True)
    assert not samplers.build("dpmpp_2m", karras, "epsilon").config["use_karras_sigmas"]
    assert samplers.build("dpmpp_2m_karras", own(), "epsilon").config["use_karras_sigmas"]
    assert samplers.build(None, karras, "epsilon").config["use_karras_sigmas"]
    assert type(samplers.build("dpmpp_2m", own(), "epsilon")).__name__ == (
        "DPMSolverMultistepScheduler"
    )
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert samplers.build(None, flow, "flow").config["shift"] == 3.0
    with pytest.raises(UserError, match="follows a noise schedule"):
        samplers.build("euler", flow, "flow")
    with pytest.raises(UserError, match="there is no sampler 'eular'"):
        samplers.build("eular", own(), "epsilon")


def test_pictures_are_drawn_with_the_sampler_and_the_same_every_time(
    tiny_model: Callable[[str], Path],
) -> None:
    family = load_tiny(tiny_model("sd15"))
    found = {}
    for name in (None, *samplers.NAMES):
        style = Style(7, 32, 3, 2.0, name)
        (picture,) = pictures_of(family, ["red car"], style)
        (again,) = pictures_of(family, ["red car"], style)
        assert np.array_equal(np.asarray(picture), np.asarray(again)), name
        found[name] = np.asarray(picture).astype(int)
    assert np.abs(found["ddim"] - found["euler_a"]).max() > 0
    assert np.abs(found["ddim"] - found["dpmpp_2m_sde"]).max() > 0
