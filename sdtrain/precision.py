"""Number formats: what the networks compute in, and how bfloat16 weights take in small steps.

A bfloat16 keeps eight bits of a number. Rounded to the nearest one, a step smaller than the weight
times 2^-9 is lost, and so are all that follow it. Two ways out: round up or down by chance, so that
steps arrive on average; or keep what rounding left over for the next step (Kahan). Either way the
optimizer sees float32: the weights of a few tensors at a time are widened for its step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from sdprep.recipe import Section
from sdprep.seeding import integer
from sdtrain.family import Family

LOST_BITS = 16
"""Bits of a float32 that a bfloat16 has no room for."""

MOST_WIDENED = 2**26
"""Numbers that are float32 at the same time during a step: 768 MiB with gradients and copies."""

Rule = Literal["stochastic", "kahan"]


class PrecisionSection(Section):
    """In which number formats the networks run and the weights are kept."""

    mixed: Literal["no", "fp16", "bf16"] = Field("bf16", description="Autocast format.")
    parameters: Literal["fp32", "bf16"] = Field(
        "fp32", description="Format of the weights themselves; bf16 halves them and gradients."
    )
    rounding: Rule | None = Field(
        None, description="How bf16 weights take in steps; default: stochastic."
    )
    device: str = Field(
        "auto", description="cuda, cuda:1, mps or cpu; auto takes the best and says which."
    )
    deterministic: bool = Field(
        False, description="The same bits again on the same GPU; a CPU always gives them."
    )

    @field_validator("parameters", mode="before")
    @classmethod
    def _not_fp16(cls, value: Any) -> Any:
        if value == "fp16":
            raise ValueError(
                "fp16 weights lose small steps and cannot be scaled; take fp32 or bf16"
            )
        return value

    @field_validator("rounding", mode="before")
    @classmethod
    def _not_to_nearest(cls, value: Any) -> Any:
        if value == "nearest":
            raise ValueError(
                "bf16 weights rounded to nearest lose every step below w * 2^-9; "
                "take stochastic or kahan"
            )
        return value

    @model_validator(mode="after")
    def _fits(self) -> PrecisionSection:
        if self.parameters == "bf16" and self.mixed != "bf16":
            raise ValueError('parameters = "bf16" needs mixed = "bf16"')
        if self.parameters == "fp32" and self.rounding is not None:
            raise ValueError('rounding is for parameters = "bf16"')
        return self

    @property
    def rule(self) -> Rule | None:
        """How weights are rounded; None where they are not."""
        return None if self.parameters == "fp32" else self.rounding or "stochastic"


def narrow(family: Family, section: PrecisionSection) -> None:
    """Bring the weights of all that may train into the recipe's format; the VAE stays float32."""
    if section.parameters == "bf16":
        for part in family.trainable_parts:
            for parameter in family.parts[part].parameters():
                parameter.data = parameter.data.to(torch.bfloat16)


def round_by_chance(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16, up as often as the number is near the upper one.

    Args:
        values: float32; what is no finite number stays what it is.
        generator: on the same device.

    Returns:
        bfloat16, whose mean over draws is `values`.
    """
    bits = values.contiguous().view(torch.int32)
    drawn = torch.randint(
        *(0, 1 << LOST_BITS, bits.shape),
        generator=generator,
        device=bits.device,
        dtype=torch.int32,
    )
    cut = ((bits + drawn) & -(1 << LOST_BITS)).view(torch.float32)
    return torch.where(values.isfinite(), cut, values).to(torch.bfloat16)


class Rounding:
    """Steps an optimizer over bfloat16 weights.

    Args:
        rule: what happens to what a bfloat16 has no room for.
        seed: of the recipe; with clock and path it keys every draw.
        trained: parameters by canonical path.
    """

    def __init__(self, rule: Rule, seed: int, trained: Mapping[str, nn.Parameter]) -> None:
        self.rule, self.seed, self.trained = rule, seed, trained
        self.left_over: dict[str, Tensor] = {}
        if rule == "kahan":
            self.left_over = {path: torch.zeros_like(p.detach()) for path, p in trained.items()}

    def restore(self, left_over: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's remainders; those that it does not know stay 0."""
        for path in self.left_over.keys() & left_over.keys():
            self.left_over[path].copy_(left_over[path])

    def step(self, optimizer: torch.optim.Optimizer, samples_seen: int) -> None:
        """One step of everything that has a gradient; gradients are used up."""
        gradients = {path: p.grad for path, p in self.trained.items() if p.grad is not None}
        for path in gradients:
            self.trained[path].grad = None
        for some in _portions(gradients):
            narrow_weights = {path: self.trained[path].data for path in some}
            for path in some:
                parameter = self.trained[path]
                parameter.data = self._widened(path)
                parameter.grad = gradients.pop(path).float()
            optimizer.step()
            for path, weights in narrow_weights.items():
                parameter = self.trained[path]
                parameter.grad = None
                weights.copy_(self._rounded(path, parameter.data, samples_seen))
                parameter.data = weights

    def _widened(self, path: str) -> Tensor:
        wide = self.trained[path].data.float()
        return wide + self.left_over[path].float() if path in self.left_over else wide

    def _rounded(self, path: str, wide: Tensor, samples_seen: int) -> Tensor:
        if self.rule == "kahan":
            nearest = wide.to(torch.bfloat16)
            self.left_over[path].copy_(wide - nearest.float())
            return nearest
        generator = torch.Generator(wide.device)
        generator.manual_seed(integer(self.seed, "rounding", samples_seen, path))
        return round_by_chance(wide, generator)


def _portions(gradients: Mapping[str, Tensor]) -> Iterator[Sequence[str]]:
    """Paths in order, as many at a time as may be widened together; at least one."""
    portion: list[str] = []
    count = 0
    for path, gradient in list(gradients.items()):
        if portion and count + gradient.numel() > MOST_WIDENED:
            yield portion
            portion, count = [], 0
        portion.append(path)
        count += gradient.numel()
    if portion:
        yield portion


@contextmanager
def seen_as_float32(trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """For loading optimizer state: torch would cut it down to the format of the weights."""
    before = {path: parameter.data for path, parameter in trained.items()}
    for parameter in trained.values():
        parameter.data = torch.empty(0, dtype=torch.float32, device=parameter.device)
    try:
        yield
    finally:
        for path, weights in before.items():
            trained[path].data = weights
