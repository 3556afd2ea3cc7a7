"""Where a model runs, and batches that fit into its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import Field

from sdprep.console import say, warn
from sdprep.errors import UserError

DeviceName = Annotated[
    str,
    Field(
        pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$",
        description="auto (the best there is), cpu, cuda, cuda:1 or mps.",
    ),
]
BatchSize = Annotated[
    int, Field(ge=1, le=4096, description="Images per call of the model; halved where too many.")
]

Item = TypeVar("Item")


def torch_device(wanted: str, who: str) -> str:
    """The device of torch that a model goes to; what `auto` chose is said aloud.

    Args:
        wanted: auto, cpu, cuda, cuda:N or mps.
        who: what runs there, for messages.

    Raises:
        UserError: the device that was asked for is not there; nothing else is taken instead.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    there = ["cpu", *(f"cuda:{index}" for index in range(count)), *(["mps"] if has_mps else [])]
    if wanted == "auto":
        chosen = "cuda" if count else "mps" if has_mps else "cpu"
        say(f"{who} runs on {chosen}")
        return chosen
    if wanted in there or (wanted == "cuda" and count):
        return wanted
    raise UserError(
        f"{who}: device {wanted} is not there; PyTorch {torch.__version__} sees {', '.join(there)}",
        "For an NVIDIA GPU install PyTorch's CUDA build; or take --device auto.",
    )


def batch_on(device: str, count: int) -> int:
    """Images in one forward: on a CPU a single one, elsewhere all of them.

    In a batch the last bits of a result depend on its size, so on what had been done before a
    kill. Alone they do not, and on a CPU it costs nothing (ViT at 448 px, 4 images: 1.70 s in one
    batch, 1.57 s one by one).
    """
    return 1 if device == "cpu" else max(1, count)


class FittingBatches:
    """Runs a model on batches, in halves where memory runs out; what fits is remembered."""

    def __init__(self, who: str) -> None:
        self.who = who
        self.most: int | None = None  # items that are known to fit; None: no limit met so far

    def run(self, work: Callable[[Sequence[Item]], Any], items: Sequence[Item]) -> list[Any]:
        """Results of `work` over `items`, one each, in order.

        Raises:
            UserError: not even one item fits.
        """
        results: list[Any] = []
        while len(results) < len(items):
            size = len(items) if self.most is None else self.most
            part = items[len(results) : len(results) + size]
            if self._fits(work, part, results):
                continue
            if len(part) == 1:
                raise UserError(
                    f"{self.who}: out of memory with a single image",
                    "Close what else uses the device, or take a smaller model or --device cpu.",
                )
            self.most = len(part) // 2
            warn(f"{self.who}: out of memory with {len(part)} images, goes on with {self.most}")
        return results

    def _fits(
        self,
        work: Callable[[Sequence[Item]], Any],
        part: Sequence[Item],
        results: list[Any],
    ) -> bool:
        try:
            done = work(part)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            assert len(done) == len(part), "one result an item"
            results.extend(done)
            return True
        _free()  # here, where the failed call's tensors are gone with its traceback
        return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch (any device) or ONNX Runtime means too little memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "failed to allocate memory")
    return any(sign in text for sign in signs)


def _free() -> None:
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
