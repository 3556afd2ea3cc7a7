"""What a disk says when it takes nothing, or no more, by whichever library wrote to it."""

from __future__ import annotations

import errno
import os
import re

from sdprep.errors import UserError

FULL_DISK = frozenset(
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)
)
"""No space left, quota exceeded, file too large (a limit of the shell or the file system)."""

NOT_ALLOWED = frozenset((errno.EACCES, errno.EPERM, errno.EROFS))
"""No right to a file or folder, or a disk that is only read."""

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


def in_words(error: BaseException) -> UserError | None:
    """A disk's refusal as what the user can mend; None if the exception is about something else."""
    if is_full(error):
        return UserError(f"the disk is full: {error}", "Free some space, then run it again.")
    if isinstance(error, OSError) and error.filename and error.errno in NOT_ALLOWED:
        return UserError(
            f"{error.filename} may not be used: {error.strerror}",
            "See who may read and write there, or name another place.",
        )
    return None
