"""What the optimizers of other packages share: types, and how a missing package is told."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

from pydantic import Field

from sdprep.errors import MissingExtraError

Beta = Annotated[float, Field(ge=0, lt=1)]
Groups = list[dict[str, Any]]

UNUSED_LR = 1.0
"""For constructors that insist on a rate of their own; every group brings one."""


def optional(module: str, optimizer: str) -> Any:
    """Import a module of the extra `optim`.

    Raises:
        MissingExtraError: its package is not installed.
    """
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtraError(package, "optim", f"optimizer {optimizer}") from None
