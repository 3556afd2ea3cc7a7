"""Schedulers of diffusers: what a checkpoint's says, and what one says that was trained here."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdprep.errors import DataError

FLOW_PREDICTION = "flow_prediction"
FLOW_SHIFT = "sdtrain.flow_shift"
_CLEAN_LAST = {"clip_sample": False, "set_alpha_to_one": False}


def ddpm_scheduler(scheduler: Any, prediction_type: str, *, is_zero_snr: bool) -> Any:
    """The checkpoint's scheduler, told what was trained.

    Args:
        scheduler: the checkpoint's own.
        prediction_type: `epsilon` or `v_prediction`.
        is_zero_snr: whether the last noise level holds no signal. Sampling then begins there,
            with a scheduler that can: some, such as PNDM, know no such schedule.
    """
    import diffusers

    wanted: dict[str, Any] = {"prediction_type": prediction_type}
    kind = type(scheduler)
    if is_zero_snr:
        wanted |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if not _takes(kind, "rescale_betas_zero_snr"):
            kind, wanted = diffusers.DDIMScheduler, {**_CLEAN_LAST, **wanted}
    elif _takes(kind, "rescale_betas_zero_snr"):
        wanted["rescale_betas_zero_snr"] = False
    return kind.from_config(scheduler.config, **wanted)


def flow_scheduler(shift: float, scheduler: Any = None) -> Any:
    """A scheduler of flow matching that UNet pipelines can use.

    diffusers' own `FlowMatchEulerDiscreteScheduler` lacks `init_noise_sigma` and
    `scale_model_input`, without which those pipelines end in an AttributeError. The multi-step
    solvers have both, and solve the same equation with `use_flow_sigmas`.

    Args:
        shift: of the sampler's noise levels.
        scheduler: the checkpoint's own; kept if it is such a solver.
    """
    import diffusers

    wanted = {"prediction_type": FLOW_PREDICTION, "use_flow_sigmas": True, "flow_shift": shift}
    if scheduler is not None and is_flow(scheduler) and _takes(type(scheduler), "use_flow_sigmas"):
        return type(scheduler).from_config(scheduler.config, **wanted)
    return diffusers.DPMSolverMultistepScheduler(num_train_timesteps=1000, **wanted)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is one of flow matching."""
    return _says_flow(type(scheduler).__name__, scheduler.config)


def is_edm(scheduler: Any) -> bool:
    """Whether a scheduler is one of Karras's, whose networks see scaled latents and log sigmas."""
    return type(scheduler).__name__.startswith("EDM") or "sigma_data" in scheduler.config


def is_flow_folder(path: Path) -> bool:
    """Whether the scheduler in a diffusers folder on this machine is one of flow matching."""
    file = path / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return False
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise DataError(f"{file} cannot be read", str(error)) from None
    return _says_flow(str(config.get("_class_name")), config)


def flow_shift(scheduler: Any) -> float | None:
    """The shift that a scheduler of flow matching has; None for another scheduler."""
    if not is_flow(scheduler):
        return None
    found = scheduler.config.get("flow_shift") or scheduler.config.get("shift")
    return None if found is None else float(found)


def flow_notes(scheduler: Any) -> dict[str, str]:
    """What a single file says of a scheduler of flow matching; nothing for another scheduler."""
    shift = flow_shift(scheduler)
    return {} if shift is None else {FLOW_SHIFT: f"{shift:g}"}


def _says_flow(class_name: str, config: Mapping[str, Any]) -> bool:
    is_named = class_name.startswith("FlowMatch")
    return bool(
        is_named
        or config.get("prediction_type") == FLOW_PREDICTION
        or config.get("use_flow_sigmas", False)
    )


def _takes(kind: Any, option: str) -> bool:
    return option in inspect.signature(kind.__init__).parameters
