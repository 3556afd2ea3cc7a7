"""What a schedule is: a factor on every learning rate, from the number of samples seen."""

from __future__ import annotations

from collections.abc import Callable

from sdprep.errors import UserError

Schedule = Callable[[int], float]
"""`schedule(samples_seen)` before a step to a factor in (0, 1] for it."""


def with_warmup(
    after: Callable[[float], float], warmup_samples: int, total_samples: int
) -> Schedule:
    """Rise in a straight line over the first samples, then follow `after`.

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
            return (samples_seen + 1) / (warmup_samples + 1)
        progress = (samples_seen - warmup_samples) / (total_samples - warmup_samples)
        return after(min(progress, 1.0))

    return schedule
