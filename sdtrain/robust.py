"""How strongly the robust losses bend, as a function of the noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdtrain.loss_masks import mean_per_sample

C_SCHEDULES = ("constant", "exponential", "snr")


def bend(schedule: str, c: float, *, u: Tensor, logsnr: Tensor) -> Tensor:
    """The parameter c of the Huber-like losses for each sample.

    Args:
        schedule: `constant`; `exponential`: c^u; `snr`: (1-c)/(1+σ)² + c, σ = noise over signal.
        c: the value at the noisiest end, in (0, 1).
        u: (B,) noise level in [0, 1).
        logsnr: (B,), infinities allowed.

    Returns:
        (B,) float32. With c = 0.1, at t = 0, 500, 999: exponential 1, .316228, .100231;
        snr .949710, .231284, .103691.
    """
    if schedule == "constant":
        return torch.full_like(logsnr, c)
    if schedule == "exponential":
        return torch.exp(math.log(c) * u.float())
    noise_over_signal = torch.exp(-logsnr / 2)
    return (1 - c) / (1 + noise_over_signal).square() + c


def pseudo_huber(
    prediction: Tensor, target: Tensor, c: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Mean over everything but the batch of √(d²+c²) - c, d the difference.

    Args:
        prediction: (B, …).
        target: (B, …).
        c: (B,) > 0.
        mask: how much each element counts, see `mean_per_sample`; None: all alike.

    Returns:
        (B,) float32.
    """
    difference = (prediction.float() - target.float()).flatten(1)
    c = c.view(-1, 1)
    # Not √(d²+c²) - c itself: that loses all digits where d is small beside c.
    square = difference.square()
    values = square / ((square + c.square()).sqrt() + c)
    return mean_per_sample(values.view_as(prediction), mask)
