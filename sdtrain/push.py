"""Send a trained model to the Hub, with a card that says how it was made."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdprep.card_text import fenced, plain
from sdprep.errors import DataError, UserError
from sdprep.hub_access import open_hub, patiently, quiet, repo_name
from sdprep.private_paths import hide_paths
from sdtrain.provenance import Provenance, read_provenance, write_record
from sdtrain.provenance_text import provenance_text

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


def push_model(
    path: Path, repo: str, *, private: bool = True, license: str | None = None
) -> dict[str, Any]:
    """Send a model; a checkpoint is exported first, a LoRA for diffusers and for ComfyUI.

    Args:
        path: a checkpoint, a run, a model folder, or a .safetensors file.
        repo: `USER/NAME`; made if missing. Files of the same name there are replaced.
        private: visibility of a repository that is made; never changed later.
        license: named on the card; None names none.

    Returns:
        repo, url, revision and the names of the files.

    Raises:
        UserError: bad name, no access, public against the wish, or no answer from the Hub.
        DataError: `path` holds no model.
    """
    try:
        repo_name(repo)
    except ValueError as error:
        raise UserError(f"{repo!r}: {error}") from None
    if license is not None and not _LICENSE.fullmatch(license):
        raise UserError(f"--license {license!r} is no identifier", "Such as openrail++ or mit.")
    found = read_provenance(path)
    api = open_hub(repo)
    with tempfile.TemporaryDirectory() as scratch, quiet():
        folder = _collected(found, Path(scratch) / "model")
        write_card(folder, found, repo.split("/")[1], license)
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        commit = patiently(lambda: _send(api, folder, repo, private), repo)
    url = f"{api.endpoint}/{repo}"
    return {"repo": repo, "url": url, "revision": commit, "files": names}


def _send(api: HfApi, folder: Path, repo: str, private: bool) -> str:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        is_public = api.model_info(repo).private is False
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private)
        is_public = False
    if private and is_public:
        raise UserError(
            f"{repo} is public on the Hub, and the push is to be private",
            "Say --public if that is meant, or take another name.",
        )
    made = api.upload_folder(
        repo_id=repo, folder_path=folder, commit_message="Add the model and its card"
    )
    return str(made.oid)


def _collected(found: Provenance, folder: Path) -> Path:
    """What is sent, in a folder of its own."""
    if found.kind == "checkpoint":
        _exported(found.path, folder)
    elif found.kind == "file":
        folder.mkdir(parents=True)
        shutil.copy2(found.path, folder / found.path.name)
    else:
        if (found.path / CARD).is_symlink():
            raise DataError(f"{found.path / CARD} is a link")
        shutil.copytree(found.path, folder)
    return folder


def _exported(checkpoint: Path, folder: Path) -> None:
    from sdtrain.checkpoint import read_state
    from sdtrain.export import export

    adapter = read_state(checkpoint)["recipe"]["adapter"]["type"]
    if adapter == "full":
        export(checkpoint, "diffusers", folder)
        return
    try:
        export(checkpoint, "lora-diffusers", folder / "pytorch_lora_weights.safetensors")
        export(checkpoint, "lora-kohya", folder / "lora-kohya.safetensors")
    except UserError:  # an adapter that has no file format of its own here
        shutil.rmtree(folder, ignore_errors=True)
        export(checkpoint, "diffusers", folder)


def write_card(folder: Path, found: Provenance, title: str, license: str | None = None) -> None:
    """Write the card and the record of training; absolute paths are cut to their last part."""
    recipe = found.record.get("recipe") or {}
    base = str((recipe.get("model") or {}).get("path") or "")
    data = str((recipe.get("data") or {}).get("path") or "")
    is_adapter = (recipe.get("adapter") or {}).get("type", "full") != "full"
    header: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    header |= {"license": license} if license else {}
    header |= {"base_model": base} if _is_on_the_hub(base) else {}
    header |= {"datasets": [data]} if _is_on_the_hub(data) else {}
    header["tags"] = ["text-to-image", *(["lora"] if is_adapter else []), "sdtrain"]
    told = hide_paths(provenance_text(found).partition("\n")[2])
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items()]
    text = "\n".join(["---", *lines, "---", f"# {plain(title)}", "", _sentence(found), ""])
    text += f"\n## How it was made\n\n{fenced(told)}\n"
    (folder / CARD).write_text(text, encoding="utf-8", newline="\n")
    write_record(folder, found.record)


def _sentence(found: Provenance) -> str:
    recipe, seen = found.record.get("recipe"), found.record.get("samples_seen")
    if not recipe:
        return "A text-to-image model. Nothing is recorded of its training."
    base = plain(Path(str(recipe["model"]["path"])).name)
    return f"Trained from {base} with sdtrain, on {seen:,} samples; the whole recipe is below."


def _is_on_the_hub(name: str) -> bool:
    """Whether it looks like USER/NAME and is no folder here."""
    try:
        return repo_name(name) == name and not Path(name).exists()
    except ValueError:
        return False
