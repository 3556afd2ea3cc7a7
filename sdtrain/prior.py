"""`[prior]`: pictures of the class among one's own, so that the model keeps its idea of the class.

The stream of samples takes its slots from two orders. Which one a slot is from depends on the clock
alone: among the first n samples, floor(n times fraction) are of the prior. So any batch size,
restart or number of GPUs sees the same stream. Every sample counts for the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import count
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from sdprep.console import talk
from sdprep.prompt_policy import PromptPolicy
from sdprep.recipe import Section
from sdtrain.data_section import called
from sdtrain.joined_rows import JoinedRows

if TYPE_CHECKING:
    from sdtrain.buckets import Assignment, GlobalOrder, Slot, Step
    from sdtrain.dataset import Rows, TrainingData
    from sdtrain.family import Family
    from sdtrain.recipe import DataSection

PREFIX = "prior/"
"""What ids of prior images begin with, so that their noise and crops are draws of their own."""


class PriorSection(Section):
    """Pictures of the class (prior preservation), drawn among the training samples."""

    path: str = Field(min_length=1, description="Folder, table or Hub id, as data.path.")
    revision: str | None = Field(None, description="Commit, tag or branch of a Hub data set.")
    image_column: str | None = Field(
        None, description="Column with the pictures, when it is not to be guessed."
    )
    caption_column: str | None = Field(
        None, description="Column with the text, when it is not to be guessed."
    )
    caption: str | None = Field(
        None, min_length=1, description="Text of all of them, instead of their own."
    )
    fraction: float = Field(
        0.5, gt=0.0, lt=1.0, description="Share of all samples that are of the prior; 0.5: half."
    )
    weight: float = Field(
        1.0, gt=0.0, allow_inf_nan=False, description="What a prior sample counts in the loss."
    )

    @model_validator(mode="after")
    def _one_text(self) -> PriorSection:
        if self.caption is not None and self.caption_column is not None:
            raise ValueError("caption stands in place of all texts of caption_column; keep one")
        return self

    def data(self, like: DataSection) -> DataSection:
        """The same as a `[data]` section."""
        own = ("path", "revision", "image_column", "caption_column")
        found = {key: getattr(self, key) for key in own}
        return like.model_copy(update={**found, "streaming": False, "stream_keep_gb": None})


@dataclass(frozen=True)
class Prior:
    """An opened prior.

    Args:
        data: its data set; only its train split is used.
        assignment: bucket of every row, or why it is refused.
        section: what the recipe says.
    """

    data: TrainingData
    assignment: Assignment
    section: PriorSection

    @property
    def texts(self) -> Any:
        """The rows as their prompts are rendered."""
        rows, caption = self.data.train, self.section.caption
        return rows if caption is None else OneCaption(rows, caption)

    def order(
        self, train: GlobalOrder, *, num_train: int, seed: int, run_samples: int, family: Family
    ) -> PriorOrder:
        """The stream of training samples with those of the prior among them.

        Args:
            train: the stream without them.
            num_train: rows of the training split, which come first in `WithPrior`.
            seed: the run's seed.
            run_samples: longest run of one bucket and chunk count.
            family: counts the chunks of prompts.
        """
        from sdtrain.buckets import GlobalOrder
        from sdtrain.dataset import renderer

        counts = family.num_chunks, family.num_tokens_cut
        own = GlobalOrder(
            self.data.train.ids,
            self.assignment,
            renderer(self.texts, self.data.policy, seed, *counts),
            seed=seed,
            run_samples=run_samples,
            repeats=self.data.train.repeats,
        )
        return PriorOrder(train, own, self.section, num_train)

    def describe(self) -> dict[str, Any]:
        """What `sdtrain check` says of it."""
        from sdtrain.dataset import policy_words

        return {
            "origin": self.data.origin,
            "policy_words": policy_words(self.data.policy),
            "fingerprint": self.data.fingerprint,
            "rows": len(self.data.train),
            "kept": len(self.assignment.kept),
            "refused": self.assignment.reasons(),
            "fraction": self.section.fraction,
            "weight": self.section.weight,
        }


def open_prior(
    section: PriorSection,
    like: DataSection,
    held_out: Rows | None,
    assign: Callable[[Rows], Assignment],
) -> Prior:
    """Open the prior; what is held out for validation is never trained, here neither.

    Args:
        section: the recipe's.
        like: the recipe's `[data]`.
        held_out: the validation split of the training data.
        assign: gives rows their buckets.

    Raises:
        DataError: it cannot be opened, or too much of it is refused.
    """
    from sdtrain.buckets import require_enough
    from sdtrain.dataset import open_data

    with called("prior"):
        data = open_data(
            section.data(like),
            PromptPolicy(),
            needs_split=False,
            needs_text=section.caption is None,
        )
    for note in data.notes:
        talk.print(f"prior: {note}", markup=False, soft_wrap=True)
    if held_out is not None:
        there = {id_.split("#")[0] for id_ in held_out.ids}
        for row, id_ in enumerate(data.train.ids):
            if id_.split("#")[0] in there:
                data.train.refused[row] = "held_out: the same bytes are in validation"
    assignment = assign(data.train)
    require_enough(assignment, "prior", len(data.train))
    return Prior(data, assignment, section)


class PriorOrder:
    """An endless stream of slots from two orders.

    Args:
        train: the order of the training samples.
        prior: the order of the prior's.
        section: share and weight of the latter.
        num_train: what is added to rows of the prior.
    """

    def __init__(
        self, train: GlobalOrder, prior: GlobalOrder, section: PriorSection, num_train: int
    ) -> None:
        self.train, self.prior, self._num_train = train, prior, num_train
        self._fraction, self._weight = Fraction(str(section.fraction)), section.weight

    @property
    def epoch_samples(self) -> int:
        """Samples until every training row was seen once, those of the prior included."""
        return round(self.train.epoch_samples / (1 - self._fraction))

    def num_prior(self, samples_seen: int) -> int:
        """How many of the first samples are of the prior."""
        return int(samples_seen * self._fraction)

    def slots(self, samples_seen: int = 0) -> Iterator[Slot]:
        """The stream from a position of the clock on; it never ends."""
        before = self.num_prior(samples_seen)
        train, prior = self.train.slots(samples_seen - before), self.prior.slots(before)
        for clock in count(samples_seen):
            if self.num_prior(clock + 1) == self.num_prior(clock):
                yield next(train)
                continue
            slot = next(prior)
            yield replace(
                slot,
                row=self._num_train + slot.row,
                sample_id=PREFIX + slot.sample_id,
                weight=self._weight,
            )

    def steps(self, samples_seen: int, total_samples: int, batch_size: int) -> Iterator[Step]:
        """The steps from `samples_seen` to the end; only the last one may be short."""
        from sdtrain.buckets import Step

        stream = self.slots(samples_seen)
        while samples_seen < total_samples:
            size = min(batch_size, total_samples - samples_seen)
            yield Step(samples_seen, tuple(next(stream) for _ in range(size)))
            samples_seen += size


class WithPrior(JoinedRows):
    """Training rows and, behind them, those of the prior."""

    def boxes(self, rows: Sequence[int]) -> list[list[dict[str, Any]]]:
        """Of training rows; nothing is masked in the prior."""
        found = super().boxes(rows)
        return [own if row < self.num_first else [] for row, own in zip(rows, found, strict=True)]


class OneCaption:
    """Rows whose records all say the same."""

    def __init__(self, rows: Rows, caption: str) -> None:
        self._rows, self._caption = rows, caption

    def records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The id of each row, and the caption."""
        found = self._rows.records(rows)
        return [{"id": record["id"], "caption": self._caption} for record in found]
