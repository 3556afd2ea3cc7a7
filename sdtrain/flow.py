"""The flow-matching objective: a straight line from picture to noise, and how its levels are drawn.

Source: arXiv:2209.03003 and arXiv:2403.03206 (densities, shift); spec/train.md, section 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdtrain.noise import BELOW_ONE

NUM_TIMESTEPS = 1000
PIXELS_PER_TOKEN = 16 * 16
DensityKind = Literal["logit_normal", "uniform", "mode", "shift", "mu"]

_MU = ((256, 0.5), (4096, 1.15))  # tokens and mu of the two ends of the line


class FlowObjective:
    """Noisy latents (1-u)·clean + u·noise; the network says noise - clean.

    Args:
        density: how training draws u.
    """

    sign = 1
    prediction_type = "flow"

    def __init__(self, density: FlowDensity) -> None:
        self._density = density

    def alpha_sigma(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of clean latents and noise: 1-u and u, (B,) float32."""
        return (1 - u).float(), u.float()

    def logsnr(self, u: Tensor) -> Tensor:
        """2 ln((1-u)/u): (B,) float32, +inf where there is no noise."""
        return (2 * (torch.log1p(-u) - u.log())).float()

    def target(self, clean: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """The direction from picture to noise, shaped like `clean`, the same at every u."""
        return noise - clean

    def model_time(self, u: Tensor) -> Tensor:
        """The network receives 1000 u: (B,) float32, not rounded."""
        return (NUM_TIMESTEPS * u).float()

    def density(self, v: Tensor, area_px: Tensor) -> Tensor:
        """See `FlowDensity.quantile`."""
        return self._density.quantile(v, area_px)


@dataclass(frozen=True)
class FlowDensity:
    """How training draws noise levels.

    Args:
        kind: `logit_normal`, then `shift`; `uniform`; `mode`; `shift`, uniform and then shifted;
            `mu`, uniform and then shifted by the size of the picture.
        shift: a in u' = a·u/(1+(a-1)·u), > 0.
        logit_mean: of logit_normal.
        logit_std: of logit_normal, > 0.
        mode_scale: of mode, -1..1.75: above 0 the middle is drawn more often, below 0 the ends.
    """

    kind: DensityKind
    shift: float
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def quantile(self, v: Tensor, area_px: Tensor) -> Tensor:
        """The level below which a share v of the levels lies.

        Args:
            v: (B,) float64 in [0, 1).
            area_px: (B,) pixels of the picture that each level is for.

        Returns:
            (B,) float64 in [0, 1), rising in v.

        Source: arXiv:2403.03206, section 3.1 and equations 20 and 23.
        """
        if self.kind == "logit_normal":
            normal = torch.special.ndtri(v)
            u = shifted(torch.sigmoid(self.logit_mean + self.logit_std * normal), self.shift)
        elif self.kind == "mode":
            u = v - self.mode_scale * ((math.pi / 2 * v).sin().square() - v)
        elif self.kind == "shift":
            u = shifted(v, self.shift)
        elif self.kind == "mu":
            u = shifted(v, dynamic_shift(area_px.double() / PIXELS_PER_TOKEN))
        else:
            u = v
        return u.clamp(0, BELOW_ONE)  # rounding may leave [0, 1)


def shifted(u: Tensor, shift: float | Tensor) -> Tensor:
    """Move levels towards the noise: a·u/(1+(a-1)·u); a = 3 takes 0.1 to 0.25 and 0.5 to 0.75."""
    return shift * u / (1 + (shift - 1) * u)


def dynamic_shift(num_tokens: Tensor) -> Tensor:
    """The shift exp(mu), mu linear in the tokens: 0.5 for 256, 1.15 for 4096 (1024² px).

    Args:
        num_tokens: (B,) float64, a token being 16 by 16 px.

    Returns:
        (B,) float64; 3.158193 for 4096 tokens, 1.877611 for 1024.
    """
    (few, low), (many, high) = _MU
    return (low + (num_tokens - few) * (high - low) / (many - few)).exp()
