"""The state of a run: what a checkpoint keeps, and how a run starts or goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdprep.console import say, talk
from sdprep.errors import UserError
from sdtrain import checkpoint
from sdtrain.averages import Ema, is_schedule_free, put, restored, weights_to_use
from sdtrain.conditions import refuse_changes
from sdtrain.course import Course, meant
from sdtrain.cut_text import CutText
from sdtrain.data_fingerprint import what_changed
from sdtrain.debias import LossFit
from sdtrain.engine import laid_out_like
from sdtrain.freeze_plan import FreezePlan
from sdtrain.phases import PhaseSwitch, resting_left_out
from sdtrain.precision import Rounding, seen_as_float32
from sdtrain.run_folder import RunFolder, versions
from sdtrain.setup import Setup
from sdtrain.tensor_hashes import part_hashes, tensor_hash, tensor_hashes

SCALER_START = 2.0**16
SCALER_GROWTH_SAMPLES = 500_000


@dataclass
class Run:
    """What changes while training; a checkpoint keeps all of it.

    Args:
        setup: what does not change.
        folder: where results go.
        samples_seen: the clock.
        step: optimizer steps taken.
        effort: sum of learning rate times the root of the step's samples, by group.
        evaluations: validation lines so far.
        fit: what the debiased loss curve is divided by.
        skipped_in_a_row: steps that the float16 scaler left out just now.
        masked_out: samples that a mask left nothing of.
        cut_text: what was cut off the prompts that were trained.
        course: what the evaluations so far say; a function of them, so no checkpoint keeps it.
        parts_trained: networks that took part in a step.
    """

    setup: Setup
    folder: RunFolder
    samples_seen: int = 0
    step: int = 0
    effort: dict[str, float] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    fit: LossFit = field(default_factory=LossFit)
    skipped_in_a_row: int = 0
    masked_out: int = 0
    cut_text: CutText = field(default_factory=CutText)
    course: Course | None = None
    parts_trained: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        setup = self.setup
        self.trained = setup.plan.trained()
        self.names = {id(parameter): path for path, parameter in self.trained.items()}
        self.optimizer = setup.engine.own(setup.optimizer(), setup)
        self.ema = Ema(setup.recipe.ema, self.trained) if setup.recipe.ema else None
        rule = setup.recipe.precision.rule
        self.rounding = Rounding(rule, setup.recipe.seed, self.trained) if rule else None
        self.loss, self.weighting = setup.loss(), setup.weighting()
        self.schedule = setup.schedule()
        networks = setup.family.parts
        self.phases = PhaseSwitch(setup.phases, self.trained, networks) if setup.phases else None
        self.frozen_start = {path: setup.start_hashes[path] for path in setup.plan.frozen}
        self.trained_start = self.part_hashes()
        self.scaler = torch.amp.GradScaler(
            setup.device.type,
            init_scale=SCALER_START,
            growth_interval=max(1, SCALER_GROWTH_SAMPLES // setup.recipe.data.batch_size),
            enabled=setup.recipe.precision.mixed == "fp16",
        )

    def enter_phase(self) -> None:
        """Let the parts train whose turn it is at the clock; the first time that is told."""
        if self.phases is not None and self.phases.enter(self.samples_seen, self.optimizer):
            plan, index = self.phases.plan, self.phases.index
            assert index is not None
            say(f"at {self.samples_seen:,} samples {plan.describe(index)}")
            talk.print(plan.table(self.setup.plan, index), markup=False, soft_wrap=True)
        self.parts_trained |= {p.split(".")[0] for p, t in self.trained.items() if t.requires_grad}

    def rates(self) -> dict[str, float]:
        """Learning rate of the step at the clock, by group; of those that train now."""
        factor = self.schedule(self.samples_seen)
        return {
            group.name: group.lr * factor
            for group in self.setup.plan.groups
            if any(parameter.requires_grad for parameter in group.parameters.values())
        }

    def step_optimizer(self) -> None:
        """Take the gradients into the weights; a step in which float16 overflowed is left out."""
        with resting_left_out(self.optimizer):
            if self.rounding is None:
                self.scaler.step(self.optimizer)
            else:
                self.rounding.step(self.optimizer, self.samples_seen)
        self.scaler.update()

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to train: the end is reached, or the evaluations say stop."""
        has_stopped = self.course is not None and self.course.stop is not None
        return has_stopped or self.samples_seen >= self.setup.total_samples

    def part_hashes(self) -> dict[str, str]:
        """One hash of everything that trains in each part."""
        return part_hashes(tensor_hashes(sorted(self.trained.items())))

    def check_what_moved(self) -> None:
        """At every save: frozen tensors are as they were, and every part that trained has moved.

        Raises:
            AssertionError: a frozen tensor changed or has a gradient, or a part whose phase has
                not come yet has moved.
            UserError: a part that should train is as it was at the start.
        """
        self.setup.plan.assert_frozen(self.frozen_start)
        for path, parameter in self.trained.items():
            assert parameter.requires_grad or parameter.grad is None, f"{path} rests, with gradient"
        is_still = {p: value == self.trained_start[p] for p, value in self.part_hashes().items()}
        early = [part for part in is_still if part not in self.parts_trained and not is_still[part]]
        assert not early, f"{', '.join(early)} changed before the phase that trains it"
        still = [part for part in is_still if part in self.parts_trained and is_still[part]]
        if still and not self.skipped_in_a_row:
            raise UserError(
                f"after {self.samples_seen:,} samples nothing in {', '.join(still)} has changed",
                "Its learning rate may be too small to move a float32, or it gets no gradient.",
            )

    def weights_to_use(self) -> AbstractContextManager[None]:
        """The weights that evaluations, pictures and files take, in the model for a while."""
        return weights_to_use(self.optimizer, self.trained)

    def weights_to_hand_over(self) -> AbstractContextManager[None]:
        """The weights of the finished model, in it for a while."""
        if self.ema is not None and self.ema.section.hand_over:
            return self.ema.in_place(self.trained)
        return self.weights_to_use()

    @contextmanager
    def weights_of(self, path: Path) -> Iterator[None]:
        """What a checkpoint of this run would hand over, in the model for a while."""
        snapshot = checkpoint.read(path)
        is_average = self.ema is not None and self.ema.section.hand_over
        with restored(self.trained):
            put(snapshot.more["ema"] if is_average else snapshot.trained, self.trained)
            yield

    def snapshot(self) -> checkpoint.Snapshot:
        """Everything, as it is now."""
        setup, take = self.setup, self.setup.engine.take
        tensors, plain = checkpoint.optimizer_state(self.optimizer, self.names, take)
        state = {
            "format_version": checkpoint.FORMAT_VERSION,
            "samples_seen": self.samples_seen,
            "step": self.step,
            "conditions": setup.conditions(),
            "recipe": setup.recipe.resolved(),
            "data": {**setup.data.provenance, "fingerprint": setup.data.fingerprint},
            "versions": versions(),
            "optimizer": plain,
            "scaler": self.scaler.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "masked_out": self.masked_out,
            "cut_text": self.cut_text.to_json(),
            "parts_trained": sorted(self.parts_trained),
            "effort": self.effort,
            "loss_fit": self.fit.state(),
            "evaluations": self.evaluations,
            "trained_start": self.trained_start,
            "freeze_table": setup.plan.table(),
        }
        more: dict[str, dict[str, torch.Tensor]] = {}
        with self.weights_to_use():
            trained = self._taken(self.trained, copy=is_schedule_free(self.optimizer))
        if is_schedule_free(self.optimizer):
            more["training_point"] = self._taken(self.trained)
        if self.ema is not None:
            more["ema"] = self._taken(self.ema.values)
        if self.rounding is not None and self.rounding.left_over:
            more["kahan"] = self._taken(self.rounding.left_over)
        return checkpoint.Snapshot(state, trained, tensors, more)

    def _taken(
        self, tensors: Mapping[str, torch.Tensor], *, copy: bool = False
    ) -> dict[str, torch.Tensor]:
        """Tensors as a file takes them; on a CPU they are the same ones unless copied."""
        found = {path: self.setup.engine.take(tensor) for path, tensor in tensors.items()}
        return {path: tensor.clone() if copy else tensor for path, tensor in found.items()}

    def _can_use_state_of(self, saved: Mapping[str, Any]) -> bool:
        """Whether a checkpoint's optimizer kept what this one keeps; says so if it did not."""
        own = self.setup.recipe.optimizer
        keys = ("type", *getattr(own, "shapes_state", ()))
        changed = [key for key in keys if saved.get(key) != getattr(own, key)]
        if changed:
            what = ", ".join(f"{k} {saved.get(k)!r} -> {getattr(own, k)!r}" for k in changed)
            say(f"the optimizer begins afresh, without the checkpoint's moments: {what}")
        return not changed

    def restore(self, snapshot: checkpoint.Snapshot) -> None:
        """Go on from a checkpoint."""
        state = snapshot.state
        load_trained(self.setup.plan, snapshot.trained)
        has_same_optimizer = self._can_use_state_of(state["conditions"]["optimizer"])
        point = snapshot.more.get("training_point", {}) if has_same_optimizer else {}
        put({path: value for path, value in point.items() if path in self.trained}, self.trained)
        if self.ema is not None:
            self.ema.restart(self.trained, snapshot.more.get("ema"))
        if self.rounding is not None:
            self.rounding.restore(snapshot.more.get("kahan", {}))
        if has_same_optimizer:
            with seen_as_float32(self.trained) if self.rounding else nullcontext():
                checkpoint.restore_optimizer(
                    self.optimizer, self.names, snapshot.optimizer, state["optimizer"]
                )
        self.samples_seen, self.step = snapshot.samples_seen, int(state["step"])
        self.effort, self.evaluations = dict(state["effort"]), list(state["evaluations"])
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
        self.masked_out = int(state.get("masked_out", 0))  # absent from older checkpoints
        self.cut_text = CutText(**state.get("cut_text", {}))
        self.parts_trained = set(state.get("parts_trained", self.trained_start))
        self.trained_start = {**self.trained_start, **state["trained_start"]}
        for path in self.setup.plan.frozen.keys() & snapshot.trained.keys():
            # Trained before, frozen now by an accepted change of the rules.
            self.frozen_start[path] = tensor_hash(self.setup.plan.frozen[path])
        self.fit.restore(state["loss_fit"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def load_trained(plan: FreezePlan, saved: Mapping[str, torch.Tensor]) -> None:
    """Put the trained parameters of a checkpoint into a model.

    Raises:
        UserError: the checkpoint has a tensor that this model has no place for.
    """
    places = {**plan.frozen, **plan.trained()}
    for path, tensor in saved.items():
        place = places.get(path)
        if place is None or place.shape != tensor.shape:
            found = "nothing of that name" if place is None else str(tuple(place.shape))
            raise UserError(
                f"the checkpoint has {path} {tuple(tensor.shape)}, the model has {found}",
                "Use the recipe (model and adapter) that the checkpoint was made with.",
            )
        with torch.no_grad():
            place.copy_(laid_out_like(tensor, place))


def begin(setup: Setup, folder: RunFolder, *, resume: str, accept: Sequence[str] = ()) -> Run:
    """Start a run, or go on with the one in the folder.

    Args:
        setup: what the recipe stands for.
        folder: the run's, held for writing.
        resume: `auto` takes the newest checkpoint if there is one; `never` insists on a fresh
            start; anything else is the path of a checkpoint.
        accept: recipe keys that may differ from the checkpoint's.

    Raises:
        UserError: the checkpoint was made under other conditions; lists them.
    """
    world = setup.world
    world.on_main(lambda: checkpoint.clear_leftovers(folder.checkpoints))
    path = world.on_main(lambda: _chosen(folder, resume))
    run = Run(setup, folder)
    if path is None:
        return run
    snapshot = world.everywhere(lambda: checkpoint.read(path))
    saved = snapshot.state["conditions"]
    known = snapshot.state["data"].get("splits") or {}
    about_data = what_changed(known, setup.data.provenance["splits"]) + _moved(snapshot, setup)
    for change in refuse_changes(path, saved, setup.conditions(), accept, about_data):
        say(f"accepted change: {change}")
    run.restore(snapshot)
    world.on_main(lambda: checkpoint.set_aside_newer(folder.checkpoints, run.samples_seen))
    say(f"resuming from {path}")
    return run


def _moved(snapshot: checkpoint.Snapshot, setup: Setup) -> str:
    """How to get the data of a checkpoint back, as a sentence, if they moved on at the Hub."""
    before = snapshot.state["data"].get("revision")
    if before is None or before == setup.data.provenance["revision"]:
        return ""
    return f'The checkpoint was trained on data.revision = "{before}". '


def _chosen(folder: RunFolder, resume: str) -> Path | None:
    there = checkpoint.checkpoints(folder.checkpoints)
    if resume == "auto":
        return there[-1] if there else None
    if resume == "never":
        if there:
            raise UserError(
                f"--resume never: {folder.path} already holds checkpoints, the newest at "
                f"{there[-1].name} samples",
                "Name another output, or delete that folder first.",
            )
        return None
    return meant(Path(resume))
