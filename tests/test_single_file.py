"""Single files: the tensors, the names, the markers, and what is said when a file does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdprep.errors import DataError, UserError
from sdprep.plugins import config_for
from sdtrain.families import _full_size
from sdtrain.families._opening import _published
from sdtrain.families._sdxl import PARTS as SDXL_PARTS
from sdtrain.families.sd15 import PARTS as SD15_PARTS
from sdtrain.formats.single_file import DTYPES, single_file_tensors, write_single_file
from tests.test_adapters import predict
from tests.tiny import load_tiny

FAMILIES = ("sd15", "sdxl")


def shaken(folder: Path) -> Any:
    """A tiny model none of whose tensors equals another, so that swapped names show."""
    family = load_tiny(folder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in family.named_parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return family


def written(family: Any, path: Path, dtype: str = "fp32", **options: Any) -> Path:
    wanted = {"prediction_type": "epsilon", "is_zero_snr": False, **options}
    return write_single_file(path, single_file_tensors(family.parts, **wanted), DTYPES[dtype], {})


def opened(path: Path, folder: Path) -> Any:
    return config_for("family", folder.name)(config=str(folder)).build(str(path))


def changed_file(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(str(path))
    change(tensors)
    save_file(tensors, str(path))
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_is_the_same_bits(
    tiny_model: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    family = shaken(tiny_model(name))
    again = opened(written(family, tmp_path / "a model.safetensors"), tiny_model(name))
    found, wanted = dict(again.named_parameters()), dict(family.named_parameters())
    assert list(found) == list(wanted)
    for path, parameter in wanted.items():
        assert torch.equal(found[path], parameter), path
    assert torch.equal(predict(again), predict(family))
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    assert torch.equal(again.encode_images(pixels), family.encode_images(pixels))


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_reads_the_same_tensors(
    tiny_model: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    from diffusers.loaders import single_file_utils as theirs

    family = shaken(tiny_model(name))
    tensors = load_file(str(written(family, tmp_path / "a.safetensors")))
    parts = family.parts
    found = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(tensors), parts["unet"].config),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(tensors), parts["vae"].config),
        "text_encoder": theirs.convert_ldm_clip_checkpoint(dict(tensors)),
    }
    if name == "sdxl":
        found["text_encoder_2"] = theirs.convert_open_clip_checkpoint(
            parts["text_encoder_2"], dict(tensors), prefix="conditioner.embedders.1.model."
        )
    for path, parameter in family.named_parameters():
        part, _, rest = path.partition(".")
        got = found[part][rest]
        # diffusers turns the VAE's kernels into matrices later, when it fills the network.
        assert torch.equal(got.reshape(parameter.shape), parameter), path


@pytest.mark.parametrize(
    ("parts", "sizes", "counts"),
    [
        (SD15_PARTS, _full_size.SD15, {"model.": 686, "first_": 248, "cond_stage_model.": 197}),
        (
            SDXL_PARTS,
            _full_size.SDXL,
            {
                "model.": 1680,
                "first_": 248,
                "conditioner.embedders.0.transformer.text_model.": 197,
                "conditioner.embedders.1.model.": 390,
            },
        ),
    ],
)
def test_full_size_files_have_the_published_number_of_tensors(
    parts: dict[str, str], sizes: Any, counts: dict[str, int]
) -> None:
    build = _published(parts, sizes).build
    with torch.device("meta"):
        networks = {part: build(part) for part in parts}
        tensors = single_file_tensors(networks, prediction_type="epsilon", is_zero_snr=False)
    assert {p: sum(key.startswith(p) for key in tensors) for p in counts} == counts
    assert len(tensors) == sum(counts.values())
    attention = tensors["first_stage_model.decoder.mid.attn_1.q.weight"]
    assert attention.shape == (512, 512, 1, 1)
    if len(parts) == 4:
        second = "conditioner.embedders.1.model."
        assert tensors[f"{second}text_projection"].is_contiguous()
        block = f"{second}transformer.resblocks.31.attn.in_proj_weight"
        assert tensors[block].shape == (3840, 1280)
        assert "model.diffusion_model.output_blocks.2.2.conv.weight" in tensors
        assert "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight" in (
            tensors
        )


def test_files_of_others_are_read(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    family = shaken(tiny_model("sd15"))
    path = written(family, tmp_path / "half.safetensors", "fp16")

    def as_others_write(tensors: dict[str, torch.Tensor]) -> None:
        start = "cond_stage_model.transformer."
        for key in list(tensors):
            if key.startswith(f"{start}text_model."):
                tensors[key.replace("text_model.", "")] = tensors.pop(key)
            elif key.endswith("attn_1.q.weight"):
                tensors[key] = tensors[key][:, :, 0, 0].contiguous()
        tensors["model_ema.diffusion_modelout2bias"] = torch.ones(4)
        tensors["model_ema.decay"] = torch.tensor(0.9)
        tensors["alphas_cumprod"] = torch.ones(1000)

    again = opened(changed_file(path, as_others_write), tiny_model("sd15"))
    found = dict(again.named_parameters())
    for name, parameter in family.named_parameters():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], parameter.half().float()), name


def test_pickles_are_read_without_running_them(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    family = shaken(tiny_model("sd15"))
    tensors = load_file(str(written(family, tmp_path / "a.safetensors")))
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "a.ckpt")
    again = opened(tmp_path / "a.ckpt", tiny_model("sd15"))
    assert torch.equal(predict(again), predict(family))
    torch.save({"state_dict": tensors, "hook": Path.home}, tmp_path / "b.ckpt")
    with pytest.raises(DataError, match="more than tensors"):
        opened(tmp_path / "b.ckpt", tiny_model("sd15"))


@pytest.mark.parametrize("is_zero_snr", [False, True])
def test_v_prediction_is_marked_and_believed(
    tiny_model: Callable[[str], Path], tmp_path: Path, is_zero_snr: bool
) -> None:
    folder = tiny_model("sdxl")
    family = load_tiny(folder)
    plain = load_file(str(written(family, tmp_path / "e.safetensors", is_zero_snr=is_zero_snr)))
    assert not {"v_pred", "ztsnr"} & plain.keys()
    path = written(
        family, tmp_path / "v.safetensors", prediction_type="v_prediction", is_zero_snr=is_zero_snr
    )
    tensors = load_file(str(path))
    assert tensors["v_pred"].numel() == 0
    assert ("ztsnr" in tensors) is is_zero_snr
    again = opened(path, folder)
    assert again.prediction_type == "v_prediction"
    assert bool(torch.isneginf(again.logsnr(torch.tensor([0.9999])))) is is_zero_snr
    again.save(tmp_path / "folder")
    saved = json.loads((tmp_path / "folder/scheduler/scheduler_config.json").read_text())
    assert saved["prediction_type"] == "v_prediction"
    assert saved["rescale_betas_zero_snr"] is is_zero_snr
    assert (saved["timestep_spacing"] == "trailing") is is_zero_snr


def test_what_does_not_fit_is_named(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_model("sd15")
    path = written(load_tiny(folder), tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=r"looks like Stable Diffusion 1 .*sd15"):
        opened(path, tiny_model("sdxl"))
    changed_file(path, lambda t: t.update({"model.diffusion_model.hello": torch.ones(1)}))
    with pytest.raises(DataError) as unexpected:
        opened(path, folder)
    assert "unexpected 1 (model.diffusion_model.hello)" in unexpected.value.hint
    changed_file(path, lambda t: t.pop("model.diffusion_model.hello"))
    changed_file(path, lambda t: t.update({"model.diffusion_model.out.2.bias": torch.ones(7)}))
    with pytest.raises(DataError, match=r"out\.2\.bias gives \(7,\), unet has \(4,\)"):
        opened(path, folder)
    changed_file(path, lambda t: t.pop("model.diffusion_model.out.2.bias"))
    with pytest.raises(DataError) as missing:
        opened(path, folder)
    assert "missing 1 (model.diffusion_model.out.2.bias)" in missing.value.hint
    path.write_bytes(b"not a model")
    with pytest.raises(DataError, match="cannot be read"):
        opened(path, folder)
    with pytest.raises(UserError, match="single file"):
        config_for("family", "sd15")().build(str(path), revision="main")


def averaged_name(key: str) -> str:
    """As the first public code calls the average of a weight."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def test_averaged_weights_are_used_where_there_are_no_others_and_it_is_said(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = shaken(tiny_model("sd15"))
    path = written(family, tmp_path / "a.safetensors")
    raw = [key for key in load_file(str(path)) if key.startswith("model.diffusion_model.")]

    def add_averages(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({averaged_name(key): tensors[key] + 1 for key in raw})
        tensors["model_ema.decay"] = torch.tensor(0.9)

    both = opened(changed_file(path, add_averages), tiny_model("sd15"))
    assert f"its {len(raw) + 1} averaged (EMA) tensors under model_ema. are not" in (
        capsys.readouterr().err
    )
    assert torch.equal(predict(both), predict(family))

    alone = opened(
        changed_file(path, lambda tensors: [tensors.pop(key) for key in raw]), tiny_model("sd15")
    )
    assert "its averaged (EMA) weights are used" in capsys.readouterr().err
    found = dict(alone.named_parameters())
    for name, parameter in family.named_parameters():
        assert torch.equal(found[name], parameter + name.startswith("unet.")), name


def test_a_network_that_is_not_there_is_named_and_what_no_picture_needs_is_left_out(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model("sdxl")
    path = written(shaken(folder), tmp_path / "a.safetensors")
    more = ("first_stage_model.loss.logvar", "conditioner.embedders.1.model.visual.proj", "betas")
    changed_file(path, lambda t: t.update({key: torch.ones(1) for key in more}))
    opened(path, folder)
    said = " ".join(capsys.readouterr().err.split())
    assert all(key in said for key in more)

    def without_vae(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith("first_stage_model.")]:
            del tensors[key]

    with pytest.raises(DataError, match=r"has no VAE \(first_stage_model\.…\)"):
        opened(changed_file(path, without_vae), folder)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"state_dict": [1]}])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(DataError, match="not tensors by name"):
        config_for("family", "sd15")().build(str(tmp_path / "a.ckpt"))
