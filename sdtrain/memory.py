"""How much memory and disk a run takes, as far as it is known without a forward."""

from __future__ import annotations

from sdtrain.setup import Setup

FLOAT32_BYTES = 4
USUAL_STATE_COPIES = 2
"""Of an optimizer that does not say: a running mean and a running square in float32."""


def memory(setup: Setup) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer and averages; activations come on top."""
    networks = setup.family.parts.values()
    weights = sum(p.numel() * p.element_size() for part in networks for p in part.parameters())
    ema = setup.recipe.ema
    parts = {
        "weights": weights,
        "gradients": _trained(setup),
        "optimizer": optimizer_bytes(setup),
        "ema": _floats(setup) if ema is not None and ema.device == "same" else 0,
    }
    if setup.recipe.precision.rule == "kahan":
        parts["weights"] += _trained(setup)  # what rounding leaves over, in the same format
    return {**parts, "total_without_activations": sum(parts.values())}


def checkpoint_bytes(setup: Setup) -> int:
    """Bytes of one checkpoint on disk."""
    ema = _floats(setup) if setup.recipe.ema is not None else 0
    keeps_both = getattr(setup.recipe.optimizer, "keeps_training_point", False)
    is_twice = keeps_both or setup.recipe.precision.rule == "kahan"
    return _trained(setup) * (2 if is_twice else 1) + optimizer_bytes(setup) + ema


def optimizer_bytes(setup: Setup) -> int:
    """Bytes that the optimizer keeps for everything that trains."""
    state_bytes = getattr(setup.recipe.optimizer, "state_bytes", None)
    if state_bytes is None:  # somebody else's
        return USUAL_STATE_COPIES * _floats(setup)
    return sum(state_bytes(path, p.shape) for path, p in setup.plan.trained().items())


def _trained(setup: Setup) -> int:
    return sum(p.numel() * p.element_size() for p in setup.plan.trained().values())


def _floats(setup: Setup) -> int:
    return FLOAT32_BYTES * sum(p.numel() for p in setup.plan.trained().values())
