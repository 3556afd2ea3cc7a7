"""What a schedule is: a factor on every learning rate, from the number of samples seen."""

from __future__ import annotations

from collections.abc import Callable

from sdprep.errors import UserError

MOST_STEP_RATIO = 1.1
"""Largest change of the rate from one step to the next that running moments follow."""

Schedule = Callable[[int], float]
"""`schedule(samples_seen)` before a step to a factor in (0, 1] for it."""


def with_warmup(
    after: Callable[[float], float], warmup_samples: int, total_samples: int
) -> Schedule:
    """Rise in a straight line to where `after` begins, then follow it.

    The first step is above zero, and nothing depends on how a step's samples are spread over
    micro-batches and GPUs.

    Args:
        after: factor as a function of progress in [0, 1] from the end of the warm-up.
        warmup_samples: length of the rise; 0 for none.
        total_samples: length of the whole run.

    Raises:
        UserError: the warm-up would fill the whole run.
    """
    if warmup_samples >= total_samples:
        raise UserError(
            f"schedule.warmup_samples = {warmup_samples:,} leaves nothing of the run's "
            f"{total_samples:,} samples",
            "Give the warm-up fewer samples, or train for longer.",
        )

    def schedule(samples_seen: int) -> float:
        if samples_seen < warmup_samples:
            return after(0.0) * (samples_seen + 1) / (warmup_samples + 1)
        progress = (samples_seen - warmup_samples) / (total_samples - warmup_samples)
        return after(min(progress, 1.0))

    return schedule


def worst_step_ratio(
    schedule: Schedule, warmup_samples: int, total_samples: int, batch_size: int
) -> tuple[float, int]:
    """Simulate a run: the largest change of the rate between two steps, up or down.

    Args:
        schedule: what is simulated.
        warmup_samples: steps that begin in this first rise from 0 do not count.
        total_samples: length of the whole run.
        batch_size: samples per optimizer step.

    Returns:
        the ratio, at least 1, and the clock of the later of the two steps.
    """
    first = -(-warmup_samples // batch_size) * batch_size
    worst, where, before = 1.0, first, schedule(first)
    for clock in range(first + batch_size, total_samples, batch_size):
        now = schedule(clock)
        ratio = max(now, before) / min(now, before)
        if ratio > worst:
            worst, where = ratio, clock
        before = now
    return worst, where


def refuse_jumps(
    schedule: Schedule, warmup_samples: int, total_samples: int, batch_size: int
) -> None:
    """Stop before training where a step would change the rate too much.

    Raises:
        UserError: names the worst ratio and where it is.
    """
    worst, where = worst_step_ratio(schedule, warmup_samples, total_samples, batch_size)
    if worst > MOST_STEP_RATIO + 1e-9:
        raise UserError(
            f"[schedule] changes the rate by ×{worst:.3g} in one step, at {where:,} of "
            f"{total_samples:,} samples; expected ×{MOST_STEP_RATIO} at most",
            "Train for longer, make fewer and longer cycles, or raise the lowest rate.",
        )
