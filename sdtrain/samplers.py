"""Samplers by the names that people know, on the noise schedule that the model came with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_args

from sdprep.errors import UserError
from sdtrain.formats.schedulers import is_flow

Name = Literal[
    "ddim",
    "ddpm",
    "pndm",
    "euler",
    "euler_a",
    "heun",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_2m_sde",
    "unipc",
]
NAMES: tuple[str, ...] = get_args(Name)

_CLASSES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),  # as the pipelines set it
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
_ZERO_SNR = "rescale_betas_zero_snr"
# What a name says of these counts, and nothing that the model's own scheduler happened to ask for.
_NAMED = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}


def build(name: str | None, own: Any, prediction_type: str) -> Any:
    """A fresh sampler with the model's betas, zero-terminal SNR, spacing and offset.

    Args:
        name: one of `NAMES`; None takes the kind that the model came with.
        own: the scheduler that came with the model; only its config is read.
        prediction_type: what the network says.

    Raises:
        UserError: no such sampler, or it cannot draw with a model of this kind.
    """
    cls: Any = type(own)
    options: dict[str, Any] = {}
    if name is not None:
        cls, options = _class_of(name, own)
    takes = inspect.signature(cls.__init__).parameters
    if "prediction_type" in takes and "prediction_type" in own.config and not is_flow(own):
        options["prediction_type"] = prediction_type
    return cls.from_config(own.config, **options)


def check_name(name: str | None) -> None:
    """Refuse a name that is none of a sampler.

    Raises:
        UserError: there is no such sampler.
    """
    if name is not None and name not in _CLASSES:
        raise UserError(f"there is no sampler {name!r}", f"Choose of: {', '.join(NAMES)}.")


def _class_of(name: str, own: Any) -> tuple[Any, dict[str, Any]]:
    import diffusers

    check_name(name)
    class_name, named = _CLASSES[name]
    cls = getattr(diffusers, class_name)
    takes = inspect.signature(cls.__init__).parameters
    if "prediction_type" not in own.config or is_flow(own):
        raise UserError(
            f"sampler {name} follows a noise schedule that this model was not trained on "
            f"(it came with {type(own).__name__})",
            "Leave the sampler out to take the model's own.",
        )
    if own.config.get(_ZERO_SNR) and _ZERO_SNR not in takes:
        able = [each for each in NAMES if _takes_zero_snr(each)]
        raise UserError(
            f"sampler {name} cannot start from pure noise, which this model was trained with "
            "(zero-terminal SNR)",
            f"Choose of: {', '.join(able)}.",
        )
    return cls, {**{key: value for key, value in _NAMED.items() if key in takes}, **named}


def _takes_zero_snr(name: str) -> bool:
    import diffusers

    cls = getattr(diffusers, _CLASSES[name][0])
    return _ZERO_SNR in inspect.signature(cls.__init__).parameters
