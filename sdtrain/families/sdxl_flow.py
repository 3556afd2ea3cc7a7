"""Stable Diffusion XL trained by flow matching: the same networks, another objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from sdprep.console import say
from sdtrain.families._sdxl import SdxlNetworks, SdxlOptions, open_folder, tiny_sizes
from sdtrain.families._stable_diffusion import TextOptions
from sdtrain.families._tiny import write_tiny_folder
from sdtrain.flow import PIXELS_PER_TOKEN, DensityKind, FlowDensity, FlowObjective, dynamic_shift
from sdtrain.formats.diffusers import Folder
from sdtrain.formats.schedulers import flow_scheduler, flow_shift, is_flow

DEFAULT_SHIFT = 3.0  # SD3's, for pictures of 1024² px

_OPTIONS_OF = {
    "logit_mean": "logit_normal",
    "logit_std": "logit_normal",
    "mode_scale": "mode",
}


class Config(SdxlOptions, TextOptions):
    """Stable Diffusion XL with a flow-matching objective; it may start from an ordinary SDXL."""

    type: Literal["sdxl_flow"] = "sdxl_flow"
    is_flow: ClassVar[bool] = True
    density: DensityKind = Field(
        "logit_normal",
        description="Where training draws noise levels u: logit_normal, then shifted; uniform; "
        "mode; shift: uniform, then shifted; mu: uniform, then shifted by the picture's size.",
    )
    shift: float | None = Field(
        None,
        gt=0.0,
        allow_inf_nan=False,
        description="a of u' = a·u/(1+(a-1)·u), in the densities logit_normal and shift and in "
        "the sampler; default: the checkpoint's, or 3 (in the sampler of mu: that of its size).",
    )
    logit_mean: float = Field(
        0.0, ge=-10.0, le=10.0, description="logit_normal: mean; above 0: more noise."
    )
    logit_std: float = Field(1.0, gt=0.0, le=10.0, description="logit_normal: deviation.")
    mode_scale: float = Field(
        1.29, ge=-1.0, le=1.75, description="mode: above 0 more of the middle, below 0 of the ends."
    )

    @model_validator(mode="after")
    def _options_fit_density(self) -> Self:
        for key, density in _OPTIONS_OF.items():
            usual = type(self).model_fields[key].default
            if self.density != density and getattr(self, key) != usual:
                raise ValueError(f'{key} has no effect with density = "{self.density}"')
        return self

    def build(
        self,
        path: str,
        *,
        precision: str = "no",
        device: str = "cpu",
        revision: str | None = None,
    ) -> StableDiffusionXLFlow:
        """Load a diffusers folder, Hub id or single file.

        Raises:
            UserError: there is no such folder, or it holds another kind of model.
            DataError: its weights are incomplete.
        """
        family = StableDiffusionXLFlow(open_folder(path, self.config, revision), self, precision)
        family.to(device)
        return family

    @staticmethod
    def write_tiny(path: Path, seed: int) -> None:
        """Write a tiny model of this family."""
        write_tiny_folder(path, tiny_sizes(), seed, flow_scheduler(DEFAULT_SHIFT))


class StableDiffusionXLFlow(SdxlNetworks):
    """See `Family`. The network gets 1000 u and says noise - clean."""

    name = "sdxl_flow"

    def _objective(self, folder: Folder, options: Any) -> tuple[FlowObjective, Any]:
        """Flow matching, whatever the checkpoint was trained for."""
        if not is_flow(folder.scheduler):
            said = folder.scheduler.config.get("prediction_type", "epsilon")
            say(
                f"the checkpoint was trained to predict {said}; it becomes a model of flow "
                "matching, which takes many samples before its pictures are sound"
            )
        own = options.shift or flow_shift(folder.scheduler) or DEFAULT_SHIFT
        density = FlowDensity(
            options.density, own, options.logit_mean, options.logit_std, options.mode_scale
        )
        sampled = own
        if options.density == "mu" and options.shift is None:
            tokens = torch.tensor(self.default_resolution_px**2 / PIXELS_PER_TOKEN)
            sampled = float(dynamic_shift(tokens.double()))
        return FlowObjective(density), flow_scheduler(sampled, folder.scheduler)
