"""FSDP2: weights, gradients and optimizer state of trained networks spread over the processes.

Each network is cut into units that are gathered when they compute and let go afterwards. Parameter
names stay as they are, so checkpoints are the same as those of one process.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdtrain.engine import Engine, whole
from sdtrain.text import last_norm

if TYPE_CHECKING:
    from sdtrain.family import Family
    from sdtrain.freeze_plan import FreezePlan

SMALLEST_UNIT = 1_000_000
"""Parameters; what is smaller is gathered with the unit around it."""


@dataclass(frozen=True)
class Sharded(Engine):
    """See `Engine`; every process must run equally many forwards and backwards."""

    has_spread_state = True

    @property
    def is_sharded(self) -> bool:
        """All weights of what trains are spread."""
        return True

    @property
    def loss_factor(self) -> float:
        """FSDP averages gradients over the processes."""
        return float(self.world.size)

    def prepare(self, family: Family, plan: FreezePlan) -> FreezePlan:
        """Cut every network in which something trains; the others stay whole everywhere."""
        from torch.distributed.device_mesh import init_device_mesh

        # Text encoders return views. Nothing writes into them: what is trained so is compared with
        # one process in tests/test_distributed.py.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        device = next(iter(plan.trained().values())).device
        mesh = init_device_mesh(device.type, (self.world.size,))
        renewed: dict[int, nn.Parameter] = {}
        for network in family.parts.values():
            if not any(parameter.requires_grad for parameter in network.parameters()):
                continue
            before = {name: id(parameter) for name, parameter in network.named_parameters()}
            shard(network, mesh)
            after = dict(network.named_parameters())
            renewed |= {before[name]: after[name] for name in before}
        return replace(
            plan,
            groups=[
                replace(group, parameters=_renewed(group.parameters, renewed))
                for group in plan.groups
            ],
            frozen=_renewed(plan.frozen, renewed),
        )

    def collect(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing is left to do: each backward has added up its gradients already."""

    def take(self, tensor: Tensor) -> Tensor:
        """See `Engine`; the other processes get an empty tensor, and only help."""
        tensor = whole(tensor.detach())
        return tensor.cpu().contiguous() if self.world.is_main else torch.empty(0)


def shard(network: nn.Module, mesh: Any, smallest: int | None = None) -> None:
    """Cut a network in place into units, inner ones first."""
    from torch.distributed.fsdp import fully_shard

    smallest = SMALLEST_UNIT if smallest is None else smallest
    for module in [*_units(network, smallest), *_called_alone(network), network]:
        # Also the outermost lets go, so that its parameters are never seen whole between steps.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    _keep_capturing(network)


def _keep_capturing(network: nn.Module) -> None:
    """Let transformers 5 go on handing out hidden states.

    It keeps by class what a network can hand out, and cutting a network changes its class.
    """
    name = "transformers.utils.output_capturing"
    if name in sys.modules:  # not in transformers 4, nor needed there
        registry = sys.modules[name]._CAN_RECORD_REGISTRY
        for module in network.modules():
            if hasattr(module, "_can_record_outputs"):
                registry[module] = module._can_record_outputs


def _called_alone(network: nn.Module) -> list[nn.Module]:
    """Modules that are also called outside their network, and must then be gathered themselves."""
    norm = last_norm(network)
    return [] if norm is None else [norm]


def _units(network: nn.Module, smallest: int) -> Iterator[nn.Module]:
    """The repeated blocks: members of lists, if they are large enough; inner ones first."""
    for module in reversed(list(network.modules())):
        if not isinstance(module, nn.ModuleList):
            continue
        for member in module:
            if isinstance(member, nn.ModuleList):
                continue
            if sum(parameter.numel() for parameter in member.parameters()) >= smallest:
                yield member


def _renewed(
    parameters: dict[str, nn.Parameter], renewed: dict[int, nn.Parameter]
) -> dict[str, nn.Parameter]:
    return {path: renewed.get(id(parameter), parameter) for path, parameter in parameters.items()}
