"""What a run intends, written down at its start, so that its page can lay reality beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def num_due(every_samples: int, batch_size: int, total_samples: int, until: int) -> int:
    """How often a cadence is due: at the start, in steps that pass a multiple of it, at the end.

    Args:
        every_samples: the cadence; of two multiples in one step, one look comes.
        batch_size: samples of a step; the last one may be short.
        total_samples: of the run.
        until: the clock at the end of a step, or 0.
    """
    last_step = total_samples - 1 - (total_samples - 1) % batch_size
    before_it = min(until, last_step) // max(every_samples, batch_size)
    return 1 + before_it + (until == total_samples)


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
