"""ZeRO, by DeepSpeed: optimizer state and, at stage 2, gradients spread over the processes.

DeepSpeed lays the parameters of a group out as one long row and gives each process a piece of it,
so only optimizers that treat every number alone can step them. It clips and steps at once. What is
taken out for checkpoints has the shapes and names of one process, so any engine goes on from them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdprep.errors import MissingExtraError, UserError
from sdtrain.engine import Engine
from sdtrain.world import World

if TYPE_CHECKING:
    from sdtrain.setup import Setup

BUCKET_NUMBERS = 2**26
"""Gradients and weights travel in pieces of so many numbers; twice 256 MiB of memory."""

Values = Mapping[str, Any]


@dataclass
class Joined:
    """What DeepSpeed made of a run; there from the moment the optimizer is."""

    live: Any = None
    optimizer: Any = None


@dataclass(frozen=True)
class Zero(Engine):
    """See `Engine`; every process must run equally many forwards and backwards.

    Args:
        world: the processes.
        stage: 1 spreads optimizer state, 2 also gradients.
        joined: filled by `own`.
    """

    stage: int = 2
    joined: Joined = field(default_factory=Joined)
    has_spread_state = True

    @property
    def loss_factor(self) -> float:
        """DeepSpeed averages gradients over the processes."""
        return float(self.world.size)

    def own(self, optimizer: torch.optim.Optimizer, setup: Setup) -> Any:
        """Hand model and optimizer over to DeepSpeed; see `ZeroOptimizer`."""
        groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
        networks = {
            part: network
            for part, network in setup.family.parts.items()
            if any(parameter.requires_grad for parameter in network.parameters())
        }
        deepspeed = imported(setup.device)
        modes = [(module, module.training) for n in networks.values() for module in n.modules()]
        with _quiet(self.world):
            self.joined.live, *_ = deepspeed.initialize(
                model=Together(networks),
                optimizer=optimizer,
                config=options(self.stage, setup.recipe.optimizer.max_grad_norm),
                dist_init_required=False,
            )
        for module, is_training in modes:
            module.training = is_training
        names = {id(p): path for path, p in setup.plan.trained().items()}
        self.joined.optimizer = ZeroOptimizer(groups, self.joined.live, self.world, names)
        return self.joined.optimizer

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        """See `Engine`; through DeepSpeed, which prepares for the backward."""
        result: Tensor = self.joined.live(work)
        return result

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """See `Engine`; DeepSpeed adds gradients up as they come, or after the last."""
        self.joined.live.set_gradient_accumulation_boundary(is_last)
        self.joined.live.backward(loss)

    def collect(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing is left to do: the backwards have added up the gradients."""

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> float:
        """See `Engine`; the update is part of it, unless the gradient is no number."""
        norm: float = self.joined.optimizer.clip_and_step()
        return norm

    def take(self, tensor: Tensor) -> Tensor:
        """See `Engine`; a copy, because weights lie side by side in one long row."""
        if not self.world.is_main:
            return torch.empty(0)
        return tensor.detach().to("cpu", copy=True).contiguous()


