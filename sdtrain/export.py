"""`sdtrain export`: what was trained, in the files that other programs open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from sdprep.errors import DataError, UserError
from sdprep.plugins import configs
from sdtrain import checkpoint
from sdtrain.course import meant
from sdtrain.formats.diffusers import read_class
from sdtrain.formats.lora_keys import write_diffusers, write_kohya
from sdtrain.formats.modelspec import modelspec, training_record, write_hash
from sdtrain.formats.schedulers import flow_notes, is_flow_folder
from sdtrain.formats.single_file import DTYPES, cast, single_file_tensors, write_single_file
from sdtrain.outputs import is_taken, require_folder, written_whole
from sdtrain.provenance import RECORD, read_provenance, write_record

Format = Literal["single-file", "diffusers", "lora-kohya", "lora-diffusers"]
Dtype = Literal["fp32", "fp16", "bf16"]
FORMATS = ("single-file", "diffusers", "lora-kohya", "lora-diffusers")
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass
class Opened:
    """What is to be exported.

    Args:
        path: checkpoint or diffusers folder.
        family: the model, with the adapter attached if there is one.
        made_at: when the checkpoint was written.
        adapter: how it was trained; None for a diffusers folder.
        state: the checkpoint's record, or what a diffusers folder has of one.
    """

    path: Path
    family: Any
    made_at: float
    adapter: Any = None
    state: Mapping[str, Any] = field(default_factory=dict)


def export(
    path: Path,
    form: str,
    to: Path,
    *,
    dtype: str = "fp32",
    title: str | None = None,
    about: Mapping[str, str] | None = None,
    ema: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint for other programs, as safetensors.

    Args:
        path: a checkpoint of a run, a run folder for its newest, or a diffusers folder.
        form: one of `FORMATS`; an adapter is merged for the first two.
        to: file or folder to make; nothing may be there yet.
        dtype: `fp32`, `fp16` or `bf16`.
        title: name of the model in the file; default: the name of `to`.
        about: more ModelSpec entries, such as `author`.
        ema: whether the checkpoint's averaged weights are written.

    Returns:
        path, format, dtype, samples_seen and bytes.

    Raises:
        UserError: something is there already, or an adapter is asked of what has none, or has no
            spelling in that format.
        DataError: the checkpoint cannot be read, holds no average that was asked for, or does not
            fit the precision.
    """
    if form not in FORMATS or dtype not in DTYPES:
        raise UserError(
            f"--format {form} --dtype {dtype} is not known",
            f"Formats: {', '.join(FORMATS)}; dtypes: {', '.join(DTYPES)}.",
        )
    target = _target(form, to)
    opened = _open(path, ema)
    if form.startswith("lora"):
        _write_lora(opened, form, target, dtype, title or to.stem, about)
    else:
        if opened.adapter is not None:
            opened.adapter.merge(opened.family)
        if form == "diffusers":
            _write_folder(opened, target, dtype)
        else:
            _write_single(opened, target, dtype, title or to.stem, about)
    written = [target] if target.is_file() else [p for p in target.rglob("*") if p.is_file()]
    return {
        "path": str(target),
        "format": form,
        "dtype": dtype,
        "samples_seen": opened.state.get("samples_seen"),
        "ema": ema,
        "bytes": sum(each.stat().st_size for each in written),
    }


def _target(form: str, to: Path) -> Path:
    """Where the file or folder goes."""
    is_file = to.suffix == ".safetensors"
    if form == "diffusers" and is_file:
        raise UserError(f"--to {to} names a file, and the format diffusers is a folder")
    if form in ("single-file", "lora-kohya") and not is_file:
        raise UserError(f"--to {to}: the format {form} is one file; end it in .safetensors")
    target = to if is_file or form == "diffusers" else to / LORA_FILE
    if is_taken(target):
        raise UserError(f"{target} is there already", "Delete it first, or name another place.")
    require_folder(target if form == "diffusers" else target.parent)
    return target


