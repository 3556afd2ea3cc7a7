"""The loop: step, log, validate, sample, save, in that order and nowhere else.

The clock is `samples_seen`. Order, noise, text, crop and learning rate are pure functions of
(seed, samples_seen), so a run that stops and goes on ends in the same bytes as one that does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from typing import Any

import torch

from sdprep.console import progress, say, talk, warn
from sdtrain import checkpoint, page, resolution, sampling, stable_eval, wording
from sdtrain.check_facts import precision_conflicts
from sdtrain.course import BEST, Course, followed, look_back, point_to_best
from sdtrain.deterministic import deterministic
from sdtrain.failures import explained, noted
from sdtrain.hand_over import hand_over
from sdtrain.loader import load
from sdtrain.planned import num_due, planned
from sdtrain.probe_sets import open_probes
from sdtrain.recipe import TrainRecipe
from sdtrain.run import Run, begin
from sdtrain.run_folder import RunFolder
from sdtrain.sample_files import named_pictures
from sdtrain.setup import Setup, open_setup
from sdtrain.stable_eval import ProbeSet
from sdtrain.stopping import StopRequest
from sdtrain.trackers.jsonl import read_metrics
from sdtrain.tracking import open_trackers
from sdtrain.update import Parts, refuse_spoilt, take_step
from sdtrain.world import ALONE, World


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    output: str
    samples_seen: int
    total_samples: int
    step: int
    is_finished: bool
    checkpoint: str | None
    best: str | None
    model: str | None
    verdict: dict[str, Any] | None
    cut_text: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return dict(self.__dict__)


def train(
    recipe: TrainRecipe,
    *,
    resume: str = "auto",
    accept: Sequence[str] = (),
    keeps_model: bool = True,
    world: World = ALONE,
) -> Outcome:
    """Train a recipe to its end, or until asked to stop; run again to go on.

    Args:
        recipe: what to train.
        resume: where to go on from; see `begin`.
        accept: recipe keys that may differ from the checkpoint's.
        keeps_model: whether the finished model is written; a trial run needs none.
        world: the processes that train together; each of them calls this.

    Raises:
        UserError: anything that the user can mend, before training where it can be known.
    """
    folder = RunFolder(recipe.output)
    world.on_main(folder.require_free)
    with ExitStack() as stack:
        stack.enter_context(deterministic(recipe.precision.deterministic))
        setup = world.everywhere(lambda: open_setup(recipe, world))
        for conflict in precision_conflicts(recipe.precision.mixed, setup.device):
            warn(conflict)
        talk.print(setup.plan.table(), markup=False, soft_wrap=True)
        worst, where = setup.worst_step_ratio
        past = "after the warm-up, " if setup.warmup_samples else ""
        say(
            f"{past}from one step to the next the rate changes by ×{worst:.4g} at most, "
            f"at {where:,} samples"
        )
        world.on_main(lambda: stack.enter_context(folder.writing()))
        stop = stack.enter_context(StopRequest())
        run = begin(setup, folder, resume=resume, accept=accept)
        was_finished = run.is_finished
        with explained(run):
            if not was_finished:
                world.on_main(lambda: folder.describe(recipe, facts(setup)))
                with ExitStack() as open_files:  # closing writes, too
                    trackers: list[Any] = []  # only the main process has any
                    resumed_at = run.samples_seen or None
                    world.on_main(
                        lambda: trackers.extend(open_trackers(recipe, folder, resumed_at))
                    )
                    for tracker in trackers:
                        open_files.callback(tracker.close)
                    open_files.callback(setup.encoder.flush)
                    with noted(trackers, run):
                        fit(run, trackers, stop)
            renew = page.mend if was_finished else partial(page.refresh, is_last=True)
            world.on_main(lambda: renew(folder))
            if run.cut_text.prompts:
                say(run.cut_text.sentence(run.samples_seen))
            if run.masked_out:
                say(f"{run.masked_out:,} samples lay whole inside masked boxes and did not count")
            if keeps_model:
                world.on_main(lambda: hand_over(run))
    newest = checkpoint.checkpoints(folder.checkpoints)[-1:]
    best = followed(folder.checkpoints / BEST)
    verdicts = [line for line in read_metrics(folder.metrics) if line["kind"] == "verdict"]
    return Outcome(
        output=str(folder.path),
        samples_seen=run.samples_seen,
        total_samples=setup.total_samples,
        step=run.step,
        is_finished=run.is_finished,
        checkpoint=str(newest[0]) if newest else None,
        best=str(best) if best.is_dir() else None,
        model=str(folder.model) if folder.model.exists() else None,
        verdict=verdicts[-1] if verdicts and run.is_finished else None,
        cut_text=run.cut_text.to_json(),
    )


def facts(setup: Setup) -> dict[str, Any]:
    """What a run folder's environment.json says besides versions."""
    device = setup.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": f"{device} ({name})",
        "processes": setup.world.size,
        "data": {**setup.data.provenance, "fingerprint": setup.data.fingerprint},
        "freeze_table": setup.plan.table().splitlines(),
        "freeze_rows": [dict(row.__dict__) for row in setup.plan.rows],
        "total_samples": setup.total_samples,
        "plan": planned(setup),
        "schedule_samples": setup.schedule_samples,
        "model": f"{setup.family.name} from {setup.recipe.model.path}",
        "adapter": setup.recipe.adapter.type,
        "origin": setup.data.origin,
        "images": {
            "train": len(setup.train.kept),
            "validation": 0 if setup.validation is None else len(setup.validation.kept),
            "refused": len(setup.train.refused),
        },
    }