class Together(nn.Module):
    """The networks in which something trains, as the one module that DeepSpeed wants."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        """Whatever is to be computed with them."""
        return work()


class ZeroOptimizer:
    """An optimizer over whole parameters, as the rest of the program sees it.

    Args:
        groups: over the model's parameters.
        live: DeepSpeed's engine.
        world: the processes.
        names: `id(parameter)` to path, of everything in the groups.
    """

    def __init__(
        self, groups: list[dict[str, Any]], live: Any, world: World, names: Mapping[int, str]
    ) -> None:
        self.param_groups, self._live, self._world, self._names = groups, live, world, names
        self._rows: Any = live.optimizer.optimizer  # steps this process's piece of each row
        self._reached: set[int] = set()
        for group in groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, parameter: Tensor) -> None:
        self._reached.add(id(parameter))

    def _require_gradients(self) -> None:
        """DeepSpeed would decay what has none, where one process leaves it alone."""
        missing = [path for key, path in self._names.items() if key not in self._reached]
        if missing:
            raise UserError(
                f"{len(missing)} parameters got no gradient in this step: {', '.join(missing[:5])}",
                'Freeze them by a rule, or use distributed.engine = "ddp".',
            )
        self._reached.clear()

    def clip_and_step(self) -> float:
        """Both at once, at the rates of the groups; returns the norm before clipping.

        Where that is no number, nothing is stepped.

        Raises:
            UserError: a parameter got no gradient.
        """
        self._require_gradients()
        for group, row in zip(self.param_groups, self._rows.param_groups, strict=True):
            row["lr"] = group["lr"]
        self._live.step()
        return float(self._live.get_global_grad_norm())

    def step(self) -> None:
        """Nothing is left to do after `clip_and_step`."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing is left to do: DeepSpeed has let go of the gradients."""

    @property
    def state(self) -> Whole:
        """State by parameter, put together one at a time."""
        return Whole(self._entries)

    def state_dict(self) -> dict[str, Any]:
        """Groups alone; `state` has the rest."""
        start, groups = 0, []
        for group in self.param_groups:
            count = len(group["params"])
            groups.append({**group, "params": list(range(start, start + count))})
            start += count
        return {"state": {}, "param_groups": groups}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over whole state, by position; call it once the weights are in place.

        Raises:
            UserError: parameters of one group have been stepped unequally often.
        """
        self._live.optimizer.refresh_fp32_params()
        start = 0
        for group, row in zip(self.param_groups, self._rows.param_groups, strict=True):
            places = list(range(start, start + len(group["params"])))
            start += len(places)
            found = [saved["state"].get(at) for at in places]
            if any(found):
                self._rows.state[row["params"][0]] = self._cut(group, row["params"][0], found)

    def _cut(
        self, group: Mapping[str, Any], row: Tensor, found: Sequence[Values | None]
    ) -> dict[str, Any]:
        """The piece of the state of a group that this process keeps."""
        shared = [
            None if values is None else {k: v for k, v in values.items() if not _fits(v, p)}
            for p, values in zip(group["params"], found, strict=True)
        ]
        if any(values is None or not _same(values, shared[0]) for values in shared):
            raise UserError(
                f"the parameters of {group['name']!r} have been stepped unequally often, and "
                "DeepSpeed keeps one count for all of them",
                'Go on with distributed.engine = "ddp" or "fsdp2".',
            )
        first = next(values for values in found if values is not None)
        state = {**first}
        for name in [name for name in first if name not in (shared[0] or {})]:
            piece = state[name] = torch.zeros_like(row)
            for parameter, values in zip(group["params"], found, strict=True):
                assert values is not None, "compared above"
                for at, of_row in _overlap(parameter):
                    piece[of_row] = values[name].flatten()[at].to(piece)
        return state

    def _entries(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        for group, row in zip(self.param_groups, self._rows.param_groups, strict=True):
            piece = row["params"][0]
            state = self._rows.state.get(piece, {})
            for parameter in group["params"]:
                yield (
                    parameter,
                    {
                        name: self._put_together(value, parameter) if _fits(value, piece) else value
                        for name, value in state.items()
                    },
                )

    def _put_together(self, piece: Tensor, parameter: nn.Parameter) -> Tensor:
        found = torch.zeros(parameter.numel(), dtype=piece.dtype, device=piece.device)
        for at, of_row in _overlap(parameter):
            found[at] = piece[of_row]
        return self._world.add_up(found).view(parameter.shape)


class Whole(Mapping[nn.Parameter, Any]):
    """State that is put together while it is walked through, so that it is never there at once."""

    def __init__(self, entries: Callable[[], Iterator[tuple[nn.Parameter, Any]]]) -> None:
        self._entries = entries

    def items(self) -> Any:
        """Parameter and its state, in turn; all processes must walk together."""
        return self._entries()

    def __iter__(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter, _ in self._entries())

    def __getitem__(self, wanted: nn.Parameter) -> Any:
        return next(values for parameter, values in self._entries() if parameter is wanted)

    def __len__(self) -> int:
        return sum(1 for _ in self._entries())


def _overlap(parameter: Any) -> Iterator[tuple[slice, slice]]:
    """Which of a parameter's numbers are in this process's piece, and where in it; none or one."""
    fragment = parameter._hp_mapping
    if fragment is not None:
        at, of_row = fragment.lp_fragment_address, fragment.hp_fragment_address
        yield (
            slice(at.start, at.start + at.numel),
            slice(of_row.start, of_row.start + of_row.numel),
        )


def _fits(value: Any, place: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == place.shape


def _same(one: Values, other: Values | None) -> bool:
    return other is not None and {k: _plain(v) for k, v in one.items()} == {
        k: _plain(v) for k, v in other.items()
    }


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def options(stage: int, max_grad_norm: float) -> dict[str, Any]:
    """What DeepSpeed is told; everything else is ours."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # ours is as long as a step needs
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET_NUMBERS,
            "allgather_bucket_size": BUCKET_NUMBERS,
        },
    }


def require() -> None:
    """Refuse where DeepSpeed is not installed, before anything is opened.

    Raises:
        MissingExtraError: says how to install it.
    """
    if find_spec("deepspeed") is None:
        raise MissingExtraError("deepspeed", "deepspeed", 'distributed.engine = "deepspeed"')


def imported(device: torch.device) -> Any:
    """DeepSpeed, told which device it works on."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    with contextlib.redirect_stdout(sys.stderr):  # its logger keeps the stdout that it finds
        import deepspeed
        import deepspeed.ops
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":  # else it would compile a shared-memory kernel, for inference
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


@contextlib.contextmanager
def _quiet(world: World) -> Iterator[None]:
    """It prints; stdout is for data, and only the main process talks."""
    with contextlib.redirect_stdout(sys.stderr if world.is_main else io.StringIO()):
        yield
