"""Stable Diffusion XL with a thousand noise levels, as it was published."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sdtrain.families._full_size import standard_scheduler
from sdtrain.families._sdxl import SdxlNetworks, SdxlOptions, open_folder, tiny_sizes
from sdtrain.families._stable_diffusion import DdpmOptions
from sdtrain.families._tiny import write_tiny_folder


class Config(SdxlOptions, DdpmOptions):
    """Stable Diffusion XL."""

    type: Literal["sdxl"] = "sdxl"

    def build(
        self,
        path: str,
        *,
        precision: str = "no",
        device: str = "cpu",
        revision: str | None = None,
    ) -> StableDiffusionXL:
        """Load a diffusers folder, Hub id or single file.

        Raises:
            UserError: there is no such folder, or it holds another kind of model.
            DataError: its weights are incomplete.
        """
        family = StableDiffusionXL(open_folder(path, self.config, revision), self, precision)
        family.to(device)
        return family

    @staticmethod
    def write_tiny(path: Path, seed: int) -> None:
        """Write a tiny model of this family."""
        write_tiny_folder(path, tiny_sizes(), seed, standard_scheduler())


class StableDiffusionXL(SdxlNetworks):
    """See `Family`."""

    name = "sdxl"
