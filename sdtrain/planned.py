"""What a run intends, written down at its start, so that its page can lay reality beside it."""

from __future__ import annotations

from typing import Any

from sdtrain.setup import Setup

CURVE_POINTS = 200


def planned(setup: Setup) -> dict[str, Any]:
    """Length, cadences, learning rates and phases, as JSON holds them."""
    recipe, total = setup.recipe, setup.total_samples
    return {
        "steps": setup.num_steps,
        "batch_size": recipe.data.batch_size,
        "validate_every": setup.every_samples(recipe.validation.every_samples, 40),
        "sample_every": (recipe.sampling.every_samples or total) if recipe.sampling.prompts else 0,
        "save_every": setup.every_samples(recipe.checkpoint.every_samples, 10),
        "lr": _rates(setup),
        "phases": _phases(setup),
    }


def rates_at(setup: Setup, samples_seen: int) -> dict[str, float]:
    """Planned rate of every group in the step that starts here; 0 while its part rests."""
    phases, factor = setup.phases, setup.schedule()(samples_seen)
    live = None if phases is None else phases.phases[phases.at(samples_seen)].parts
    return {
        group.name: group.lr * factor
        if live is None or any(path.split(".")[0] in live for path in group.parameters)
        else 0.0
        for group in setup.plan.groups
    }


def _rates(setup: Setup) -> dict[str, list[tuple[int, float]]]:
    """Rate of every group at up to 200 steps; 0 while its part rests."""
    batch, steps = setup.recipe.data.batch_size, setup.num_steps
    most = min(steps, CURVE_POINTS)
    starts = [round(k * (steps - 1) / max(1, most - 1)) * batch for k in range(most)]
    curves: dict[str, list[tuple[int, float]]] = {group.name: [] for group in setup.plan.groups}
    for start in starts:
        end = min(start + batch, setup.total_samples)  # metrics name a step by its end
        for name, rate in rates_at(setup, start).items():
            curves[name].append((end, rate))
    return curves


def _phases(setup: Setup) -> list[str]:
    plan = setup.phases
    return [] if plan is None else [plan.describe(index) for index in range(len(plan.phases))]
