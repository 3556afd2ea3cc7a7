"""What a weighting is: a factor per sample from its signal-to-noise ratio."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sdprep.errors import UserError

Weighting = Callable[[Tensor, str], Tensor]
"""`weighting(snr, prediction_type)`: (B,) float32 in [0, inf] to (B,) finite float32."""


def noise_fraction(snr: Tensor) -> Tensor:
    """The fraction of noise u of flow matching, (B,) in [0, 1]: snr = ((1-u)/u)²."""
    return 1 / (1 + snr.sqrt())


def no_rule(weighting: str, prediction_type: str) -> UserError:
    """The error for a prediction type that a weighting has no formula for."""
    return UserError(
        f"weighting {weighting} has no rule for prediction type {prediction_type!r}",
        'Use weighting type "none", or one whose description (sdtrain plugins) names it.',
    )
