"""The processes that train one model together: who this one is, and how they talk.

A run alone has a world of one, whose methods do nothing. Small things (losses, flags, errors) go
over the CPU, so that waiting for a slow disk never counts against a GPU collective.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from sdprep.console import out, talk
from sdprep.errors import UserError

CONNECT_TIMEOUT = timedelta(minutes=10)
WAIT_TIMEOUT = timedelta(hours=4)
"""Longer than the main process may take alone: drawing pictures, writing 30 GB to a slow disk."""

FAILED_KEY, WHY_KEY = "failed", "why"
T = TypeVar("T")
_stores: list[Any] = []  # of the processes that this one is or was connected with


class PeerFailedError(Exception):
    """Another process failed and has said why; this one only has to end."""


@dataclass(frozen=True)
class World:
    """One process among those of a run.

    Args:
        rank: its number; 0 is the main one, which alone writes files.
        size: how many there are.
        local_rank: its number on this machine, and that of its GPU.
        local_size: how many there are on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one writes the files."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> range:
        """The contiguous part of `count` things that a process takes; together they are all."""
        at = self.rank if rank is None else rank
        return range(count * at // self.size, count * (at + 1) // self.size)

    def add_up(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes; the same bits on each of them."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any process; all of them hear the same."""
        if self.size == 1:
            return flag
        return bool(self.add_up(torch.tensor([float(flag)])).item())

    def on_main(self, work: Callable[[], T]) -> T:
        """Let the main process work while the others wait; all get the result, or the error.

        Raises:
            UserError: what the main process raised, on every process.
            PeerFailedError: on the others, when it failed in any other way.
        """
        if self.size == 1:
            return work()
        answer: list[Any] = [None, None]
        problem: Exception | None = None
        if self.is_main:
            try:
                answer[1] = work()
            except UserError as error:
                problem, answer[0] = error, (error.message, error.hint)
            except Exception as error:
                problem, answer[0] = error, "failed"
        torch.distributed.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        _raise(problem, answer[0])
        return answer[1]

    def everywhere(self, work: Callable[[], T]) -> T:
        """Let every process work; if one of them fails, all do.

        Raises:
            UserError: what this process, or else the first that failed, raised.
        """
        if self.size == 1:
            return work()
        value: Any = None
        problem: Exception | None = None
        told: Any = None
        try:
            value = work()
        except UserError as error:
            problem, told = error, (error.message, error.hint)
        except Exception as error:
            problem, told = error, "failed"
        answers: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(answers, told)
        _raise(problem, next((answer for answer in answers if answer is not None), None))
        return value

    def device(self, asked: str) -> torch.device:
        """The device of this process, one GPU each.

        Args:
            asked: `precision.device` of the recipe.

        Raises:
            UserError: there are fewer GPUs than processes, or the device cannot be shared out.
        """
        if asked == "cpu" or (asked == "auto" and not _has_accelerator()):
            return torch.device("cpu")
        if asked not in ("auto", "cuda"):
            raise UserError(
                f"precision.device = {asked!r} names one device for {self.local_size} processes",
                "Use auto, cuda or cpu; CUDA_VISIBLE_DEVICES chooses GPUs.",
            )
        if not torch.cuda.is_available():
            raise UserError(
                f"precision.device = {asked!r}, but this PyTorch sees no NVIDIA GPU for "
                f"{self.local_size} processes",
                'Install a CUDA build of PyTorch, or set precision.device = "cpu".',
            )
        there = torch.cuda.device_count()
        if there < self.local_size or self.local_rank >= there:
            raise UserError(
                f"{self.local_size} processes on this machine, but PyTorch sees {there} GPUs",
                f"Start {there} processes here, or let CUDA_VISIBLE_DEVICES name more GPUs.",
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device


ALONE = World()


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _raise(mine: Exception | None, told: Any) -> None:
    if mine is not None:
        raise mine
    if isinstance(told, tuple):
        raise UserError(*told)
    if told is not None:
        raise PeerFailedError


# --- connecting ----------------------------------------------------------------------------------


@contextmanager
def connected() -> Iterator[World]:
    """Join the processes that a launcher announced in the environment; alone without one.

    Only the main process talks. Of an error that several processes meet, the first one speaks.

    Raises:
        UserError: the launcher announced what is not there, or the processes do not find each
            other.
    """
    world = _announced(os.environ)
    if world.size == 1:
        yield world
        return
    store = _join(world)
    _stores.append(store)
    if not world.is_main:
        talk.quiet = out.quiet = True
    try:
        yield world
        world.add_up(torch.zeros(1))  # nobody hangs up while others still talk
    except UserError as error:
        if not _is_first_to_fail(store, error.message):
            sys.exit(error.exit_code)
        talk.quiet = False
        raise
    except PeerFailedError:
        sys.exit(1)
    except Exception as error:
        if not _is_first_to_fail(store, repr(error)):
            sys.exit(1)
        talk.quiet = False
        if _is_lost_connection(error):
            raise UserError(
                f"process {world.rank} of {world.size} lost the others: {_first_line(error)}",
                "See what they said. The same command goes on from the newest checkpoint.",
            ) from error
        raise
    else:
        torch.distributed.destroy_process_group()
    finally:
        talk.quiet = out.quiet = False


def end_process(code: Any) -> None:
    """End at once with an exit status if this process was connected; else do nothing.

    Threads of the process group may still hold Python objects. Where they let go of them while the
    interpreter winds up, it aborts (seen with gloo on a busy machine), and a good end looks bad.
    """
    if not _stores:
        return
    from multiprocessing.util import _run_finalizers  # type: ignore[attr-defined]

    _run_finalizers(0)  # else Python warns of semaphores that the loaders' queues leave behind
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _announced(env: Mapping[str, str]) -> World:
    """What a launcher left in the environment.

    Raises:
        UserError: it is incomplete, or a launcher announced several processes and started one.
    """
    size = _number(env, "WORLD_SIZE")
    if size is None:
        _refuse_silent_launchers(env)
        return ALONE
    if size == 1:
        return ALONE
    rank = _number(env, "RANK")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE = {size} announces {size} processes, but {', '.join(missing)} is not set",
            "Start with --num-processes, torchrun or accelerate launch; for one process, unset it.",
        )
    assert rank is not None
    if not 0 <= rank < size:
        raise UserError(f"RANK = {rank} does not fit WORLD_SIZE = {size}")
    local = _number(env, "LOCAL_RANK")
    return World(
        rank, size, rank if local is None else local, _number(env, "LOCAL_WORLD_SIZE") or size
    )


def _refuse_silent_launchers(env: Mapping[str, str]) -> None:
    if env.get("RANK"):
        raise UserError(
            f"RANK = {env['RANK']} is set and WORLD_SIZE is not",
            "Start with --num-processes, torchrun or accelerate launch; for one process, unset it.",
        )
    # `accelerate launch --num_processes 2 --cpu` names a place to meet, and starts one process.
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env:
        raise UserError(
            "accelerate launch announced several processes, but started only this one",
            "On CPUs it does so: use sdtrain run --num-processes N, or torchrun.",
        )
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if (_number(env, name) or 1) > 1:
            raise UserError(
                f"{name} = {env[name]}: mpirun started processes that do not know each other",
                "Use torchrun or accelerate launch, which tell every process its rank.",
            )


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "")
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment says {name} = {text!r}, which is no number") from None


def _join(world: World) -> Any:
    """Meet the others; returns the store that all of them see."""
    distributed = torch.distributed
    if not distributed.is_available():
        raise UserError("this PyTorch cannot connect processes", "Install a build with gloo.")
    if os.name == "nt":  # builds for Windows lack libuv, which torch would otherwise ask for
        os.environ.setdefault("USE_LIBUV", "0")
    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, size = next(distributed.rendezvous("env://", timeout=CONNECT_TIMEOUT))
        store = distributed.PrefixStore("sdtrain", store)
        store.set_timeout(CONNECT_TIMEOUT)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=WAIT_TIMEOUT,
        )
        found = int(world.add_up(torch.ones(1)).item())
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {world.rank} of {world.size} found no others at {place}: "
            f"{_first_line(error)}",
            "Every machine must reach that address and start its share of the processes.",
        ) from error
    if found != world.size:
        raise UserError(f"{world.size} processes were announced, {found} are connected")
    return store


def what_failed(error: Exception) -> str:
    """An error in words; where it only says that another process is gone, what that one said."""
    if _stores and _is_lost_connection(error):
        with suppress(RuntimeError):  # the store may be gone, too
            if _stores[-1].check([WHY_KEY]):
                return str(_stores[-1].get(WHY_KEY).decode())
        return f"another process ended without a word, or is out of reach: {_first_line(error)}"
    return error.message if isinstance(error, UserError) else repr(error)


def _is_first_to_fail(store: Any, why: str) -> bool:
    try:
        is_first = int(store.add(FAILED_KEY, 1)) == 1
        if is_first:
            store.set(WHY_KEY, why)
        return is_first
    except RuntimeError:  # it went with the process that held it, which failed before
        return False


def _is_lost_connection(error: Exception) -> bool:
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
