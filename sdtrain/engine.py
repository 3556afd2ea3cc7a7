"""How several processes share one optimizer step; a process alone has nothing to share.

Whatever the engine, a step's gradient is the sum over all its samples divided by their number, as
if one process had computed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from sdprep.recipe import Section
from sdtrain.world import World

if TYPE_CHECKING:
    from sdtrain.family import Family
    from sdtrain.freeze_plan import FreezePlan
    from sdtrain.setup import Setup

PIECE_BYTES = 64 * 2**20
"""Gradients travel in pieces of about this size: few messages, little extra memory."""


class DistributedSection(Section):
    """How several processes train one model; without effect on one process, and on the result."""

    engine: Literal["ddp", "fsdp2", "deepspeed"] = Field(
        "ddp",
        description="ddp: every GPU holds the whole model. fsdp2: weights, gradients and optimizer "
        "state are spread over the GPUs. deepspeed: what zero_stage says is.",
    )
    zero_stage: Literal[1, 2] = Field(
        2, description="Of engine deepspeed: 1 spreads optimizer state, 2 also gradients."
    )

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _weights_stay_whole(cls, value: Any) -> Any:
        if value == 3:
            raise ValueError(
                "1 or 2: at stage 3 DeepSpeed leaves empty tensors between its own forwards, which "
                'evaluations and pictures are none of; engine = "fsdp2" spreads weights, too'
            )
        return value

    def require_fitting(self, recipe: Any) -> None:
        """Refuse what does not work on a model that is spread over the processes.

        Raises:
            ValueError: names both keys.
        """
        if self.engine == "ddp":
            return
        optimizer, precision, ema = recipe.optimizer, recipe.precision, recipe.ema
        others = "adamw, sgd and schedule_free" if self.engine == "fsdp2" else "adamw and sgd"
        refused = {
            f"optimizer {optimizer.type} ({others} can)": self.engine
            not in getattr(optimizer, "works_sharded", ()),
            "precision.mixed fp16": precision.mixed == "fp16",
            "precision.parameters bf16": precision.parameters == "bf16",
        }
        if self.engine == "fsdp2":
            refused["ema.device cpu"] = ema is not None and ema.device == "cpu"
        else:
            refused["train.phases"] = bool(recipe.train.phases)
            refused["compile.mode blocks"] = recipe.compile.mode != "off"
        for what, is_asked in refused.items():
            if is_asked:
                raise ValueError(f"distributed.engine {self.engine} cannot go with {what}; ddp can")

    def build(self, world: World) -> Engine:
        """The engine of a run.

        Raises:
            UserError: it cannot run here.
        """
        if self.engine == "fsdp2" and world.size > 1:
            from sdtrain.sharding import Sharded

            return Sharded(world)
        if self.engine == "deepspeed" and world.size > 1:
            from sdtrain.zero import Zero, require

            require()
            return Zero(world, self.zero_stage)
        return Engine(world)


@dataclass(frozen=True)
class Engine:
    """Every process holds the whole model; gradients are added up before the update.

    Args:
        world: the processes.

    `has_spread_state` says whether a checkpoint needs what the other processes hold.
    """

    world: World
    has_spread_state = False

    @property
    def is_sharded(self) -> bool:
        """Whether weights are spread over the processes, so that forwards need all of them."""
        return False

    @property
    def loss_factor(self) -> float:
        """What a loss is multiplied by so that gradients come out as the sum over processes."""
        return 1.0

    def prepare(self, family: Family, plan: FreezePlan) -> FreezePlan:
        """Lay the model out over the processes; returns the plan with the parameters it now has."""
        return plan

    def own(self, optimizer: torch.optim.Optimizer, setup: Setup) -> Any:
        """What steps the prepared model; by default the optimizer itself."""
        return optimizer

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        """The result of a forward that a backward will follow."""
        return work()

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """The backward of a forward; `is_last` of a step."""
        loss.backward()

    def collect(self, parameters: Iterable[nn.Parameter]) -> None:
        """After the last backward of a step: make every gradient the sum over all processes.

        A parameter that has a gradient on no process keeps none, as it does on one process.
        """
        if self.world.size == 1:
            return
        owned = list(parameters)
        has = self.world.add_up(torch.tensor([float(p.grad is not None) for p in owned]))
        moving = [p for p, count in zip(owned, has.tolist(), strict=True) if count]
        for parameter in moving:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for piece in _pieces([p.grad for p in moving if p.grad is not None]):
            self._add_up(piece)

    def _add_up(self, gradients: Sequence[Tensor]) -> None:
        flat = self.world.add_up(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> float:
        """Scale all gradients down to a norm together; returns the norm they had."""
        return float(whole(torch.nn.utils.clip_grad_norm_(parameters, most)))

    def take(self, tensor: Tensor) -> Tensor:
        """A tensor for a checkpoint: whole, on the CPU. Only the main process gets its values."""
        return tensor.detach().cpu().contiguous()


def _pieces(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one type in turn, in an order that is the same everywhere."""
    piece: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if piece and (size >= PIECE_BYTES or gradient.dtype != piece[0].dtype):
            yield piece
            piece, size = [], 0
        piece.append(gradient)
        size += gradient.numel() * gradient.element_size()
    if piece:
        yield piece


def whole(tensor: Any) -> Tensor:
    """A tensor as it is, or put together from all processes, which must all ask for it."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def is_spread(tensor: Any) -> bool:
    """Whether each process holds a piece of a tensor only."""
    return hasattr(tensor, "full_tensor")


def laid_out_like(tensor: Tensor, place: Any) -> Tensor:
    """A whole tensor, cut as `place` is if that is spread over the processes."""
    if not is_spread(place) or is_spread(tensor) or tensor.shape != place.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    device = place.device
    return distribute_tensor(tensor.to(device), place.device_mesh, place.placements)
