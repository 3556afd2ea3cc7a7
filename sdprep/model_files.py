"""Files of a model: from a folder or the Hub, in the layout of its authors, safetensors only."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from sdprep.errors import DataError, UserError
from sdprep.file_digests import file_digest

if TYPE_CHECKING:
    from torch import Tensor

ModelName = Annotated[
    str, Field(min_length=1, description="Folder of the model, or its id on the Hub (USER/NAME).")
]
Revision = Annotated[
    str | None,
    Field(min_length=1, description="Commit, tag or branch on the Hub; none: its newest state."),
]

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class ModelFolder:
    """A folder that holds a model, and what tells this model from any other."""

    path: Path
    name: str  # as the user wrote it, for messages
    identity: str  # `<id>@<commit>`, or `blake2b:<digest>` of a folder's own files

    def has(self, file: str) -> bool:
        """Whether the file is there."""
        return (self.path / file).is_file()

    def need(self, file: str) -> Path:
        """Path of a file.

        Raises:
            DataError: it is not there; names what is.
        """
        if self.has(file):
            return self.path / file
        there = sorted(path.name for path in self.path.iterdir())
        pickled = [name for name in there if name.lower().endswith(_PICKLES)]
        if pickled and file.endswith(".safetensors"):
            raise DataError(
                f"model {self.name} has {pickled[0]} and no {file}: pickled weights may run code "
                "when they are opened, so only safetensors are read",
                "Take a revision that has safetensors, or convert them where you trust them.",
            )
        found = ", ".join(there[:12]) + (", …" if len(there) > 12 else "")
        raise DataError(
            f"model {self.name} has no {file}; found: {found or 'nothing'}",
            "Keep the file names that its authors publish.",
        )

    def read_json(self, file: str) -> dict[str, Any]:
        """The object in a JSON file.

        Raises:
            DataError: missing, damaged, or no object.
        """
        path = self.need(file)
        try:
            value = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise DataError(f"{path} is no JSON: {error}") from None
        if not isinstance(value, dict):
            raise DataError(f"{path} holds a {type(value).__name__}, expected an object")
        return value

    def read_weights(self, file: str = "model.safetensors") -> dict[str, Tensor]:
        """Tensors by name, on the CPU.

        Raises:
            DataError: missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.need(file)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{path} is no whole safetensors file: {error}", "Fetch it again."
            ) from None


def model_folder(model: str, revision: str | None, files: Sequence[str]) -> ModelFolder:
    """Find a model in a folder, or in the Hub's cache, fetching what is not there yet.

    Args:
        model: path of a folder, or an id on the Hub; a folder of that name goes first.
        files: names or patterns of the files that are used; no others are fetched or digested.

    Raises:
        UserError: no such folder or model, or the Hub does not answer.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UserError(
                f"model {model} is a folder, and revision = {revision!r} is for the Hub",
                "Leave revision out.",
            )
        return ModelFolder(path, model, f"blake2b:{_digest(path, files)}")
    if path.exists():
        raise DataError(f"model {model} is a file", "Name the folder that it lies in.")
    if not _HUB_ID.fullmatch(model):
        raise UserError(
            f"there is no folder {model}, and it is no id on the Hub",
            "Name a folder, or an id such as fancyfeast/joytag.",
        )
    path = _fetched(model, revision, files)
    return ModelFolder(path, model, f"{model}@{path.name}")


def _digest(folder: Path, files: Sequence[str]) -> str:
    """Digest over names and bytes of the files that match."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch.fnmatchcase(path.name, each) for each in files):
            digest.update(json.dumps([path.name, file_digest(path)]).encode())
    return digest.hexdigest()


def _fetched(model: str, revision: str | None, files: Sequence[str]) -> Path:
    """The snapshot in the Hub's cache; its folder is named by the commit."""
    from huggingface_hub import constants, errors, snapshot_download

    from sdprep.hub_access import quiet

    wanted = f"{model} (revision {revision})" if revision else model
    try:
        with nullcontext() if sys.stderr.isatty() else quiet():
            return Path(snapshot_download(model, revision=revision, allow_patterns=list(files)))
    except errors.GatedRepoError:
        raise UserError(
            f"model {model} is gated: its authors let in only who accepted their terms",
            f"Accept them at https://huggingface.co/{model}, then `hf auth login`.",
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise UserError(
            f"there is no folder {model}, and the Hub knows no model {wanted}",
            "Look at the spelling; a private model needs `hf auth login`.",
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub does not answer"
        at = f" --revision {revision}" if revision else ""
        raise UserError(
            f"there is no folder {model}; model {wanted} is not in the Hub's cache "
            f"({constants.HF_HUB_CACHE}), and {why}",
            f"Fetch it once with: hf download {model}{at}   or name a folder that holds it.",
        ) from None
    except errors.HfHubHTTPError as error:
        raise UserError(f"model {wanted} cannot be fetched: {error}") from None


def fingerprint(name: str, version: int, folder: ModelFolder, **options: Any) -> str:
    """What says that two runs give the same values: part, version, model, and its options.

    Args:
        options: only those that change a value, so neither batch size nor device.
    """
    found = {"name": name, "version": version, "model": folder.identity, **options}
    return json.dumps(found, sort_keys=True, ensure_ascii=False)
