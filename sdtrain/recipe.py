"""The training recipe: TOML read into one frozen model, which documents every option."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, Union

from pydantic import Field, create_model, field_validator, model_validator

from sdprep import plugins
from sdprep.prompt_policy import PromptPolicy
from sdprep.recipe import Section, load_recipe
from sdtrain import samplers
from sdtrain.averages import EmaSection
from sdtrain.cache.section import CacheSection
from sdtrain.compiling import CompileSection
from sdtrain.course import StopSection
from sdtrain.data_section import DataSection
from sdtrain.engine import DistributedSection
from sdtrain.forgetting import ForgettingSection
from sdtrain.loss_masks import ALL_LABELS, LossMasks
from sdtrain.noise_options import NoiseSection
from sdtrain.phases import PhaseSection
from sdtrain.precision import PrecisionSection
from sdtrain.prior import PriorSection
from sdtrain.tracking import TrackingSection

Prob = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(gt=0)]
MOST_LR = 1e6
"""Of a rate; optimizers compute in float32, where far larger numbers end in an overflow."""
Rate = Annotated[float, Field(ge=0.0, le=MOST_LR, allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)]


class MaskSection(Section):
    """Parts of the pictures that count less in the training loss, such as watermarks."""

    boxes: tuple[str, ...] = Field(
        (), description='Labels whose boxes are masked, as ["watermark"]; ["*"]: all; empty: none.'
    )
    weight: Prob = Field(
        0.0, description="What counts inside a box: 0 nothing, 1 as much as outside."
    )
    normalise: bool = Field(
        True, description="Mean over what counts; false: over all, as sd-scripts (less is learnt)."
    )

    @field_validator("boxes", mode="after")
    @classmethod
    def _labels_make_sense(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value) or "" in value:
            raise ValueError("each label needs a name and is named once")
        if ALL_LABELS in value and len(value) > 1:
            raise ValueError('"*" stands for all labels; leave out the others')
        return value

    @model_validator(mode="after")
    def _masks_something(self) -> MaskSection:
        if not self.boxes and (self.weight or not self.normalise):
            raise ValueError("weight and normalise do nothing without boxes; name their labels")
        return self

    def build(self) -> LossMasks | None:
        """The masks; None where there are none."""
        return LossMasks(self.boxes, self.weight, self.normalise) if self.boxes else None


class Rule(Section):
    """What happens to the parameters whose canonical path a glob matches whole."""

    match: str = Field(min_length=1, description="Glob: * within one name, ** across dots.")
    lr: Rate | None = Field(None, description="Learning rate; 0 means frozen.")
    freeze: bool = Field(False, description="Freeze what matches.")

    @model_validator(mode="after")
    def _says_one_thing(self) -> Rule:
        if self.freeze == (self.lr is not None):
            raise ValueError("needs either lr = NUMBER or freeze = true")
        return self


class TrainSection(Section):
    """How long, and which parameters at which rate."""

    samples: int | None = Field(None, gt=0, description="Images to consume in all.")
    epochs: float | None = Field(
        None, gt=0.0, allow_inf_nan=False, description="The same in passes over the data."
    )
    schedule_samples: int | None = Field(
        None, gt=0, description="Length that the schedule is made for; default: the run's own."
    )
    lr: Rate | None = Field(
        None, description='Shorthand for a first rule { match = "unet.**", lr = … }.'
    )
    lr_scaling: Literal["none", "sqrt"] = Field(
        "none", description="Multiply every rate by the root of data.batch_size, or take it as is."
    )
    preset: str | None = Field(None, description="Shipped rule set, applied before `rules`.")
    rules: tuple[Rule, ...] = Field((), description="In order; the last that matches wins.")
    phases: tuple[PhaseSection, ...] = Field(
        (), description="In order; each says for how long which parts train. None: all at once."
    )
    repeat_phases: bool = Field(False, description="Begin again with the first after the last.")
    expect_percent: dict[str, Percent] = Field(
        {}, description="Guard: share of each part that must train, in percent ±0.01."
    )
    timesteps: Literal["stratified", "iid"] = Field(
        "stratified", description="Noise levels of one step: spread evenly, or drawn one by one."
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.samples is None) == (self.epochs is None):
            raise ValueError("needs either samples or epochs, and not both")
        if self.lr is None and not self.rules:
            raise ValueError("nothing would train; give lr, or rules with a rate")
        if self.schedule_samples is not None and self.schedule_samples < (self.samples or 0):
            raise ValueError(
                f"schedule_samples {self.schedule_samples:,} must not be below "
                f"samples {self.samples:,}"
            )
        if self.repeat_phases and not self.phases:
            raise ValueError("repeat_phases needs [[train.phases]]")
        return self


class ValidationSection(Section):
    """StableEval: how well the model does on fixed images, noise and noise levels."""

    every_samples: int | None = Field(
        None, gt=0, description="Samples between two evaluations; default: a fortieth of the run."
    )
    images: int = Field(64, ge=0, description="Images of the validation split; 0: none.")
    timesteps_per_image: int | str = Field(
        "auto", description='Noise levels per image; "auto": 4, or 16 with fewer than 16 images.'
    )
    train_probe_images: int = Field(
        64, ge=0, description="Training images evaluated in the same way; 0: none."
    )
    probe: str | None = Field(None, description="Probe file of another run, to compare with it.")
    seed: int | None = Field(None, description="Seed of the evaluation; default: the recipe's.")
    stop: StopSection | None = Field(None, description="Early stopping; default: none.")
    forgetting: ForgettingSection | None = Field(
        None, description="Images from outside the training set; default: none."
    )

    @field_validator("timesteps_per_image", mode="before")
    @classmethod
    def _a_number_or_auto(cls, value: Any) -> Any:
        is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not is_number and value != "auto":
            raise ValueError('must be "auto" or a whole number > 0')
        return value


class SamplingSection(Section):
    """Pictures drawn while training."""

    every_samples: int | None = Field(
        None, gt=0, description="Samples between two sets; default: at the start and the end."
    )
    prompts: tuple[str, ...] = Field((), description="One picture each; empty: no pictures.")
    num_inference_steps: int = Field(20, gt=0, description="Steps of the sampler.")
    guidance_scale: float = Field(5.0, ge=0.0, description="Classifier-free guidance.")
    seeds: int = Field(
        1, ge=1, le=64, description="Pictures of each prompt; from 2 on their spread is measured."
    )
    sampler: samplers.Name | None = Field(
        None, description="How pictures are drawn; default: as the model came."
    )


class CheckpointSection(Section):
    """What is kept so that the run can go on."""

    every_samples: int | None = Field(
        None, gt=0, description="Samples between two checkpoints; default: a tenth of the run."
    )
    keep: int = Field(3, gt=0, description="How many of the newest checkpoints stay.")
    best: bool = Field(
        True, description="Also save at each best evaluation so far, and keep the best of all."
    )


@lru_cache
def _family_union() -> Any:
    """`[model]` of every family: the plugin's own options beside `family` and `path`."""
    members = []
    for name, config in plugins.configs("family").items():
        fields: dict[str, Any] = {
            "family": (Literal[name], Field(description="Architecture of the model.")),
            "path": (
                str,
                Field(min_length=1, description="Hub id, diffusers folder or .safetensors."),
            ),
            "revision": (
                str | None,
                Field(None, description="Commit, tag or branch of a Hub id."),
            ),
        }
        members.append(create_model(f"{name}_model", __base__=config, **fields))
    if len(members) == 1:
        return members[0]
    return Annotated[Union[tuple(members)], Field(discriminator="family")]  # noqa: UP007


