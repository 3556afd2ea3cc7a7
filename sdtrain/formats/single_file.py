"""Single files of Stable Diffusion, as ComfyUI and A1111 read them: written and read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdprep.console import say, warn
from sdprep.errors import DataError
from sdtrain.formats import single_file_keys as keys
from sdtrain.formats.diffusers import Folder
from sdtrain.formats.modelspec import HASH, write_hash
from sdtrain.formats.schedulers import FLOW_SHIFT, flow_scheduler
from sdtrain.formats.spelling import pieces, plain_key
from sdtrain.formats.tensor_files import read_tensors, save_tensors
from sdtrain.outputs import written_whole
from sdtrain.paths import canonical_path, is_adapter

V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
AVERAGED = "model_ema."
_NETWORKS = {
    keys.UNET: "UNet",
    keys.VAE: "VAE",
    keys.ONE_ENCODER: "text encoder",
    keys.FIRST_ENCODER: "first text encoder",
    keys.SECOND_ENCODER: "second text encoder",
}
_SHOWN = 5
A_LORA = "a LoRA"
_SIZES = "model.config names a folder with the file's sizes."
_INPAINTING = (
    "Its UNet takes more channels than latents have, as models for inpainting or editing do, "
    "which are not trained here. Use the checkpoint that it was made from."
)


# --- writing -------------------------------------------------------------------------------------


def single_file_tensors(
    networks: Mapping[str, nn.Module], *, prediction_type: str, is_zero_snr: bool
) -> dict[str, Tensor]:
    """All tensors of a model under the names of a single file, in the networks' own precision.

    Args:
        networks: `unet`, `vae`, `text_encoder` and perhaps `text_encoder_2`, no adapter attached.
        prediction_type: a file of `v_prediction` gets the empty tensor `v_pred`.
        is_zero_snr: such a file gets `ztsnr` too, if the noise schedule ends without signal.
    """
    two = "text_encoder_2" in networks
    made: dict[str, Tensor] = {}
    for part, network in networks.items():
        state = _canonical_state(part, network)
        names = [path.removeprefix(f"{part}.") for path in state]
        for entry in keys.entries(part, names, _config(network), two=two):
            made[entry.key] = _join([state[source] for source in entry.sources], entry.layout)
    first = keys.FIRST_ENCODER if two else keys.ONE_ENCODER
    positions = len(made[f"{first}text_model.embeddings.position_embedding.weight"])
    made[f"{first}text_model.embeddings.position_ids"] = torch.arange(positions)[None]
    if two:
        # Not used for images; OpenCLIP's loaders look for it. It was trained to its limit, ln 100.
        made[f"{keys.SECOND_ENCODER}logit_scale"] = torch.tensor(math.log(100.0))
    if prediction_type == "v_prediction":
        made[V_MARKER] = torch.tensor([])
        if is_zero_snr:
            made[ZERO_SNR_MARKER] = torch.tensor([])
    return made


def _canonical_state(part: str, network: nn.Module) -> dict[str, Tensor]:
    state = {
        canonical_path(part, network, name): tensor.detach()
        for name, tensor in network.state_dict().items()
        if not name.endswith("position_ids")
    }
    live = [name for name in state if is_adapter(name)]
    assert not live, f"{part} has an adapter attached: merge it before writing"
    return state


def _config(network: Any) -> Mapping[str, Any]:
    inner = getattr(network, "_orig_mod", network)
    config = getattr(inner, "module", inner).config
    return config if isinstance(config, Mapping) else {}


def _join(tensors: list[Tensor], layout: keys.Layout) -> Tensor:
    if layout == "rows":
        return torch.cat(tensors)
    (tensor,) = tensors
    if layout == "kernel":
        return tensor[:, :, None, None]
    return tensor.t().contiguous() if layout == "transposed" else tensor


def write_single_file(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, metadata: Mapping[str, str]
) -> Path:
    """Write a single file whole or not at all.

    Args:
        path: the file to make.
        tensors: of `single_file_tensors`.
        dtype: of all floating-point tensors.
        metadata: of `modelspec`; the hash of the tensors is filled in.

    Raises:
        DataError: a number does not fit the precision.
    """
    made = {key: cast(key, tensor, dtype) for key, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as scratch:
        save_tensors(scratch, made, metadata)
        if HASH in metadata:
            write_hash(scratch)
    return path


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another precision, on the CPU and in a memory of its own.

    Raises:
        DataError: a finite number becomes infinite.
    """
    tensor = tensor.to("cpu")
    if not tensor.is_floating_point():
        return tensor.contiguous()
    made = tensor.to(dtype).clone(memory_format=torch.contiguous_format)
    if torch.isinf(made).any() and not torch.isinf(tensor).any():
        largest = float(tensor.abs().max())
        raise DataError(
            f"{name} holds {largest:g}, which is beyond {dtype}", "Choose --dtype bf16 or fp32."
        )
    return made


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blueprint:
    """What a single file does not say about itself.

    Args:
        build: makes a part's network; called on the meta device.
        tokenizers: by name.
        scheduler: the noise schedule, before the file's markers.
    """

    build: Callable[[str], nn.Module]
    tokenizers: dict[str, Any]
    scheduler: Any


