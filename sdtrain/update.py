"""One optimizer step: forwards, backwards, clip, check, update, and the clock."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdprep.errors import UserError
from sdprep.seeding import integer
from sdtrain.batch import Batch
from sdtrain.buckets import Step
from sdtrain.checkpoint import checkpoints
from sdtrain.failures import newest_checkpoint
from sdtrain.loader import MicroBatch
from sdtrain.run import Run
from sdtrain.setup import Setup
from sdtrain.step import denoising_loss

MOST_SKIPPED_STEPS = 20

Parts = Iterator[tuple[MicroBatch, Batch]]
"""The micro-batches of one optimizer step."""


class DivergedError(UserError):
    """A loss or gradient that is no number."""


def take_step(run: Run, parts: Parts) -> dict[str, Any]:
    """One optimizer step: forwards, backwards, clip, check, update, and the clock.

    The loss is the sum over all samples of weight times loss, divided by their number, however
    they are cut into micro-batches and shared among processes. Samples whose mask leaves nothing
    of them are in neither. All processes take the same decisions and get the same line.

    Returns:
        the training line for the metrics.

    Raises:
        DivergedError: a loss or the gradient is no number; names the samples.
    """
    setup = run.setup
    run.enter_phase()
    rates = run.rates()
    for group in run.optimizer.param_groups:
        group["lr"] = rates.get(group.get("rule", group["name"]), 0.0)

    setup.adapter.begin_step(setup.recipe.seed, run.samples_seen)
    pieces: list[tuple[MicroBatch, Tensor, Tensor]] = []
    num_samples = 0
    for micro, batch in parts:
        # Counted before the first backward, from the boxes alone. If none is left all losses are 0.
        num_samples = num_samples or max(1, setup.reader().num_left(micro.step.slots))
        masked = torch.tensor(masked_out(setup, batch))
        batch = setup.encoder.encoded(batch.to(setup.device))
        logsnr = setup.family.logsnr(batch.u)
        weights = run.weighting(logsnr.exp(), setup.family.prediction_type)
        weights = weights * torch.tensor([slot.weight for slot in micro.slots])
        counted = weights.to(setup.device) * (0.0 if micro.is_padding else 1.0)
        divisor = num_samples / setup.engine.loss_factor
        with keyed_dropout(setup, micro):
            losses = setup.engine.forward(
                partial(denoising_loss, setup.family, batch, run.loss)
            )  # (b,)
            loss = run.scaler.scale((counted * losses).sum() / divisor)
            setup.engine.backward(loss, is_last=micro.is_last)
        pieces.append((micro, losses.detach(), torch.stack([weights, logsnr, masked])))
        if micro.is_last:
            break
    step = micro.step
    losses_by_slot, weights_by_slot, levels_by_slot, masked_by_slot = _by_slot(run, step, pieces)
    left = [slot for slot, is_masked in enumerate(masked_by_slot.tolist()) if not is_masked]
    assert num_samples == max(1, len(left)), "masks and their count disagree"
    _check_losses(run, losses_by_slot, [slot.sample_id for slot in step.slots])
    setup.engine.collect(run.trained.values())
    grad_norm = _update(run, [slot.sample_id for slot in step.slots])

    if run.ema is not None:
        run.ema.update(run.trained, len(step.slots))
    run.samples_seen += len(step.slots)
    run.step += 1
    run.masked_out += len(step.slots) - len(left)
    cut = run.cut_text.take(step)
    for name, lr in rates.items() if not run.skipped_in_a_row else ():
        run.effort[name] = run.effort.get(name, 0.0) + lr * math.sqrt(len(step.slots))
    line = {
        "kind": "train",
        "samples_seen": run.samples_seen,
        "step": run.step,
        "loss": float((weights_by_slot * losses_by_slot)[left].mean()) if left else None,
        "loss_debiased": run.fit.debiased(
            losses_by_slot[left].tolist(), levels_by_slot[left].tolist()
        ),
        "grad_norm": grad_norm,
        "lr": rates,
        **_found_rates(run.optimizer),
        **cut,
    }
    return line if setup.boxes is None else {**line, "masked_out": len(step.slots) - len(left)}


@contextmanager
def keyed_dropout(setup: Setup, micro: MicroBatch) -> Iterator[None]:
    """Dropout of the networks themselves, where their configuration has some, keyed by the clock.

    It is the one thing that draws from torch's own generators; they are as before afterwards.
    Another micro-batch size draws other masks.
    """
    device = setup.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        step = micro.step.samples_seen
        torch.manual_seed(integer(setup.recipe.seed, "dropout", step, *micro.positions[:1]))
        yield


def masked_out(setup: Setup, batch: Batch) -> list[bool]:
    """(B) which samples are left out of the step, because nothing of them counts."""
    return batch.is_masked_out if setup.recipe.mask.normalise else [False] * len(batch)


def _by_slot(run: Run, step: Step, pieces: Sequence[tuple[MicroBatch, Tensor, Tensor]]) -> Tensor:
    """(4, samples of the step) float64: loss, weight, log SNR and masked out, of all processes."""
    found = torch.zeros(4, len(step.slots), dtype=torch.float64)
    losses = torch.cat([losses for _, losses, _ in pieces]).cpu()  # waits for the device once
    start = 0
    for micro, _, others in pieces:
        end = start + len(micro.positions)
        if not micro.is_padding:
            found[0, list(micro.positions)] = losses[start:end].double()
            found[1:, list(micro.positions)] = others.double()
        start = end
    return run.setup.world.add_up(found)


def _found_rates(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, float]]:
    """`lr_times_d` by group, for optimizers that find the size d of their steps themselves."""
    groups = [group for group in optimizer.param_groups if "d" in group]
    rates = {group["name"]: float(group["lr"] * group["d"]) for group in groups}
    return {"lr_times_d": rates} if rates else {}


def _check_losses(run: Run, losses: Tensor, ids: Sequence[str]) -> None:
    bad = [id_ for id_, loss in zip(ids, losses.tolist(), strict=True) if not math.isfinite(loss)]
    if bad:
        raise DivergedError(
            f"the loss is no number after {run.samples_seen:,} samples, for {len(bad)} of "
            f"{len(ids)} images: {', '.join(bad[:8])}",
            _what_to_try(run),
        )


def _update(run: Run, ids: Sequence[str]) -> float:
    """Clip once over everything, then step; returns the norm of the gradient before clipping."""
    most = run.setup.recipe.optimizer.max_grad_norm or math.inf
    run.scaler.unscale_(run.optimizer)
    norm = run.setup.engine.clip(run.trained.values(), most)
    if not math.isfinite(norm):
        run.skipped_in_a_row += 1
        if not run.scaler.is_enabled() or run.skipped_in_a_row > MOST_SKIPPED_STEPS:
            raise DivergedError(
                f"the gradient is no number after {run.samples_seen:,} samples; the step's "
                f"images: {', '.join(ids[:8])}{', …' if len(ids) > 8 else ''}",
                _what_to_try(run),
            )
    else:
        run.skipped_in_a_row = 0
    run.step_optimizer()
    run.optimizer.zero_grad(set_to_none=True)
    return norm


def _what_to_try(run: Run) -> str:
    is_mixed = run.setup.recipe.precision.mixed != "no"
    ways = 'a warm-up, or precision.mixed = "no"' if is_mixed else "or a warm-up"
    try_this = f"Try a lower learning rate, {ways}."
    newest = checkpoints(run.folder.checkpoints)[-1:]
    if not newest:
        return f"{try_this} {newest_checkpoint(run.folder.checkpoints)}"
    return (
        f"{try_this} The newest checkpoint is {newest[0]}: from there the same command ends here "
        "again, and a changed recipe goes on with --accept-change and the keys that it then names; "
        "with --resume and an older checkpoint, if that one is spoilt already."
    )


def refuse_spoilt(run: Run, trained: Mapping[str, Tensor]) -> None:
    """Keep weights that are no numbers out of checkpoints, where they would replace good ones.

    Args:
        run: its clock and older checkpoints are named.
        trained: what is about to be saved, whole, by canonical path.

    Raises:
        DivergedError: a tensor holds NaN or infinity.
    """
    bad = [path for path, tensor in trained.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise DivergedError(
            f"after {run.samples_seen:,} samples {len(bad)} of {len(trained)} trained tensors hold "
            f"what is no number, the first {bad[0]}; no checkpoint is written",
            _what_to_try(run),
        )
