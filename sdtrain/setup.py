"""Everything a recipe stands for, opened: data, model, what trains, buckets and length.

`run`, `check`, `inspect` and `validate` all start here, so they cannot disagree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sdprep.buckets import Bucket, bucket_list
from sdprep.console import talk, warn
from sdprep.errors import UserError
from sdprep.seeding import digest
from sdtrain.accelerate_env import require_agreement
from sdtrain.buckets import Assignment, GlobalOrder, assign, limited, require_enough
from sdtrain.cache.caches import Caches
from sdtrain.cache.encoding import Encoder
from sdtrain.compiling import compile_blocks, require_compiler
from sdtrain.dataset import TrainingData, open_data, policy_words, renderer
from sdtrain.engine import Engine
from sdtrain.family import Family, Loss
from sdtrain.freeze_plan import FreezePlan
from sdtrain.freezing import build_plan
from sdtrain.loader import BatchReader, MicroBatch, plan_micro_batches
from sdtrain.loss_masks import BoxCensus, over_all_latents, take_census
from sdtrain.phases import PhasePlan, plan_phases, split_by_part
from sdtrain.precision import narrow
from sdtrain.prior import Prior, PriorOrder, WithPrior, open_prior
from sdtrain.recipe import TrainRecipe
from sdtrain.schedule import Schedule, worst_step_ratio
from sdtrain.tensor_hashes import tensor_hashes
from sdtrain.weighting import Weighting
from sdtrain.wordless import wordless
from sdtrain.world import ALONE, World


@dataclass
class Setup:
    """A run that could start.

    Args:
        recipe: as it was read.
        device: where the networks are.
        data: both splits and the prompt policy.
        family: the model, with the adapter attached and everything frozen that does not train.
        adapter: how it is trained.
        plan: what trains at which rate.
        start_hashes: hash of every base tensor as it was loaded, by canonical path.
        train: bucket of every training row, or why it is refused.
        validation: the same of the validation split; None if there is none.
        boxes: what the loss masks of the training rows are made of; None if nothing is masked.
        prior: pictures of the class that are trained among the others; None if there are none.
        engine: how the processes share the work.
    """

    recipe: TrainRecipe
    device: torch.device
    data: TrainingData
    family: Family
    adapter: Any
    plan: FreezePlan
    start_hashes: dict[str, str]
    train: Assignment
    validation: Assignment | None
    boxes: BoxCensus | None = None
    prior: Prior | None = None
    engine: Engine = Engine(ALONE)

    @property
    def world(self) -> World:
        """The processes that train together."""
        return self.engine.world

    @cached_property
    def order(self) -> GlobalOrder | PriorOrder:
        """The stream of training samples, those of a prior among them."""
        if self.prior is None:
            return self._own_order
        return self.prior.order(
            self._own_order,
            num_train=len(self.data.train),
            seed=self.recipe.seed,
            run_samples=self.recipe.data.run_samples,
            family=self.family,
        )

    @cached_property
    def rows(self) -> Any:
        """What the rows of the stream's slots are rows of, as far as the loader asks."""
        train = self.data.train
        return train if self.prior is None else WithPrior(train, self.prior.data.train)

    @cached_property
    def _own_order(self) -> GlobalOrder:
        family = self.family
        texts = renderer(
            *(self.data.train, self.data.policy, self.recipe.seed),
            *(family.num_chunks, family.num_tokens_cut),
        )
        return GlobalOrder(
            self.data.train.ids,
            self.train,
            texts,
            seed=self.recipe.seed,
            run_samples=self.recipe.data.run_samples,
            repeats=self.data.train.repeats,
        )

    @property
    def total_samples(self) -> int:
        """Length of the run in samples."""
        train = self.recipe.train
        if train.samples is not None:
            return train.samples
        assert train.epochs is not None
        epoch = int(self.data.train.repeats[self.train.kept].sum())
        share = 1.0 if self.prior is None else 1 - self.prior.section.fraction
        return max(1, round(train.epochs * epoch / share))

    @property
    def schedule_samples(self) -> int:
        """Length that the schedule is made for."""
        return max(self.recipe.train.schedule_samples or 0, self.total_samples)

    @property
    def evaluation_seed(self) -> int:
        """Keys the images, prompts, levels and noise of every probe."""
        seed = self.recipe.validation.seed
        return self.recipe.seed if seed is None else seed

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.total_samples // self.recipe.data.batch_size)

    def every_samples(self, asked: int | None, share: int) -> int:
        """A cadence of the recipe, or its default: one `share`-th of the run, in whole steps."""
        if asked is not None:
            return asked
        steps = max(1, round(self.num_steps / share))
        return steps * self.recipe.data.batch_size

    def micro_batches(self, samples_seen: int = 0) -> Iterator[MicroBatch]:
        """What every forward from a position of the clock on is made of."""
        recipe = self.recipe
        steps = self.order.steps(samples_seen, self.total_samples, recipe.data.batch_size)
        return plan_micro_batches(
            steps,
            self.family,
            seed=recipe.seed,
            size=recipe.data.micro_batch_size,
            timesteps=recipe.train.timesteps,
            world=self.world,
        )

    @cached_property
    def caches(self) -> Caches:
        """What is kept of latents and text."""
        return Caches(self)

    @cached_property
    def encoder(self) -> Encoder:
        """What makes latents and conditioning of batches; ask once the weights are in place."""
        return self.caches.encoder()

    def reader(self, *, stored: bool = False) -> BatchReader:
        """What turns those into tensors; with `stored`, through the caches, for `encoder`."""
        return BatchReader(
            self.rows,
            seed=self.recipe.seed,
            latent_shape=(self.family.latent_channels, self.family.vae_scale_factor),
            crops=self.recipe.data.crops,
            masks=self.recipe.mask.build(),
            noise=self.recipe.noise,
            stored=self.caches.reader() if stored else None,
        )

    def loss(self) -> Loss:
        """The recipe's loss."""
        loss: Loss = self.recipe.loss.build()
        return loss if self.recipe.mask.normalise else over_all_latents(loss)

    def weighting(self) -> Weighting:
        """The recipe's weighting; one without a rule for this model is refused here."""
        require = getattr(self.recipe.weighting, "require", None)
        if require is not None:
            require(self.family.prediction_type)
        weighting: Weighting = self.recipe.weighting.build()
        weighting(torch.ones(1), self.family.prediction_type)
        return weighting

    def schedule(self) -> Schedule:
        """The recipe's schedule over the whole run."""
        return self._schedule

    @cached_property
    def _schedule(self) -> Schedule:
        """Built once: some simulate the whole run before they agree to it."""
        return self.recipe.schedule.build(self.schedule_samples, self.recipe.data.batch_size)

    @property
    def warmup_samples(self) -> int:
        """Samples over which the rate only rises; 0: none."""
        return int(getattr(self.recipe.schedule, "warmup_samples", 0))

    @cached_property
    def worst_step_ratio(self) -> tuple[float, int]:
        """Largest change of the rate between two steps after the warm-up, and its clock."""
        batch = self.recipe.data.batch_size
        return worst_step_ratio(self.schedule(), self.warmup_samples, self.schedule_samples, batch)

    @cached_property
    def phases(self) -> PhasePlan | None:
        """When which parts train; None: all of them throughout."""
        train = self.recipe.train
        return plan_phases(
            train.phases,
            self.plan,
            repeats=train.repeat_phases,
            total_samples=self.total_samples,
            planned_samples=self.schedule_samples,
            batch_size=self.recipe.data.batch_size,
        )

    def optimizer(self) -> torch.optim.Optimizer:
        """A fresh optimizer of what trains."""
        config = self.recipe.optimizer
        groups = self.plan.optimizer_groups(with_paths=getattr(config, "wants_paths", False))
        return config.build(groups)

    def conditions(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued."""
        recipe = self.recipe.resolved()
        del recipe["prompt"]  # only the policy that results from it counts
        if self.recipe.noise.is_plain:
            del recipe["noise"]
        if self.prior is None:
            del recipe["prior"]
        else:
            recipe["prior"] |= {"path": None, "data_fingerprint": self.prior.data.fingerprint}
        if self.boxes is None:
            del recipe["mask"]
        else:
            recipe["boxes_fingerprint"] = self.boxes.fingerprint
        return {
            **recipe,
            "prompt": self.data.policy.model_dump(mode="json", by_alias=True),
            "data_fingerprint": self.data.fingerprint,
            "model_fingerprint": digest("model", *sorted(self.start_hashes.items())),
        }


def open_setup(recipe: TrainRecipe, world: World = ALONE) -> Setup:
    """Open everything a recipe names and apply its freezing rules.

    Raises:
        UserError: anything that cannot be used, said before any training.
    """
    require = getattr(recipe.optimizer, "require", None)
    if require is not None:
        require()
    recipe.tracking.require()
    require_agreement(recipe, os.environ)
    device = pick_device(recipe.precision.device, world)
    require_compiler(recipe.compile, device)
    engine = recipe.distributed.build(world)
    masks = recipe.mask.build()
    data = open_data(recipe.data, recipe.prompt, with_boxes=masks is not None)
    for note in data.notes:
        talk.print(f"data: {note}", markup=False, soft_wrap=True)
    talk.print(
        f"prompt policy: {policy_words(data.policy)}; {data.policy_origin}",
        markup=False,
        soft_wrap=True,
    )
    most = getattr(recipe.model, "max_chunks", data.policy.max_chunks)
    if data.policy.max_chunks > most:
        warn(
            f"prompts are fitted to {data.policy.max_chunks} chunks (prompt.max_chunks), and the "
            f"model keeps {most} of them (model.max_chunks): what lies beyond is cut off"
        )
    family, adapter, hashes, plan = open_model(recipe, device)
    buckets = bucket_sizes(recipe, family)
    train = assign(data.train, buckets, recipe.data.max_upscale)
    require_enough(train, "train", len(data.train))
    train = limited(train, data.train.ids, recipe.data.limit, recipe.seed)
    without_text = wordless(data, train.kept)
    if without_text is not None:
        warn(without_text)
    validation = None
    if data.validation is not None:
        validation = assign(data.validation, buckets, recipe.data.max_upscale)
        require_enough(validation, "validation", len(data.validation))
    boxes = take_census(masks, data.train, train.kept.tolist()) if masks else None
    prior = None
    if recipe.prior is not None:
        upscale = recipe.data.max_upscale
        prior = open_prior(
            recipe.prior, recipe.data, data.validation, lambda rows: assign(rows, buckets, upscale)
        )
    setup = Setup(
        *(recipe, device, data, family, adapter, plan, hashes, train, validation, boxes, prior),
        engine,
    )
    setup.weighting()
    setup.schedule()
    setup.plan = engine.prepare(family, plan)
    _ = setup.phases
    if setup.caches.why_no_text:
        talk.print(f"no text is cached: {setup.caches.why_no_text}", markup=False, soft_wrap=True)
    return setup


def open_model(
    recipe: TrainRecipe, device: torch.device
) -> tuple[Family, Any, dict[str, str], FreezePlan]:
    """Load the networks, move them, attach the adapter and freeze the rest."""
    model = recipe.model
    family = model.build(
        model.path,
        precision=recipe.precision.mixed,
        device=str(device),
        revision=model.revision,
    )
    narrow(family, recipe.precision)
    hashes = tensor_hashes(family.named_parameters())
    adapter = recipe.adapter.build()
    train = recipe.train
    plan = build_plan(
        family,
        train.rules,
        adapter,
        lr=train.lr,
        preset=train.preset,
        lr_factor=recipe.lr_factor,
    )
    plan.check_expected(train.expect_percent)
    compile_blocks(family, recipe.compile)
    return family, adapter, hashes, split_by_part(plan) if train.phases else plan


def bucket_sizes(recipe: TrainRecipe, family: Family) -> tuple[Bucket, ...]:
    """The bucket sizes of a run; tiny models have smaller multiples."""
    data = recipe.data
    return bucket_list(
        data.resolution_px or family.default_resolution_px,
        family.bucket_multiple_px,
        data.min_aspect,
        data.max_aspect if data.max_aspect is not None else float("inf"),
    )


def pick_device(asked: str, world: World = ALONE) -> torch.device:
    """The device that the recipe asks for, or the best there is; never a silent fallback.

    Raises:
        UserError: it asks for one that torch does not see, or that several processes would share.
    """
    if world.size > 1:
        return world.device(asked)
    if asked == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        if gpu_without_torch():
            warn("there is an NVIDIA GPU, but this torch cannot use it; training on the CPU")
        return torch.device("cpu")
    try:
        device = torch.device(asked)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"precision.device = {asked!r} cannot be used: {reason}",
            "Use auto, cuda, cuda:N, mps or cpu.",
        ) from None
    return device


def gpu_without_torch() -> bool:
    """Whether an NVIDIA driver is there that torch does not see."""
    import shutil

    return shutil.which("nvidia-smi") is not None and not torch.cuda.is_available()