def load_single_file(
    path: Path, pipeline_class: str, parts: Mapping[str, str], blueprint: Blueprint
) -> Folder:
    """Load a single file in float32; averaged (EMA) weights only where there are no others.

    Args:
        path: the file.
        pipeline_class: diffusers' name of the architecture.
        parts: names of the networks.
        blueprint: their sizes.

    Raises:
        UserError: there is no such file, or it holds another kind of model.
        DataError: tensors are missing, unexpected or of another shape.
    """
    found, metadata = read_tensors(path)
    tensors = {plain_key(str(key)): tensor for key, tensor in found.items()}
    with torch.device("meta"):
        networks = {part: blueprint.build(part) for part in parts}
    two = "text_encoder_2" in parts
    wanted: dict[str, keys.Entry] = {}
    for part, network in networks.items():
        names = [path.removeprefix(f"{part}.") for path in _canonical_state(part, network)]
        wanted |= {e.key: e for e in keys.entries(part, names, _config(network), two=two)}
    tensors = _raw_or_averaged(path, tensors, wanted)
    _refuse_other_names(path, tensors, wanted)
    for part, network in networks.items():
        _fill(path, part, network, tensors, wanted)
    scheduler = _marked(path, blueprint.scheduler, tensors, metadata)
    return Folder(pipeline_class, networks, dict(blueprint.tokenizers), scheduler, {})


def _raw_or_averaged(
    path: Path, tensors: dict[str, Tensor], wanted: Mapping[str, keys.Entry]
) -> dict[str, Tensor]:
    """The UNet's own weights, or where a file has only their average (EMA) that; it says which."""
    averaged = [key for key in tensors if key.startswith(AVERAGED)]
    if not averaged:
        return tensors
    if any(key.startswith(keys.UNET) for key in tensors):
        say(
            f"{path.name}: the weights under {keys.UNET} are used, its {len(averaged):,} averaged "
            f"(EMA) tensors under {AVERAGED} are not"
        )
        return tensors
    # An average has the key of its weight, less `model.` and all dots.
    own = {AVERAGED + k.removeprefix("model.").replace(".", ""): k for k in wanted}
    say(f"{path.name}: its averaged (EMA) weights are used, there are no others")
    return {own.get(key, key): tensor for key, tensor in tensors.items()}


def _refuse_other_names(
    path: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, keys.Entry]
) -> None:
    missing = [key for key in wanted if key not in tensors]
    others = [k for k in tensors if k not in wanted and not k.endswith(keys.OPTIONAL)]
    known = {_place(key) for key in wanted}
    # A UNet with more in it is another UNet; the other networks may carry what no picture needs.
    unexpected = [key for key in others if key.startswith(keys.UNET) or _place(key) in known]
    kind = looks_like(tensors)
    absent = _absent_networks(tensors, wanted)
    if absent and not unexpected and all(key.startswith(tuple(absent)) for key in missing):
        lacks = " and no ".join(f"{words} ({prefix}…)" for prefix, words in absent.items())
        raise DataError(
            f"{path} has no {lacks}"
            + ("" if kind.endswith("alone") else f"; it looks like {kind}"),
            "Use a complete checkpoint, one that was saved with all of its networks.",
        )
    if len(missing) == len(wanted) and kind == A_LORA:
        raise DataError(
            f"{path} is a LoRA or another adapter, not a model",
            "model.path is the model that it was made for. `sdtrain validate` takes both.",
        )
    if missing or unexpected:
        raise DataError(
            f"{path} does not fit this model; it looks like {kind}",
            f"missing {_some(missing)}; unexpected {_some(unexpected)}. "
            "Set model.family to what it is; model.config names a folder with other sizes.",
        )
    markers = (V_MARKER, ZERO_SNR_MARKER)
    if unused := [k for k in others if not k.startswith(AVERAGED) and k not in markers]:
        warn(f"{path}: not used are {_some(unused)}")


