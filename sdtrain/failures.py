"""What ends a run from outside: memory and disk; said in words, with what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdprep.errors import DataError, UserError
from sdtrain import checkpoint, page
from sdtrain.deterministic import what_is_missing
from sdtrain.disk import is_full
from sdtrain.world import what_failed

if TYPE_CHECKING:
    from sdtrain.run import Run

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@contextmanager
def explained(run: Run) -> Iterator[None]:
    """Turn what the machine lacks into a message that says so.

    Raises:
        UserError: in place of an out-of-memory error, a full disk or a kernel that is not
            deterministic; other errors pass.
        DataError: that of a picture, with what to do next.
    """
    try:
        yield
    except UserError as error:
        if type(error) is DataError and not error.hint:  # a row of the data set, most often
            raise DataError(
                error.message,
                f"Mend that file, or leave it out. {newest_checkpoint(run.folder.checkpoints)}",
            ) from error
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            where = f"{run.setup.device} is out of memory after {run.samples_seen:,} samples"
            reason = str(error).strip().splitlines()
            raise UserError(
                f"{where}: {reason[0]}" if reason else where,
                f"{_how_to_need_less(run)} {newest_checkpoint(run.folder.checkpoints)}",
            ) from error
        if is_full(error):
            raise UserError(
                f"the disk of {run.folder.path} is full after {run.samples_seen:,} samples: "
                f"{error}",
                f"Free some space. {newest_checkpoint(run.folder.checkpoints)}",
            ) from error
        missing = what_is_missing(error)
        if missing is not None:
            raise UserError(
                f"precision.deterministic = true, and {run.setup.device} can compute {missing} "
                "only in an order that varies",
                "Set precision.deterministic = false. " + newest_checkpoint(run.folder.checkpoints),
            ) from error
        raise


@contextmanager
def noted(trackers: Sequence[Any], run: Run) -> Iterator[None]:
    """Leave word of an error in the metrics and on the page, where a run else seems to train on.

    Args:
        trackers: the metrics first; none in processes that do not write.
        run: its clock says when, its folder where.
    """
    try:
        yield
    except Exception as error:
        if trackers:
            message = what_failed(error)
            line = {"kind": "error", "samples_seen": run.samples_seen, "message": message}
            with suppress(OSError):  # the disk may be what failed
                trackers[0].log(line)
            page.refresh(run.folder, is_last=True)
        raise


def newest_checkpoint(folder: Path) -> str:
    """Where a run would go on from, as a sentence."""
    newest = checkpoint.checkpoints(folder)[-1:]
    if not newest:
        return "There is no checkpoint yet: the run would start anew."
    return f"The newest checkpoint is {newest[0]}; the same command goes on from there."


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def _how_to_need_less(run: Run) -> str:
    """What the recipe still leaves to try, cheapest first."""
    recipe: Any = run.setup.recipe
    ways = []
    if recipe.data.micro_batch_size > 1:
        ways.append(
            f"data.micro_batch_size = {recipe.data.micro_batch_size // 2} (it is "
            f"{recipe.data.micro_batch_size}; the result stays the same)"
        )
    if getattr(recipe.model, "gradient_checkpointing", True) is False:
        ways.append("model.gradient_checkpointing = true")
    if recipe.precision.mixed == "no":
        ways.append('precision.mixed = "bf16"')
    if recipe.adapter.type == "full":
        ways.append('adapter.type = "lora"')
    if run.setup.world.size > 1 and not run.setup.engine.is_sharded:
        ways.append('distributed.engine = "fsdp2"')
    if not ways:
        return "Lower data.resolution_px, or use a device with more memory."
    return f"Try {', or '.join(ways)}."
