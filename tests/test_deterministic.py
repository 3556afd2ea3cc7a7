"""`precision.deterministic`: the same bits again, and a clear word where that cannot be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdprep.errors import UserError
from sdtrain import checkpoint, trainer
from sdtrain.deterministic import deterministic
from sdtrain.recipe import load_train_recipe

Recipe = Callable[..., Path]
IS_WANTED = "precision.deterministic=true"


def trained(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(checkpoint.checkpoints(path / "checkpoints")[-1]).trained


def run(path: Path, *settings: str) -> trainer.Outcome:
    return trainer.train(load_train_recipe(path, settings))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_inside_there_is_one_order_and_outside_all_is_as_it_was() -> None:
    def settings() -> tuple[bool, bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.deterministic,
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    before = settings()
    with deterministic(False):
        assert settings() == before
    with deterministic(True):
        assert settings() == (True, True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    assert settings() == before


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_cpu_ends_in_the_bytes_it_always_does(
    train_recipe: Recipe, tmp_path: Path, family: str
) -> None:
    run(train_recipe(family, output="plain"))
    run(train_recipe(family, output="told"), IS_WANTED)
    assert same(trained(tmp_path / "plain"), trained(tmp_path / "told"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_may_go_on_with_it(train_recipe: Recipe, tmp_path: Path) -> None:
    path = train_recipe()
    run(path, "train.samples=8")
    outcome = trainer.train(
        load_train_recipe(path, ["train.samples=12", IS_WANTED]), accept=["train.samples"]
    )
    assert outcome.is_finished


def test_what_has_no_such_kernel_is_named(
    train_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError(
            "upsample_bicubic2d_backward_out_cuda does not have a deterministic implementation, "
            "but you set 'torch.use_deterministic_algorithms(True)'."
        )

    monkeypatch.setattr(trainer, "take_step", refuse)
    with pytest.raises(UserError) as stop:
        run(train_recipe(), IS_WANTED)
    assert "upsample_bicubic2d_backward_out_cuda" in str(stop.value)
    assert "precision.deterministic = false" in str(stop.value)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("mixed", ["bf16", "fp16"])
def test_on_a_gpu_a_run_that_stopped_ends_in_the_same_bytes(
    train_recipe: Recipe, tmp_path: Path, family: str, mixed: str
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    settings = [IS_WANTED, "precision.device=cuda", f"precision.mixed={mixed}", "train.samples=24"]
    settings += ['train.rules=[{match="unet.**",lr=1e-3},{match="text_encoder.**",lr=1e-4}]']
    run(train_recipe(family, output="whole"), *settings)
    parts = train_recipe(family, output="parts")
    every = "checkpoint.every_samples=8"
    run(parts, *settings, every)
    for folder in checkpoint.checkpoints(tmp_path / "parts" / "checkpoints")[1:]:
        shutil.rmtree(folder)
    run(parts, *settings, every)
    assert same(trained(tmp_path / "whole"), trained(tmp_path / "parts"))
