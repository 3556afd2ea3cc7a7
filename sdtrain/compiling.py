"""torch.compile, block by block: a network repeats few kinds of block, so each is compiled once.

Blocks are compiled where they are. Nothing is wrapped, so parameters keep their names and files
their keys; a whole network would take minutes to compile and be compiled again for every shape.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from sdprep.errors import UserError
from sdprep.recipe import Section
from sdtrain.family import Family

OTHER_BLOCKS = ("ResnetBlock2D",)
"""Kinds of block that diffusers does not list among the repeated ones of a network."""

MOST_VERSIONS = 64
MOST_VERSIONS_IN_ALL = 1024
"""torch falls back to plain Python beyond a limit, which widths, shapes and modes would pass."""


class CompileSection(Section):
    """Whether transformer and residual blocks are compiled."""

    mode: Literal["off", "blocks"] = Field(
        "off", description="blocks: slow at the first steps, faster afterwards."
    )
    backend: Literal["inductor", "aot_eager", "eager"] = Field(
        "inductor", description="What torch compiles to; the last two are for finding faults."
    )
    dynamic: bool | Literal["auto"] = Field(
        "auto", description="Code for any size of picture; auto: from the second size on."
    )


def require_compiler(section: CompileSection, device: torch.device) -> None:
    """Refuse a machine that could not compile, before anything is opened.

    Raises:
        UserError: Triton or a C++ compiler is missing; says which.
    """
    if section.mode == "off" or section.backend != "inductor":
        return
    if device.type == "cuda":
        if find_spec("triton") is None:
            raise UserError(
                'compile.mode = "blocks" needs Triton, which is not installed',
                "Linux builds of PyTorch bring it; on Windows install triton-windows, or set "
                'compile.mode = "off".',
            )
        return
    reason = _no_cpp_compiler()
    if reason is not None:
        raise UserError(
            f'compile.mode = "blocks" needs a C++ compiler on a {device.type}: {reason}',
            'Install one (g++, clang++ or MSVC), or set compile.mode = "off".',
        )


def _no_cpp_compiler() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError) as error:
        return str(error).strip().splitlines()[0]
    return None


def compile_blocks(family: Family, section: CompileSection) -> int:
    """Compile the blocks of every network that has some; the work is done at their first forward.

    Returns:
        how many blocks are compiled.

    Raises:
        UserError: no network of the family has any.
    """
    if section.mode == "off":
        return 0
    found = [block for part in family.trainable_parts for block in blocks(family.parts[part])]
    if not found:
        raise UserError(
            f'compile.mode = "blocks" finds no block in a {family.name} model',
            'Set compile.mode = "off".',
        )
    _allow_many_versions()
    dynamic = None if section.dynamic == "auto" else section.dynamic
    for block in found:
        block.compile(backend=section.backend, dynamic=dynamic)
    return len(found)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The outermost repeated blocks of a diffusers network; none of any other."""
    kinds = getattr(network, "_repeated_blocks", None)
    if not kinds:
        return []
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in network.modules():
        if id(module) not in inside and type(module).__name__ in (*kinds, *OTHER_BLOCKS):
            found.append(module)
            inside |= {id(inner) for inner in module.modules()}
    return found


def _allow_many_versions() -> None:
    config: Any = torch._dynamo.config  # type: ignore[attr-defined]
    for old, new, least in (
        ("cache_size_limit", "recompile_limit", MOST_VERSIONS),
        ("accumulated_cache_size_limit", "accumulated_recompile_limit", MOST_VERSIONS_IN_ALL),
    ):
        name = new if hasattr(config, new) else old
        setattr(config, name, max(getattr(config, name), least))
