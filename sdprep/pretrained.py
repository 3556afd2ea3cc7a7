"""Models of transformers from a folder: safetensors only, whole, and without code of their own."""

from __future__ import annotations

import sys
from typing import Any

from sdprep.errors import DataError, UserError
from sdprep.model_files import ModelFolder


def load_parts(folder: ModelFolder, model: str, *others: str, dtype: Any) -> list[Any]:
    """A model in eval mode on the CPU, and its processors and tokenizers.

    Args:
        folder: holds all of them.
        model: name of the class in transformers, such as `AutoModel`.
        others: names of the classes of processors and tokenizers.
        dtype: torch type of the weights.

    Raises:
        DataError: files are missing or do not fit each other.
        UserError: a part needs a package that is not there.
    """
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        parts = [
            getattr(transformers, name).from_pretrained(folder.path, **safe) for name in others
        ]
        loaded, report = getattr(transformers, model).from_pretrained(
            folder.path, use_safetensors=True, dtype=dtype, output_loading_info=True, **safe
        )
    except ImportError as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"model {folder.name} needs a package that is missing: {what}") from None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise DataError(f"model {folder.name} does not load: {error}") from None
    # transformers would go on with random numbers in place of what is missing.
    lacks = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    lacks = [name for name in lacks if not name.endswith("position_ids")]
    if lacks:
        raise DataError(
            f"model {folder.name} does not fit its config.json: its weights lack {len(lacks)} "
            f"tensors, such as {', '.join(lacks[:3])}",
            "Take the whole model as its authors publish it, not a part of it.",
        )
    return [loaded.eval(), *parts]
