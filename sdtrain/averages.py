"""Weights that are used but not trained: averages over the run, put in place for a while.

While they are in place the model may be evaluated, drawn with and saved; never trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sdprep.recipe import Section
from sdtrain.engine import laid_out_like

Parameters = Mapping[str, nn.Parameter]
"""Trained parameters by canonical path."""


class EmaSection(Section):
    """A running average of the trained weights, evaluated beside them."""

    half_life_samples: int = Field(
        gt=0, description="Samples after which what a step did to the average has halved."
    )
    device: Literal["same", "cpu"] = Field(
        "same", description='Where the average lives: beside the weights, or "cpu" to spare a GPU.'
    )
    hand_over: bool = Field(
        False, description="Whether model/, at the end, is the average and not the last weights."
    )


class Ema:
    """An exponential moving average in float32, a function of the weights and samples seen.

    Args:
        section: half-life and place.
        trained: what is averaged; the average starts at their values.
    """

    def __init__(self, section: EmaSection, trained: Parameters) -> None:
        self.section = section
        self.values: dict[str, Tensor] = {}
        self.restart(trained)

    def restart(self, trained: Parameters, saved: Mapping[str, Tensor] | None = None) -> None:
        """Go on from a checkpoint's averages; what it does not know starts at the weights."""
        for path, parameter in trained.items():
            value = laid_out_like((saved or {}).get(path, parameter), parameter)
            device = "cpu" if self.section.device == "cpu" else parameter.device
            self.values[path] = value.detach().to(device, torch.float32, copy=True)

    def update(self, trained: Parameters, num_samples: int) -> None:
        """Take in the weights after a step of so many samples."""
        weight = 1 - 0.5 ** (num_samples / self.section.half_life_samples)
        for path, value in self.values.items():
            value.lerp_(trained[path].detach().to(value.device, torch.float32), weight)

    @contextmanager
    def in_place(self, trained: Parameters) -> Iterator[None]:
        """The averages in the model; the weights come back bit for bit."""
        with restored(trained):
            put(self.values, trained)
            yield


def put(values: Mapping[str, Tensor], trained: Parameters) -> None:
    """Copy values into parameters."""
    with torch.no_grad():
        for path, value in values.items():
            trained[path].copy_(laid_out_like(value, trained[path]))


@contextmanager
def restored(trained: Parameters) -> Iterator[None]:
    """Whatever is done to the weights meanwhile, they come back bit for bit."""
    before = {path: parameter.detach().clone() for path, parameter in trained.items()}
    try:
        yield
    finally:
        put(before, trained)


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer trains at one point and means another to be used."""
    return all("train_mode" in group for group in optimizer.param_groups)


@contextmanager
def weights_to_use(optimizer: torch.optim.Optimizer, trained: Parameters) -> Iterator[None]:
    """The weights that an optimizer means to be used, in the model.

    A schedule-free one computes them from where it trains. Computing that point back would round,
    so it is kept aside instead: an evaluation must not change the training by a bit.
    """
    if not is_schedule_free(optimizer):
        yield
        return
    switch: Any = optimizer
    with restored(trained):
        switch.eval()
        try:
            yield
        finally:
            for group in optimizer.param_groups:
                group["train_mode"] = True