def _open(path: Path, ema: bool) -> Opened:
    path = meant(path)
    index = path / "model_index.json"
    if index.is_file():
        if ema:
            raise UserError(f"--ema: {path} is a diffusers folder; only checkpoints hold averages")
        record = read_provenance(path).record  # also of the folder that a run ends with
        return Opened(path, _family_of(path), index.stat().st_mtime, state=record)
    from sdprep.recipe import validate
    from sdtrain.recipe import TrainRecipe
    from sdtrain.run import load_trained
    from sdtrain.sampling import checkpoint_folder
    from sdtrain.setup import open_model

    if path.is_file():
        raise DataError(f"{path} is a file", "Give a checkpoint, a run or a diffusers folder.")
    found = checkpoint_folder(path)
    state = checkpoint.read_state(found)
    recipe = validate(state["recipe"], TrainRecipe, str(found / checkpoint.STATE))
    family, adapter, _, plan = open_model(recipe, torch.device("cpu"))
    load_trained(plan, checkpoint.read_weights(found, ema=ema))
    made_at = (found / checkpoint.STATE).stat().st_mtime
    return Opened(found, family, made_at, adapter, state)


def _family_of(path: Path) -> Any:
    """The family whose pipeline a diffusers folder names."""
    wanted = read_class(path)
    is_flow = is_flow_folder(path)
    for config in configs("family").values():
        known: Any = config
        if known.pipeline == wanted and getattr(known, "is_flow", False) == is_flow:
            return known().build(str(path))
    what = f"{wanted} of flow matching" if is_flow else wanted
    raise UserError(f"{path} holds a {what}", f"Known here: {', '.join(configs('family'))}.")


# --- writing -------------------------------------------------------------------------------------


def _spec(opened: Opened, title: str, about: Any, *, is_adapter: bool) -> dict[str, str]:
    family = opened.family
    spec = modelspec(
        family.folder.pipeline_class,
        title=title,
        date=datetime.fromtimestamp(opened.made_at, UTC).isoformat(timespec="seconds"),
        resolution_px=family.default_resolution_px,
        prediction_type=family.prediction_type,
        about=about,
        is_adapter=is_adapter,
    )
    notes = flow_notes(family.folder.scheduler)
    return {**spec, **notes, **training_record(opened.state)}


def _write_single(opened: Opened, target: Path, dtype: str, title: str, about: Any) -> None:
    family = opened.family
    tensors = single_file_tensors(
        family.parts,
        prediction_type=family.prediction_type,
        is_zero_snr=bool(family.folder.scheduler.config.get("rescale_betas_zero_snr", False)),
    )
    spec = _spec(opened, title, about, is_adapter=False)
    write_single_file(target, tensors, DTYPES[dtype], spec)


def _write_folder(opened: Opened, target: Path, dtype: str) -> None:
    for part, network in opened.family.parts.items():
        for name, parameter in network.named_parameters():
            parameter.data = cast(f"{part}.{name}", parameter.data, DTYPES[dtype])
    with written_whole(target) as scratch:
        opened.family.save(scratch)
        if record := {key: opened.state[key] for key in RECORD if key in opened.state}:
            write_record(scratch, record)


def _write_lora(
    opened: Opened, form: str, target: Path, dtype: str, title: str, about: Any
) -> None:
    if opened.adapter is None:
        raise UserError(
            f"{opened.path} holds no adapter, so --format {form} has nothing to write",
            "Export it as single-file or diffusers.",
        )
    is_kohya = form == "lora-kohya"
    found = opened.adapter.kohya_tensors() if is_kohya else opened.adapter.diffusers_tensors()
    modules = {
        module: {end: _cast(f"{module}.{end}", tensor, dtype) for end, tensor in ends.items()}
        for module, ends in found.items()
    }
    spec = _spec(opened, title, about, is_adapter=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(target) as scratch:
        if is_kohya:
            write_kohya(scratch, modules, opened.family, spec)
        else:
            write_diffusers(scratch, modules, spec)
        write_hash(scratch)


def _cast(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """Scalars such as alpha, and flags, stay as they are."""
    if not tensor.dim() or not tensor.is_floating_point():
        return tensor
    return cast(name, tensor.detach(), DTYPES[dtype])
