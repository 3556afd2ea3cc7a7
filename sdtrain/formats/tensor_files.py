"""Files of named tensors: told apart by what is in them, not by what they are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sdprep.errors import DataError, UserError

ENDINGS = (".safetensors", ".ckpt", ".bin")
_AGAIN = "Download or copy it again."


def is_single_file(path: str) -> bool:
    """Whether a model path names a single file and no folder or repository."""
    return path.lower().endswith(ENDINGS) and not Path(path).is_dir()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that those may read who may read the folder's other new files.

    safetensors writes a private file and moves it there, so that nobody else could open a model.

    Args:
        path: the file to make.
        tensors: by name.
        metadata: of its header; `format` is added.
    """
    from safetensors.torch import save_file

    path.touch()  # with the rights that this user gives to new files
    rights = path.stat().st_mode
    save_file(dict(tensors), str(path), metadata={"format": "pt", **metadata})
    path.chmod(rights)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file; pickled ones are opened without running anything in them.

    Raises:
        UserError: there is no such file.
        DataError: it is damaged, or holds more than tensors.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"there is no single file {path}", "Check model.path.")
    try:
        if is_safetensors(path):
            with safe_open(str(path), framework="pt") as file:
                names = list(file.keys())
                return {key: file.get_tensor(key) for key in names}, file.metadata() or {}
        with path.open("rb") as opened:  # by its path PyTorch goes by its name
            content = torch.load(opened, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        size = path.stat().st_size
        raise DataError(
            f"{path} ({size:,} bytes) cannot be read: {first_line(error)}", _advice(path)
        ) from None
    except Exception as error:  # torch names no class for what it will not unpickle
        if not _is_pickle(_beginning(path)):
            raise DataError(f"{path} is no checkpoint of PyTorch", _advice(path)) from None
        named = re.search(r"GLOBAL (\S+)", str(error))  # its advice is to run it after all
        raise DataError(
            f"{path} holds more than tensors and is not opened"
            + (f": it would import {named[1]}" if named else ""),
            "Convert it to .safetensors with a tool you trust.",
        ) from None
    inner = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(inner, dict):
        raise DataError(
            f"{path} holds a {type(inner).__name__}, not tensors by name",
            "A checkpoint is a dictionary, or has one under state_dict.",
        )
    return {key: value for key, value in inner.items() if isinstance(value, Tensor)}, {}


def read_names(path: Path) -> list[str]:
    """The names of a safetensors file's tensors, without reading these.

    Raises:
        DataError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is damaged: {first_line(error)}", _advice(path)) from None


def first_line(error: Exception) -> str:
    """What an error of a library says first; its name if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(9)


def is_safetensors(path: Path) -> bool:
    """Whether to read a file as safetensors: by its first bytes; if they say nothing, its name.

    Args:
        path: a file that is there.
    """
    start = _beginning(path)
    if start[4:] == b"\0\0\0\0{":  # the size of a header below 4 GiB, and its beginning
        return True
    return path.suffix.lower() == ".safetensors" and not _is_pickle(start)


def _is_pickle(start: bytes) -> bool:
    """Whether it is PyTorch's archive, or a pickle of protocol 2 or later as older ones are."""
    return start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5")


def _advice(path: Path) -> str:
    start = _beginning(path)
    if start.startswith(b"version "):
        return "It is a pointer of Git LFS, not the file itself: run `git lfs pull` there."
    if start.lstrip().startswith(b"<"):
        return f"It is a web page, such as a login or an error, not a model. {_AGAIN}"
    return f"It is cut off, damaged or no file of tensors. {_AGAIN}"
