"""What a disk says when it takes no more, by whichever library wrote to it."""

from __future__ import annotations

import errno
import os
import re

FULL_DISK = frozenset(
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)
)
"""No space left, quota exceeded, file too large (a limit of the shell or the file system)."""

# safetensors and Lance are Rust inside: they raise errors of their own, with the system's number.
_RUST_NUMBER = re.compile(r"\(os error (\d+)\)")


def as_os_error(error: BaseException) -> OSError | None:
    """The system's error that an exception stands for; None if it is about something else."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    found = _RUST_NUMBER.search(str(error))
    if found is None:
        return None
    number = int(found[1])
    return OSError(number, os.strerror(number))


def is_full(error: BaseException) -> bool:
    """Whether an exception says that there is no room for what was being written."""
    meant = as_os_error(error)
    return meant is not None and meant.errno in FULL_DISK
