"""The DDPM objective: a thousand noise levels, and what the network should say at each.

Source: arXiv:2006.11239; velocity, arXiv:2202.00512; zero-terminal SNR, arXiv:2305.08891.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sdprep.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction")


class DdpmObjective:
    """Tables over t = floor(T u), computed in float64 and read in float32.

    Args:
        alphas_cumprod: (T,) float64, the share of the clean signal's power at each t.
        prediction_type: `epsilon` or `v_prediction`.

    Raises:
        UserError: an unknown prediction type, or epsilon with zero-terminal SNR, where the
            noisy latents at the last t hold no signal and the target says nothing.
    """

    sign = 1

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"prediction type {prediction_type!r} is unknown here",
                f"There are: {', '.join(PREDICTION_TYPES)}.",
            )
        if prediction_type == "epsilon" and float(alphas_cumprod[-1]) <= 0:
            raise UserError(
                "zero-terminal SNR with epsilon prediction cannot be trained",
                'Set model.prediction_type = "v_prediction", or model.zero_terminal_snr = false.',
            )
        self.prediction_type = prediction_type
        self.alphas_cumprod = alphas_cumprod
        self.num_timesteps = len(alphas_cumprod)
        self.is_zero_snr = float(alphas_cumprod[-1]) <= 0
        self._alpha = alphas_cumprod.sqrt()
        self._sigma = (1 - alphas_cumprod).sqrt()
        self._logsnr = alphas_cumprod.log() - (1 - alphas_cumprod).log()

    def timesteps(self, u: Tensor) -> Tensor:
        """The step t = floor(T u): int64 in 0 … T-1, on the device of `u`."""
        return (u * self.num_timesteps).floor().long().clamp(0, self.num_timesteps - 1)

    def _read(self, table: Tensor, u: Tensor) -> Tensor:
        return table.float().to(u.device)[self.timesteps(u)]

    def alpha_sigma(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of clean latents and noise: √ᾱ and √(1-ᾱ), (B,) float32."""
        return self._read(self._alpha, u), self._read(self._sigma, u)

    def logsnr(self, u: Tensor) -> Tensor:
        """ln(ᾱ / (1-ᾱ)): (B,) float32, -inf where the signal is gone."""
        return self._read(self._logsnr, u)

    def target(self, clean: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """The noise, or the velocity √ᾱ·noise - √(1-ᾱ)·clean, shaped like `clean`, float32."""
        if self.prediction_type == "epsilon":
            return noise
        alpha, sigma = (
            scale.to(clean.device, non_blocking=True).view(-1, *[1] * (clean.dim() - 1))
            for scale in self.alpha_sigma(u)
        )
        return alpha * noise - sigma * clean

    def model_time(self, u: Tensor) -> Tensor:
        """The network receives t itself."""
        return self.timesteps(u)

    def density(self, v: Tensor, area_px: Tensor) -> Tensor:
        """Uniform in t, whatever the size of the picture."""
        return v


def objective_from_scheduler(
    config: Mapping[str, Any],
    prediction_type: str | None = None,
    zero_terminal_snr: bool | None = None,
) -> DdpmObjective:
    """Build the objective from a checkpoint's `scheduler_config.json`.

    Args:
        config: the scheduler's configuration.
        prediction_type: overrides the checkpoint's own.
        zero_terminal_snr: overrides whether the last level is to hold no signal.

    Raises:
        UserError: the checkpoint names a noise schedule that is not known here, or epsilon is to
            be predicted where there is no signal.
    """
    if zero_terminal_snr is not None:
        config = {**config, "rescale_betas_zero_snr": zero_terminal_snr}
    # The tables of weights are read from the objective, so they are those of the rescaled levels.
    return DdpmObjective(
        alphas_cumprod_of(config), prediction_type or config.get("prediction_type", "epsilon")
    )


def alphas_cumprod_of(config: Mapping[str, Any]) -> Tensor:
    """ᾱ of a scheduler configuration: (T,) float64, rescaled if it asks for zero-terminal SNR."""
    count = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 0.00085), config.get("beta_end", 0.012)
    kind = config.get("beta_schedule", "scaled_linear")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(math.sqrt(start), math.sqrt(end), count, dtype=torch.float64) ** 2
    elif kind == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    else:
        raise UserError(
            f"the checkpoint's scheduler has beta_schedule = {kind!r}",
            "Known here: scaled_linear (Stable Diffusion), linear, or trained_betas.",
        )
    alphas_cumprod = (1 - betas).cumprod(0)
    if config.get("rescale_betas_zero_snr", False):
        return zero_terminal(alphas_cumprod)
    return alphas_cumprod


def zero_terminal(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that the last is exactly 0 and the first stays: (T,) float64.

    Source: arXiv:2305.08891, algorithm 1.
    """
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
