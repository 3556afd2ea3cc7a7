"""Models in ONNX's format: where they run, and what is said when they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdprep.console import say, warn
from sdprep.errors import DataError, MissingExtraError, UserError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def open_session(path: Path, device: str, who: str, extra: str) -> Any:
    """A session of ONNX Runtime on a device; what `auto` chose is said aloud.

    Args:
        path: the file.
        device: auto, cpu, cuda, cuda:N or mps.
        who: what runs there, for messages.
        extra: the extra that brings ONNX Runtime.

    Raises:
        UserError: ONNX Runtime or the device is missing; nothing else is taken instead.
        DataError: it cannot open the file.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise MissingExtraError("onnxruntime", extra, f"{who} with {path.name}") from None
    has_cuda = CUDA in onnxruntime.get_available_providers()
    providers = _providers(device, has_cuda, who, path.name)
    try:
        session = onnxruntime.InferenceSession(str(path), providers=providers)
    except Exception as error:  # its exceptions have no common base of their own
        raise DataError(f"{path} cannot be opened by ONNX Runtime: {error}") from None
    # It goes on with the CPU when CUDA's libraries do not load; we do not unless told `auto`.
    if len(providers) > 1 and CUDA not in session.get_providers():
        message = f"{who}: ONNX Runtime could not start CUDA"
        if device != "auto":
            raise UserError(message, "Its log above names the library that is missing.")
        warn(f"{message} and runs on the CPU")
    return session


def device_of(session: Any) -> str:
    """Cuda or cpu: where a session really runs."""
    return "cuda" if session.get_providers()[0] == CUDA else "cpu"


def _providers(device: str, has_cuda: bool, who: str, file: str) -> list[Any]:
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
        say(f"{who} runs on {device} (ONNX Runtime)")
    if device == "cpu":
        return [CPU]
    if device == "mps":
        raise UserError(
            f"{who}: {file} does not run on mps",
            "Take --device cpu, or weights that PyTorch runs.",
        )
    if not has_cuda:
        raise UserError(
            f"{who}: device {device} is not there; this ONNX Runtime was built without CUDA",
            "pip install onnxruntime-gpu in place of onnxruntime, or take --device auto.",
        )
    return [(CUDA, {"device_id": int(device.partition(":")[2] or 0)}), CPU]
