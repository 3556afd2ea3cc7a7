"""Files of tensors: whatever they are called, and readable by all who may read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdprep.errors import DataError, UserError
from sdprep.plugins import config_for
from sdtrain.checkpoint import OPTIMIZER, TRAINED, Snapshot, _write_files
from sdtrain.formats.single_file import write_single_file
from sdtrain.formats.tensor_files import is_single_file, read_tensors
from sdtrain.stored_formats import model_files, stored_formats

KEY = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write_single_file(tmp_path / "a.safetensors", {KEY: torch.ones(3)}, torch.float16, {})


def rights(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
def test_others_may_read_what_they_may_read_beside_it(
    tiny_model: Callable[[str], Path], tmp_path: Path, written: Path
) -> None:
    (tmp_path / "beside").touch()
    wanted = rights(tmp_path / "beside")
    assert rights(written) == wanted
    folder = tmp_path / "model"
    config_for("family", "sd15")().build(str(tiny_model("sd15"))).save(folder)
    assert {rights(file) for file in folder.rglob("*") if file.is_file()} == {wanted}
    (tmp_path / "checkpoint").mkdir()
    _write_files(tmp_path / "checkpoint", Snapshot({}, {"a": torch.ones(1)}, {"b": torch.ones(1)}))
    assert {rights(tmp_path / "checkpoint" / name) for name in (TRAINED, OPTIMIZER)} == {wanted}


def test_a_file_is_what_is_in_it(tmp_path: Path, written: Path) -> None:
    as_checkpoint = Path(shutil.copy(written, tmp_path / "b.ckpt"))
    assert read_tensors(as_checkpoint)[0][KEY].tolist() == [1, 1, 1]
    assert stored_formats(str(as_checkpoint), ["unet"]) == {"unet": "F16"}
    pickled = tmp_path / "c.safetensors"
    torch.save({"state_dict": load_file(written)}, tmp_path / "c.ckpt")
    shutil.copy(tmp_path / "c.ckpt", pickled)
    assert read_tensors(pickled)[0][KEY].tolist() == [1, 1, 1]
    assert stored_formats(str(pickled), ["unet"]) == {}
    upper = Path(shutil.copy(written, tmp_path / "D.SAFETENSORS"))
    assert is_single_file(str(upper))
    assert model_files(str(upper), [])
    assert read_tensors(upper)[0][KEY].tolist() == [1, 1, 1]


def test_a_file_of_another_name_is_not_looked_for_on_the_hub(written: Path) -> None:
    named = written.rename(written.with_suffix(".pt"))
    with pytest.raises(UserError, match=r"a\.pt.*(\n.*)*end in \.safetensors, \.ckpt or \.bin"):
        config_for("family", "sd15")().build(str(named))


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (b"", "cut off"),
        (b"\x90\x01\0\0\0\0\0\0{", "cut off"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
    ],
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_what_to_do_about_no_model_at_all(
    tmp_path: Path, content: bytes, advice: str, name: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*(\n.*)*{advice}"):
        read_tensors(tmp_path / name)


def test_a_model_for_inpainting_is_called_so(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from tests.test_single_file import opened, shaken
    from tests.test_single_file import written as write

    folder = tiny_model("sd15")
    file = write(shaken(folder), tmp_path / "inpaint.safetensors")
    tensors = load_file(file)
    tensors[KEY] = torch.cat([tensors[KEY], torch.zeros(len(tensors[KEY]), 5, 3, 3)], dim=1)
    save_file(tensors, file)
    with pytest.raises(DataError, match=r"inpaint.*9, 3, 3(.|\n)*models for inpainting"):
        opened(file, folder)
