"""Diffusers folders: read part by part with nothing missing, and written so that all can read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdprep.errors import DataError, UserError, nearest
from sdtrain.formats.tensor_files import first_line, save_tensors
from sdtrain.paths import canonical_path, is_clip_text

ONE_FILE = "100GB"  # a single file is what most tools expect
HALF = "fp16"
"""The variant that many folders have instead of float32."""
_FEWEST_TOKENS = 512  # CLIP's vocabulary begins with every byte, inside and at the end of a word


@dataclass(frozen=True)
class Folder:
    """The pieces of a diffusers folder.

    Args:
        pipeline_class: name of the diffusers pipeline.
        networks: by name: `unet`, `vae`, `text_encoder`, ….
        tokenizers: by name: `tokenizer`, `tokenizer_2`.
        scheduler: the checkpoint's own; in a family, one that says what is trained.
        index: options of the pipeline itself, such as `force_zeros_for_empty_prompt`.
    """

    pipeline_class: str
    networks: dict[str, nn.Module]
    tokenizers: dict[str, Any]
    scheduler: Any
    index: dict[str, Any]

    def pipeline(self) -> Any:
        """A pipeline over these networks, without safety checker or watermark."""
        import diffusers

        options: dict[str, Any] = dict(self.index)
        if self.pipeline_class == "StableDiffusionPipeline":
            options |= {"safety_checker": None, "feature_extractor": None}
            options["requires_safety_checker"] = False
        else:
            options["add_watermarker"] = False
        scheduler = type(self.scheduler).from_config(self.scheduler.config)  # with fresh state
        made = getattr(diffusers, self.pipeline_class)(
            **self.networks, **self.tokenizers, scheduler=scheduler, **options
        )
        made.set_progress_bar_config(disable=True)
        return made

    def save(self, path: Path) -> None:
        """Write the whole folder, safetensors only, text encoders with their `text_model.` prefix.

        Args:
            path: made if absent.
        """
        path.mkdir(parents=True, exist_ok=True)
        pipeline = self.pipeline()
        pipeline.save_config(str(path))  # model_index.json
        pipeline.scheduler.save_pretrained(str(path / "scheduler"))
        for name, tokenizer in self.tokenizers.items():
            write_tokenizer(path / name, tokenizer)
        for part, network in self.networks.items():
            if is_clip_text(network):
                write_text_encoder(path / part, part, network)
            else:
                save: Any = network
                save.save_pretrained(str(path / part), max_shard_size=ONE_FILE)
                for file in (path / part).glob("*.safetensors"):  # see `save_tensors`
                    shutil.copymode(path / part / "config.json", file)


def write_tokenizer(path: Path, tokenizer: Any) -> None:
    """Write a tokenizer with `vocab.json` and `merges.txt`, which transformers 5 leaves out."""
    tokenizer.save_pretrained(str(path))
    if not (path / "merges.txt").is_file():
        tokenizer.backend_tokenizer.model.save(str(path))


def write_text_encoder(path: Path, part: str, network: Any) -> None:
    """Write a text encoder with its weights under canonical names.

    transformers 5 saves CLIPTextModel without `text_model.`, and transformers 4 then loads a
    random encoder with no more than a warning.
    """
    tensors = {
        canonical_path(part, network, name).removeprefix(f"{part}."): tensor.detach()
        .to("cpu")
        .contiguous()
        for name, tensor in network.state_dict().items()
        if not name.endswith("position_ids")
    }
    # The class that diffusers looks for; an encoder built from a configuration has none yet.
    network.config.architectures = [type(network).__name__]
    network.config.save_pretrained(str(path))
    save_tensors(path / "model.safetensors", tensors, {})


def load_folder(
    path: str,
    pipeline_class: str,
    parts: Mapping[str, str],
    *,
    revision: str | None = None,
) -> Folder:
    """Load a diffusers folder in float32.

    Args:
        path: local folder or Hub id.
        pipeline_class: what its `model_index.json` must name.
        parts: name to class of every network.
        revision: commit, tag or branch of a Hub id.

    Raises:
        UserError: there is no such folder or repository, or it holds another kind of model.
        DataError: weights are missing from it, or it has none as safetensors.
    """
    index = read_index(path, pipeline_class, revision)
    where: dict[str, Any] = {"revision": revision} if revision else {}
    networks, tokenizers = {}, {}
    for part, class_name in parts.items():
        networks[part] = _load_network(path, part, class_name, where)
        if part.startswith("text_encoder"):
            name = part.replace("text_encoder", "tokenizer")
            tokenizers[name] = load_tokenizer(path, name, where)
    _require_plain_latents(path, networks)
    options = {key: index[key] for key in ("force_zeros_for_empty_prompt",) if key in index}
    return Folder(pipeline_class, networks, tokenizers, load_scheduler(path, index, where), options)


def _require_plain_latents(path: str, networks: Mapping[str, Any]) -> None:
    """Refuse a UNet that wants more than latents."""
    if "unet" not in networks or "vae" not in networks:
        return
    takes, given = networks["unet"].config.in_channels, networks["vae"].config.latent_channels
    if takes != given:
        raise DataError(
            f"{path}: its UNet takes {takes} channels, and its VAE makes latents of {given}",
            "Models for inpainting (9 channels) or editing (8) are not trained here. Use the "
            "checkpoint that it was made from.",
        )


def read_index(path: str, pipeline_class: str, revision: str | None = None) -> dict[str, Any]:
    """The `model_index.json` of a folder or Hub id, checked to be of the expected kind."""
    local = Path(path) / "model_index.json"
    if not Path(path).is_dir():
        local = _download_index(path, revision)
    elif not local.is_file():
        raise UserError(f"{path} is no diffusers folder", _where_else(Path(path)))
    index = _index_in(path, local)
    found = str(index.get("_class_name"))
    if found != pipeline_class:
        raise UserError(
            f"{path} holds a {found}, and model.family wants a {pipeline_class}",
            "Set model.family to the family of that checkpoint.",
        )
    return index


def _where_else(path: Path) -> str:
    """What to do about a folder that has no index: it may be a run or a checkpoint."""
    if (path / "model" / "model_index.json").is_file():
        return f"It is a run; its model is {path / 'model'}."
    if any((folder / "checkpoints").is_dir() for folder in (path, path.parent.parent)):
        return (
            "It is a run or a checkpoint; `sdtrain export` it first, with --format diffusers, and "
            "give that folder."
        )
    return "It has no model_index.json."


def read_class(path: Path) -> str:
    """The pipeline that a diffusers folder on this machine is for.

    Raises:
        DataError: its index is damaged.
    """
    return str(_index_in(str(path), path / "model_index.json").get("_class_name"))


def _index_in(path: str, file: Path) -> dict[str, Any]:
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: model_index.json cannot be read", str(error)) from None
    if not isinstance(index, dict):
        raise DataError(f"{path}: model_index.json is no object, but {type(index).__name__}")
    return index


def _download_index(path: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(path, "model_index.json", revision=revision))
    except (OSError, ValueError, HfHubHTTPError) as error:
        beside = Path(path).parent
        folders = [p.name for p in beside.iterdir() if p.is_dir()] if beside.is_dir() else []
        near = nearest(Path(path).name, folders)
        hint = f"Did you mean {beside / near}? " if near else ""
        raise UserError(
            f"model.path = {path!r} is neither a folder here nor a repository that can be read",
            f"{hint}The Hub said: {str(error).splitlines()[0]}",
        ) from None


def _load_network(path: str, part: str, class_name: str, where: Mapping[str, Any]) -> nn.Module:
    import diffusers
    import transformers
    from safetensors import SafetensorError

    loader = getattr(diffusers, class_name, None) or getattr(transformers, class_name)

    def load(variant: str | None) -> Any:
        with _no_progress_bars():
            return loader.from_pretrained(
                path,
                subfolder=part,
                use_safetensors=True,
                torch_dtype=torch.float32,
                output_loading_info=True,
                variant=variant,
                **where,
            )

    try:
        network, info = _whole_or_half(load, Path(path) / part)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = first_line(error)
        raise DataError(f"{path}: {part} cannot be loaded: {why}", _advice(path, part)) from None
    missing = [key for key in info["missing_keys"] if not key.endswith("position_ids")]
    if missing:
        raise DataError(
            f"{path}: {part} lacks {len(missing)} tensors, such as {sorted(missing)[0]}",
            "It would train from random weights. Use a complete checkpoint.",
        )
    return network.eval().requires_grad_(False)


def _advice(path: str, part: str) -> str:
    """What to do about a network that cannot be loaded, by what lies in its folder."""
    folder = Path(path) / part
    if not Path(path).is_dir():
        return "Try again; if it stays so, choose another repository."
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if not names:
        return f"There is nothing in {folder}. Use a complete folder."
    whole = [name for name in names if name.endswith(".safetensors")]
    found = f"{folder} holds {', '.join(names)}. "
    if not whole:
        return found + "Only .safetensors are read; convert it, or download those."
    if all(name.count(".") > 1 for name in whole):
        return found + f"Only the variant {HALF} is known; take `.variant` out of the names."
    return found + "Download them again."


def _whole_or_half(load: Callable[[str | None], Any], folder: Path) -> Any:
    """Weights without a variant, or where there are none those of `fp16`, which many have alone.

    Args:
        load: from a variant to a network.
        folder: of that network, if it is on this machine.
    """
    names = [path.name for path in folder.glob("*.safetensors")] if folder.is_dir() else []
    if names and all(f".{HALF}" in name for name in names):
        return load(HALF)
    try:
        return load(None)
    except OSError as error:
        if folder.is_dir():
            raise
        try:  # a repository cannot be looked into without asking for its list
            return load(HALF)
        except OSError:
            raise error from None


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Loading takes a bar per network, several a second with tiny models."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def load_tokenizer(path: str, name: str, where: Mapping[str, Any]) -> Any:
    """One tokenizer of a folder or Hub id.

    Raises:
        DataError: it is not there, or has no vocabulary.
    """
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder=name, **where)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {name} cannot be loaded", first_line(error)) from None
    if len(tokenizer) < _FEWEST_TOKENS:  # transformers 5 makes an empty one of an absent folder
        raise DataError(
            f"{path}: {name} has no vocabulary, only {len(tokenizer)} tokens",
            "It needs vocab.json and merges.txt, or tokenizer.json.",
        )
    return tokenizer


def load_scheduler(path: str, index: Mapping[str, Any], where: Mapping[str, Any]) -> Any:
    """The scheduler that a folder's or Hub id's index names.

    Raises:
        DataError: diffusers has no such class, or its configuration is not there.
    """
    import diffusers

    library, class_name = index.get("scheduler") or (None, None)
    loader = getattr(diffusers, class_name or "", None)
    if library != "diffusers" or loader is None:
        raise DataError(f"{path}: model_index.json names an unknown scheduler {class_name}")
    try:
        return loader.from_pretrained(path, subfolder="scheduler", **where)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: scheduler cannot be loaded", first_line(error)) from None


def copy_tokenizer(source: Path, target: Path, pad_token: str) -> None:
    """Lay the vocabulary that ships with the project beside a new model."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(source / name, target / name)
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad_token,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (target / "tokenizer_config.json").write_text(text, encoding="utf-8", newline="\n")