def _place(key: str) -> str:
    """The network that a key belongs to, with the first word below it; nothing for other keys."""
    prefix = next(filter(key.startswith, _NETWORKS), "")
    return prefix and prefix + key.removeprefix(prefix).partition(".")[0]


def _absent_networks(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, keys.Entry]
) -> dict[str, str]:
    """Networks of which a file has nothing, by their prefix; none if it has nothing at all."""

    def has(names: Iterable[str], prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    asked = {prefix: words for prefix, words in _NETWORKS.items() if has(wanted, prefix)}
    absent = {prefix: words for prefix, words in asked.items() if not has(tensors, prefix)}
    return absent if len(absent) < len(asked) else {}


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    more = ", …" if len(names) > _SHOWN else ""
    return f"{len(names):,} ({', '.join(sorted(names)[:_SHOWN])}{more})"


def looks_like(tensors: Mapping[str, Tensor]) -> str:
    """What kind of file it is, by its names."""
    kinds = (
        ("lora", A_LORA),
        (keys.SECOND_ENCODER, "Stable Diffusion XL (family sdxl)"),
        ("conditioner.embedders.0.model.", "the refiner of Stable Diffusion XL"),
        ("cond_stage_model.model.", "Stable Diffusion 2"),
        (keys.ONE_ENCODER, "Stable Diffusion 1 (family sd15)"),
        ("joint_blocks.", "Stable Diffusion 3"),
        ("double_blocks.", "FLUX"),
        ("down_blocks.", "a single network of a diffusers folder"),
        (keys.UNET, "a UNet alone"),
        (keys.VAE, "a VAE alone"),
    )
    for words, kind in kinds:
        if any(words in key for key in tensors):
            return kind
    return "no kind of model that is known here"


def _fill(
    path: Path,
    part: str,
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, keys.Entry],
) -> None:
    """Give a network of the meta device its weights.

    Raises:
        DataError: a shape differs.
    """
    live = {canonical_path(part, network, name): name for name in network.state_dict()}
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    state: dict[str, Tensor] = {}
    for key, entry in wanted.items():
        if not entry.sources[0].startswith(f"{part}."):
            continue
        names = [live[source] for source in entry.sources]
        found = pieces(tensors[key], entry)
        for name, piece in zip(names, found, strict=True):
            if piece.numel() != shapes[name].numel() or piece.squeeze().shape != _bare(
                shapes[name]
            ):
                raise DataError(
                    f"{path}: {key} gives {tuple(piece.shape)}, {part} has {tuple(shapes[name])}",
                    f"The file looks like {looks_like(tensors)}, but of other sizes. "
                    + (_INPAINTING if _is_inpainting(key, tensors[key], shapes[name]) else _SIZES),
                )
            # A 1 by 1 convolution and a matrix are the same numbers; files have either.
            whole = piece.to(torch.float32).reshape(shapes[name])
            state[name] = whole.clone(memory_format=torch.contiguous_format)
    network.load_state_dict(state, strict=True, assign=True)
    for name, buffer in network.named_buffers():
        assert name.endswith("position_ids"), f"{name} has no value"
        place, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(place), leaf, torch.arange(buffer.shape[-1])[None])
    network.eval().requires_grad_(False)


def _is_inpainting(key: str, tensor: Tensor, wanted: torch.Size) -> bool:
    """Whether only the number of channels that go in differs: inpainting has 9, editing 8."""
    is_first = key == f"{keys.UNET}input_blocks.0.0.weight" and tensor.dim() == len(wanted)
    return is_first and tensor.shape[1] > wanted[1] and tensor.shape[0] == wanted[0]


def _bare(shape: torch.Size) -> torch.Size:
    return torch.Size(side for side in shape if side != 1)


def _marked(
    path: Path, scheduler: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Any:
    """The noise schedule with what the file says about prediction."""
    if metadata.get("modelspec.prediction_type") == "flow":
        return flow_scheduler(float(metadata.get(FLOW_SHIFT, 1)))
    is_v = V_MARKER in tensors or metadata.get("modelspec.prediction_type", "").startswith("v")
    if not is_v:
        if ZERO_SNR_MARKER in tensors:
            warn(f"{path} has ztsnr but not v_pred; zero-terminal SNR needs v-prediction: ignored")
        return scheduler
    options: dict[str, Any] = {"prediction_type": "v_prediction"}
    if ZERO_SNR_MARKER in tensors:
        options |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return type(scheduler).from_config(scheduler.config, **options)
