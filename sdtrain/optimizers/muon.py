"""Muon: steps of hidden matrices made orthogonal; AdamW for everything else (torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sdprep.errors import UserError
from sdprep.recipe import Section
from sdtrain.optimizers._package import Beta, whole_bytes


class Config(Section):
    """Muon for hidden matrices, AdamW for convolutions, embeddings, norms and biases.

    The authors' settings: momentum 0.95 of Nesterov's kind, five Newton-Schulz iterations. A step
    is scaled to the size of AdamW's (arXiv:2502.16982), so both take the rate and the weight decay
    that AdamW would.
    """

    type: Literal["muon"] = "muon"
    wants_paths: ClassVar[bool] = True
    momentum: float = Field(0.95, ge=0, lt=1, description="Decay of a matrix's running gradient.")
    ns_steps: int = Field(5, ge=1, le=20, description="Newton-Schulz iterations a step.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Of AdamW, for the rest.")
    eps: float = Field(1e-8, gt=0, description="Of AdamW, for the rest.")
    weight_decay: float = Field(0.01, ge=0, description="Decay per step, times the rate.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them."
    )

    def state_bytes(self, path: str, shape: Sequence[int]) -> int:
        """Bytes of state for one trained parameter."""
        return whole_bytes(shape, 1 if is_hidden_matrix(path, shape) else 2)

    def require(self) -> None:
        """Refuse a torch without it, before anything is opened."""
        if not hasattr(torch.optim, "Muon"):
            raise UserError(
                f"optimizer muon needs torch 2.9 or later; this is {torch.__version__}",
                "Update PyTorch, or take another optimizer.",
            )

    def build(self, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of groups, each `{"params": […], "lr": …, "name": …, "paths": […]}`.

        Without paths, every matrix counts as a hidden one.
        """
        self.require()
        hidden, rest = _split(groups)
        inner: list[Any] = []
        if hidden:
            inner.append(
                torch.optim.Muon(
                    hidden,
                    weight_decay=self.weight_decay,
                    momentum=self.momentum,
                    ns_steps=self.ns_steps,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if rest:
            inner.append(
                torch.optim.AdamW(
                    rest, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
                )
            )
        return MuonAndAdamW(inner)


def is_hidden_matrix(path: str, shape: Sequence[int]) -> bool:
    """Whether Muon takes a parameter: two dims, and neither a table nor made from one."""
    return len(shape) == 2 and "embed" not in path


def _split(groups: Iterable[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Each group in up to two, which share its rate by the key `rule`."""
    hidden: list[Any] = []
    rest: list[Any] = []
    for group in groups:
        taken: tuple[list[Tensor], list[Tensor]] = ([], [])
        paths = group.get("paths", [""] * len(group["params"]))
        for path, parameter in zip(paths, group["params"], strict=True):
            taken[not is_hidden_matrix(path, parameter.shape)].append(parameter)
        common = {"lr": group["lr"], "rule": group["name"]}
        if taken[0]:
            hidden.append({"params": taken[0], "name": f"{group['name']} (muon)", **common})
        if taken[1]:
            rest.append({"params": taken[1], "name": f"{group['name']} (adamw)", **common})
    return hidden, rest


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers with one list of groups and one state.

    Args:
        inner: those that step; each group belongs to the one whose keys it has.
    """

    def __init__(self, inner: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for each in inner for group in each.param_groups], {})
        self.inner = {isinstance(each, torch.optim.AdamW): each for each in inner}

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every group."""
        assert closure is None, "gradients are there already"
        for is_adamw, each in self.inner.items():
            each.param_groups = [g for g in self.param_groups if ("betas" in g) == is_adamw]
            each.state = self.state
            each.step()
