"""Errors that the user can fix; anything else is a bug of ours and keeps its traceback."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can mend. The command line prints it without a traceback and exits 2.

    Args:
        message: what was wrong, where, what was found and what was expected.
        hint: what to do next; empty if the message says it already.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class RecipeError(UserError):
    """A recipe (or a `--set`) that does not validate; the message lists every mistake at once."""


class DataError(UserError):
    """A file, row or table that cannot be used as it is."""


class MissingExtraError(UserError):
    """An optional package is needed and not installed.

    Args:
        package: the import name that failed, such as `ultralytics`.
        extra: the extra of this project that brings it, such as `yolo`.
        why: what needs it, such as `detector yolo`.
    """

    def __init__(self, package: str, extra: str, why: str) -> None:
        wanted = " ".join(f'"{name}"' for name in _requirements(extra)) or package
        super().__init__(
            f"{why} needs {package}, which is not installed: pip install {wanted}",
            f"That is the extra [{extra}].",
        )
        self.package, self.extra = package, extra


def _requirements(extra: str) -> list[str]:
    """What our own package metadata lists under one extra."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        lines = requires("sdprep-sdtrain") or []
    except PackageNotFoundError:
        return []
    parts = [line.split(";") for line in lines if ";" in line]
    return [need.strip() for need, marker in parts if f'"{extra}"' in marker]


def nearest(word: str, choices: Sequence[str]) -> str | None:
    """The choice most like `word`, or None if nothing is close.

    Case, dashes and underscores do not count against a match.
    """
    import difflib

    def plain(text: str) -> str:
        return text.lower().replace("-", "_")

    by_plain = {plain(choice): choice for choice in reversed(list(choices))}
    found = difflib.get_close_matches(plain(word), list(by_plain), n=1, cutoff=0.6)
    return by_plain[found[0]] if found else None
