"""Where a model comes from: a diffusers folder, the Hub, or a single file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sdprep.errors import UserError
from sdtrain.families._full_size import standard_scheduler, standard_tokenizers
from sdtrain.formats.diffusers import (
    Folder,
    load_folder,
    load_scheduler,
    load_tokenizer,
    read_index,
)
from sdtrain.formats.single_file import Blueprint, load_single_file
from sdtrain.formats.tensor_files import ENDINGS, is_single_file

Sizes = Mapping[str, Mapping[str, Any]]


def open_model_files(
    path: str,
    pipeline: str,
    parts: Mapping[str, str],
    sizes: Sizes,
    *,
    config: str | None = None,
    revision: str | None = None,
) -> Folder:
    """Load networks, tokenizers and noise schedule.

    Args:
        path: diffusers folder, Hub id or single file.
        pipeline: name of the diffusers pipeline.
        parts: name to class of every network.
        sizes: the published configuration of every network, for single files.
        config: diffusers folder whose configurations a single file has instead.
        revision: of a Hub id.

    Raises:
        UserError: there is no such model, or it is of another kind.
        DataError: its weights are incomplete.
    """
    if not is_single_file(path):
        if Path(path).is_file():
            raise UserError(
                f"model.path = {path!r} is a file whose name does not say what it is",
                f"Rename it to end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}.",
            )
        return load_folder(path, pipeline, parts, revision=revision)
    if revision is not None:
        raise UserError(f"model.revision = {revision!r}, but {path} is a single file")
    blueprint = _published(parts, sizes) if config is None else _as_in(config, pipeline, parts)
    return load_single_file(Path(path), pipeline, parts, blueprint)


def _published(parts: Mapping[str, str], sizes: Sizes) -> Blueprint:
    def build(part: str) -> nn.Module:
        loader = _class_of(parts[part])
        if not part.startswith("text_encoder"):
            return loader(**sizes[part])
        from transformers import CLIPTextConfig

        return loader(CLIPTextConfig(**sizes[part]))

    return Blueprint(build, standard_tokenizers(parts), standard_scheduler())


def _as_in(config: str, pipeline: str, parts: Mapping[str, str]) -> Blueprint:
    index = read_index(config, pipeline)

    def build(part: str) -> nn.Module:
        loader = _class_of(parts[part])
        if not part.startswith("text_encoder"):
            return loader.from_config(loader.load_config(config, subfolder=part))
        from transformers import CLIPTextConfig

        return loader(CLIPTextConfig.from_pretrained(config, subfolder=part))

    names = [p.replace("text_encoder", "tokenizer") for p in parts if p.startswith("text_encoder")]
    tokenizers = {name: load_tokenizer(config, name, {}) for name in names}
    return Blueprint(build, tokenizers, load_scheduler(config, index, {}))


def _class_of(name: str) -> Any:
    import diffusers
    import transformers

    return getattr(diffusers, name, None) or getattr(transformers, name)