if TYPE_CHECKING:
    # Built from the folder scan at run time; each has build(), and the family also path.
    ModelSection: TypeAlias = Any
    OptimizerSection: TypeAlias = Any
    ScheduleSection: TypeAlias = Any
    WeightingSection: TypeAlias = Any
    LossSection: TypeAlias = Any
    AdapterSection: TypeAlias = Any
else:
    ModelSection = _family_union()
    OptimizerSection = plugins.union("optimizer")
    ScheduleSection = plugins.union("schedule")
    WeightingSection = plugins.union("weighting")
    LossSection = plugins.union("loss")
    AdapterSection = plugins.union("adapter")


def _default(kind: str, name: str) -> Any:
    return Field(default_factory=lambda: plugins.config_for(kind, name)())


class TrainRecipe(Section):
    """One training run."""

    seed: int = Field(0, description="Every draw of the run is keyed by it.")
    output: Path = Field(description="Run folder.")
    model: ModelSection
    data: DataSection
    mask: MaskSection = MaskSection()
    noise: NoiseSection = NoiseSection()
    prior: PriorSection | None = None
    prompt: PromptPolicy = Field(
        PromptPolicy(), description="Overrides of the prompt policy that came with the data set."
    )
    train: TrainSection
    optimizer: OptimizerSection = _default("optimizer", "adamw")
    schedule: ScheduleSection = _default("schedule", "constant")
    weighting: WeightingSection = _default("weighting", "none")
    loss: LossSection = _default("loss", "mse")
    adapter: AdapterSection = _default("adapter", "full")
    ema: EmaSection | None = None
    precision: PrecisionSection = PrecisionSection()
    compile: CompileSection = CompileSection()
    cache: CacheSection = CacheSection()
    validation: ValidationSection = ValidationSection()
    sampling: SamplingSection = SamplingSection()
    tracking: TrackingSection = TrackingSection()
    checkpoint: CheckpointSection = CheckpointSection()
    distributed: DistributedSection = DistributedSection()

    @field_validator("output", mode="after")
    @classmethod
    def _is_named(cls, value: Path) -> Path:
        if not value.name:
            raise ValueError("must name a folder of its own, such as runs/first")
        return value

    @model_validator(mode="after")
    def _latents_can_be_cached(self) -> TrainRecipe:
        if self.cache.latents and self.data.crops.most_crops is None:
            raise ValueError(
                'cache.latents = true, but data.crop = "random" draws a new crop at every visit, '
                "each to be encoded anew; set data.cached_crops (such as 4), or data.crop = "
                '"centre"'
            )
        return self

    @model_validator(mode="after")
    def _schedule_suits_optimizer(self) -> TrainRecipe:
        optimizer, schedule = self.optimizer, self.schedule.type
        only = getattr(optimizer, "only_schedules", (schedule,))
        if schedule in getattr(optimizer, "refuses_schedules", ()) or schedule not in only:
            raise ValueError(
                f"optimizer {optimizer.type} cannot go with schedule {schedule}; "
                "take another of the two"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_suits_the_rest(self) -> TrainRecipe:
        asked = {
            "ema": self.ema is not None,
            "lr_scaling": self.train.lr_scaling != "none",
            "phases": bool(self.train.phases),
            "bf16 parameters": self.precision.parameters == "bf16",
        }
        for feature, why in getattr(self.optimizer, "refuses", {}).items():
            if asked[feature]:
                raise ValueError(f"optimizer {self.optimizer.type} takes no {feature}: {why}")
        if asked["bf16 parameters"] and self.adapter.type != "full":
            raise ValueError('precision.parameters = "bf16" is for adapter full only')
        return self

    @model_validator(mode="after")
    def _engine_suits_the_rest(self) -> TrainRecipe:
        self.distributed.require_fitting(self)
        return self

    @property
    def lr_factor(self) -> float:
        """What every rate of the rules is multiplied by."""
        is_scaled = self.train.lr_scaling == "sqrt"
        return math.sqrt(self.data.batch_size) if is_scaled else 1.0

    def resolved(self) -> dict[str, Any]:
        """Every option with its value, as JSON and TOML can hold it.

        Of `[prompt]` only what was set: the rest is the data set's to say.
        """
        prompt = self.prompt.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return {**self.model_dump(mode="json", by_alias=True), "prompt": prompt}


def load_train_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TrainRecipe:
    """Read and check a training recipe; `overrides` are `--set` texts.

    Raises:
        RecipeError: every mistake at once.
    """
    return load_recipe(path, TrainRecipe, overrides)