def fit(run: Run, trackers: Sequence[Any], stop: StopRequest) -> None:
    """Train from where the run's clock stands to its end, or until `stop`.

    Args:
        run: fresh or restored; changed in place.
        trackers: each gets every metrics line.
        stop: becomes true when the user asks to end; the run then saves and returns. One
            process that is asked stops all of them, after the same step.
    """
    setup, recipe, world = run.setup, run.setup.recipe, run.setup.world
    total = setup.total_samples
    validate_every = setup.every_samples(recipe.validation.every_samples, 40)
    sample_every = recipe.sampling.every_samples or total
    save_every = setup.every_samples(recipe.checkpoint.every_samples, 10)
    probes = open_probes(setup, run.folder.validation, run.samples_seen, run.evaluations)
    shapes = [(each.probe.name, *each.probe.shape) for each in probes]
    say(wording.cost(shapes, num_due(validate_every, recipe.data.batch_size, total, total)))
    run.course = look_back(probes, recipe.validation.stop)
    if run.is_finished:  # stopped early before
        return

    # None is the look before the first step; where a run goes on, nothing is due at that look.
    first_look: list[Parts | None] = [None]
    with progress("training", total, "samples") as bar:
        bar.advance(run.samples_seen)
        for parts in chain(first_look, steps(run)):
            before = run.samples_seen
            if parts is not None:
                log(trackers, take_step(run, parts))
                bar.advance(run.samples_seen - before)
            is_best = False
            if is_due(run, validate_every, before):
                for line in evaluate(run, probes):
                    log(trackers, line)
                run.course = look_back(probes, recipe.validation.stop)
                is_best = run.course.is_best and recipe.checkpoint.best
                if run.is_finished and probes:
                    conclude(run, run.course, trackers)
                world.on_main(lambda: page.refresh(run.folder))
            is_last = run.is_finished
            if recipe.sampling.prompts and (is_last or is_due(run, sample_every, before)):
                with run.weights_to_use():
                    found = sampling.draw(setup, run.folder, run.samples_seen)
                if found:
                    log(trackers, found)
                for tracker in trackers:
                    place = run.folder.samples / str(run.samples_seen)
                    tracker.pictures(named_pictures(place), run.samples_seen)
            is_stopping = world.any(stop.is_set)
            must_save = is_stopping or is_best or is_last
            if run.step and (must_save or is_due(run, save_every, before)):
                save(run, trackers)
            if is_last:
                break
            if is_stopping:
                say(f"stopped at {run.samples_seen:,} of {total:,} samples; run again to go on")
                break


def is_due(run: Run, every_samples: int, before: int) -> bool:
    """Whether the clock stands at the start or the end, or passed a multiple of a cadence."""
    now = run.samples_seen
    at_an_end = now in (0, run.setup.total_samples)
    return at_an_end or before // every_samples < now // every_samples


def steps(run: Run) -> Iterator[Parts]:
    """The micro-batches of one optimizer step after the other, from the clock on."""
    setup = run.setup
    coming = setup.micro_batches(run.samples_seen)
    loaded = load(setup.reader(stored=True), coming, setup.recipe.data.workers)
    for _, parts in groupby(loaded, key=lambda part: part[0].step.samples_seen):
        yield parts


def evaluate(run: Run, probes: Sequence[ProbeSet]) -> list[dict[str, Any]]:
    """One validation line for each probe, kept in the run's history."""
    with run.weights_to_use():
        lines = [stable_eval.evaluate(probe, run.samples_seen) for probe in probes]
    if run.ema is not None:
        with run.ema.in_place(run.trained):
            lines += [stable_eval.evaluate(probe, run.samples_seen, "ema") for probe in probes]
    if lines:
        talk.print(wording.moment(lines, stable_eval.verdict(lines)), markup=False, soft_wrap=True)
    words = ""
    if lines and run.samples_seen and all(not line["samples_seen"] for line in run.evaluations):
        words = wording.resolution(lines)  # the first time that there is a change to look at
    elif lines and not run.samples_seen:
        words = resolution.announcement(lines)
    if words:
        say(words)
    run.evaluations += lines
    return lines


def conclude(run: Run, course: Course, trackers: Sequence[Any]) -> None:
    """Say what the run has come to, and keep it as the last line of the metrics."""
    if course.stop:
        say(f"stopped early at {run.samples_seen:,} samples: {course.stop}")
    say(course.verdict.sentence)
    log(trackers, course.to_json(run.samples_seen))


def save(run: Run, trackers: Sequence[Any]) -> None:
    """Write a checkpoint; what was logged so far reaches the disk before it.

    Raises:
        DivergedError: a weight is no number.
    """
    setup = run.setup
    run.check_what_moved()
    wanted = setup.recipe.checkpoint
    verdict = run.course.verdict if run.course and wanted.best else None
    best = verdict.best.samples_seen if verdict and verdict.best else None
    # What is spread is put together by all processes, a whole state is saved by the main one.
    snapshot = run.snapshot() if setup.world.is_main or setup.engine.has_spread_state else None

    def write() -> None:
        for tracker in trackers:
            tracker.sync()
        assert snapshot is not None, "made above"
        refuse_spoilt(run, snapshot.trained)
        checkpoint.write(run.folder.checkpoints, snapshot, wanted.keep, best)
        if verdict:
            point_to_best(run.folder.checkpoints, verdict)

    setup.world.on_main(write)


def log(trackers: Sequence[Any], line: dict[str, Any]) -> None:
    """Give one line to every tracker."""
    for tracker in trackers:
        tracker.log(line)
