"""How much memory and disk a run takes, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from sdtrain.activations import Forward, working_bytes
from sdtrain.setup import Setup

FLOAT32_BYTES = 4
USUAL_STATE_COPIES = 2
"""Of an optimizer that does not say: a running mean and a running square in float32."""


def memory(setup: Setup, chunks: int) -> dict[str, Any]:
    """Bytes of weights, gradients, optimizer, averages and of what the largest step adds to them.

    With phases, gradients and optimizer state are those of the phase that needs most of them.

    Args:
        setup: the run.
        chunks: of the longest prompt.

    Returns:
        `activations` and `total` are None where the model cannot be run without numbers, and
        `why_no_activations` says what it said then.
    """
    networks = setup.family.parts.values()
    weights = sum(p.numel() * p.element_size() for part in networks for p in part.parameters())
    ema = setup.recipe.ema
    parts = {
        "weights": weights,
        "gradients": _at_once(setup, lambda path, p: p.numel() * p.element_size()),
        "optimizer": _at_once(setup, _state_bytes(setup)),
        "ema": _floats(setup) if ema is not None and ema.device == "same" else 0,
    }
    if setup.recipe.precision.rule == "kahan":
        parts["weights"] += _trained(setup)  # what rounding leaves over, in the same format
    known, forward = sum(parts.values()), largest_forward(setup, chunks)
    found = {**parts, "total_without_activations": known, "largest_forward": vars(forward)}
    try:
        working = working_bytes(setup.family, setup.loss(), forward)
    except Exception as error:  # somebody else's model or adapter may look at its numbers
        why = f"{type(error).__name__}: {str(error).strip()[:200]}"
        return {**found, "activations": None, "total": None, "why_no_activations": why}
    activations = max(0, working - parts["gradients"])
    total = known + activations
    return {**found, "activations": activations, "total": total, "why_no_activations": None}


def largest_forward(setup: Setup, chunks: int) -> Forward:
    """The largest bucket that has images, full, with the longest prompts."""
    data, cache = setup.recipe.data, setup.recipe.cache
    sides = [setup.train] if setup.prior is None else [setup.train, setup.prior.assignment]
    used = [side.buckets[at] for side in sides for at in np.unique(side.bucket_of)]
    largest = max(used, key=lambda bucket: (bucket.width * bucket.height, bucket.height))
    samples = min(data.micro_batch_size, data.batch_size, data.run_samples)
    return Forward(
        height=largest.height,
        width=largest.width,
        samples=samples,
        chunks=chunks,
        pictures=min(samples, cache.vae_batch),
        is_repeated=data.batch_size > samples,
    )


def checkpoint_bytes(setup: Setup) -> int:
    """Bytes of one checkpoint on disk."""
    ema = _floats(setup) if setup.recipe.ema is not None else 0
    keeps_both = getattr(setup.recipe.optimizer, "keeps_training_point", False)
    is_twice = keeps_both or setup.recipe.precision.rule == "kahan"
    return _trained(setup) * (2 if is_twice else 1) + optimizer_bytes(setup) + ema


def optimizer_bytes(setup: Setup) -> int:
    """Bytes that the optimizer keeps for everything that trains."""
    size = _state_bytes(setup)
    return sum(size(path, parameter) for path, parameter in setup.plan.trained().items())


def _state_bytes(setup: Setup) -> Callable[[str, Tensor], int]:
    said = getattr(setup.recipe.optimizer, "state_bytes", None)
    if said is None:  # somebody else's
        return lambda path, parameter: USUAL_STATE_COPIES * FLOAT32_BYTES * parameter.numel()
    return lambda path, parameter: int(said(path, parameter.shape))


def _at_once(setup: Setup, size: Callable[[str, Tensor], int]) -> int:
    """The sum over what trains; with phases, the largest sum over what trains at the same time."""
    by_part: dict[str, int] = {}
    for path, parameter in setup.plan.trained().items():
        part = path.split(".")[0]
        by_part[part] = by_part.get(part, 0) + size(path, parameter)
    if setup.phases is None:
        return sum(by_part.values())
    return max(sum(by_part[part] for part in phase.parts) for phase in setup.phases.phases)


def _trained(setup: Setup) -> int:
    return sum(p.numel() * p.element_size() for p in setup.plan.trained().values())


def _floats(setup: Setup) -> int:
    return FLOAT32_BYTES * sum(p.numel() for p in setup.plan.trained().values())
