"""Stored number formats, what is said about them, and what `check` says is left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdtrain.check import describe
from sdtrain.check_text import check_text
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import open_setup
from sdtrain.stored_formats import conflicts, stored_formats
from tests.train_data import prepared_row, write_prepared


def test_the_format_of_most_numbers_counts_and_variants_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    tensors = {"a": torch.zeros(100, dtype=torch.float16), "b": torch.zeros(3)}
    save_file(tensors, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    large = {"a": torch.zeros(9999)}
    save_file(large, tmp_path / "unet" / "diffusion_pytorch_model.fp32.safetensors")
    assert stored_formats(str(tmp_path), ["unet", "vae"]) == {"unet": "F16"}
    assert stored_formats("some/repository", ["unet"]) == {}


def test_single_files_are_told_apart_by_prefix(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors = {
        "model.diffusion_model.x": torch.zeros(4, dtype=torch.bfloat16),
        "first_stage_model.x": torch.zeros(4),
        "conditioner.embedders.1.model.x": torch.zeros(4, dtype=torch.float16),
        "v_pred": torch.zeros(0),
    }
    save_file(tensors, file)
    expected = {"unet": "BF16", "vae": "F32", "text_encoder_2": "F16"}
    assert stored_formats(str(file), []) == expected


def test_only_what_trains_and_the_vae_are_warned_of() -> None:
    assert conflicts({"unet": "F32", "text_encoder": "F16", "vae": "F32"}, ["unet"]) == []
    (half,) = conflicts({"unet": "F16", "vae": "F32"}, ["unet"])
    assert "unet (F16) is stored in half precision" in half
    (vae,) = conflicts({"unet": "F32", "vae": "BF16"}, ["unet"])
    assert "the VAE is stored as BF16" in vae


@pytest.mark.parametrize("limit", [None, 5])
def test_check_says_what_is_left_out(
    train_recipe: Callable[..., Path], tmp_path: Path, limit: int | None
) -> None:
    rows = [prepared_row(n) for n in range(7)]
    rows.append(prepared_row(7, size=(30, 30)))
    rows.append(prepared_row(8, caption="", captions=[]))
    data = write_prepared(tmp_path / "set", rows, policy={"mode": "caption", "dropout_p": 0.0})
    settings = ["prompt.max_chunks=1", *([] if limit is None else [f"data.limit={limit}"])]
    setup = open_setup(load_train_recipe(train_recipe(data=data), settings))
    found = describe(setup)
    beyond = 0 if limit is None else 3
    assert found["dropped"] == {"train": 1, "train beyond data.limit": beyond}
    said = check_text(found, setup.plan.table())
    assert "1 row of train" in said
    assert ("beyond data.limit" in said) == bool(beyond)
    assert "stored as: unet F32" in said
    assert "the recipe's [prompt] sets max_chunks" in " ".join(said.split())
    if limit is None:
        assert found["chunks"]["without_text"] == 1
        assert found["chunks"]["shortened"] == 2  # numbers 0 and 5 have long captions
        assert found["chunks"]["units_removed"] > 0


def test_check_says_nothing_is_left_out(train_recipe: Callable[..., Path]) -> None:
    setup = open_setup(load_train_recipe(train_recipe()))
    said = check_text(describe(setup), setup.plan.table())
    assert "left out\n  nothing; every row that is kept" in said
