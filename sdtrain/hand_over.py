"""The finished model, written where others can read it: a diffusers folder, or adapter files."""

from __future__ import annotations

from pathlib import Path

import torch

from sdprep.console import say
from sdtrain import checkpoint
from sdtrain.course import BEST, followed
from sdtrain.outputs import written_whole
from sdtrain.run import Run, load_trained
from sdtrain.setup import open_model
from sdtrain.trackers.jsonl import has_stopped_early, read_metrics


def hand_over(run: Run) -> None:
    """Write the model into the run folder; nothing happens before the end, or if it is there.

    After an early stop that is the best checkpoint, for whose sake the run was stopped.
    """
    final = run.folder.model
    if not run.is_finished or final.exists():
        return
    best = followed(run.folder.checkpoints / BEST)
    # Not by run.course: a run that was killed after its last checkpoint looks at nothing again.
    is_best = has_stopped_early(read_metrics(run.folder.metrics)) and best.is_dir()
    with written_whole(final) as temporary:  # the disk may be full of it
        if run.setup.engine.is_sharded:
            newest = run.folder.checkpoints / str(run.samples_seen)
            _save_from_checkpoint(run, best if is_best else newest, temporary)
        else:
            with run.weights_of(best) if is_best else run.weights_to_hand_over():
                run.setup.adapter.save(run.setup.family, temporary)
    if is_best:
        say(f"model/ is the best checkpoint, {best}")


def _save_from_checkpoint(run: Run, source: Path, path: Path) -> None:
    """Write what a checkpoint holds, through a model that is not spread over the processes."""
    family, adapter, _, plan = open_model(run.setup.recipe, torch.device("cpu"))
    snapshot = checkpoint.read(source)
    load_trained(plan, snapshot.trained)
    if run.ema is not None and run.ema.section.hand_over:
        load_trained(plan, snapshot.more["ema"])
    adapter.save(family, path)
