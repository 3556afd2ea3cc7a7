"""Memory of a step without taking the step: the peak is that of real tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sdtrain import activations, memory
from sdtrain.activations import Forward, working_bytes
from sdtrain.check import describe
from sdtrain.check_text import check_text
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import Setup, open_setup
from sdtrain.step import denoising_loss

Recipe = Callable[..., Path]
SMALL = Forward(height=64, width=96, samples=2, chunks=1, pictures=0, is_repeated=False)


def opened(path: Path, *settings: str) -> Setup:
    return open_setup(load_train_recipe(path, settings))


def test_what_was_let_go_of_no_longer_counts() -> None:
    with FakeTensorMode(), activations._Alive() as alive:
        first = torch.empty(1024)  # 4,096 bytes
        second = first + 1
        del first
        third = second.view(32, 32)  # the same storage
        assert alive.most == alive._now + 4096 == 8192
        del second, third
        assert alive._now == 0
        torch.empty(1)
        assert alive.most == 8192
        _ = torch.empty(2048, 2)
        assert alive.most == 16384


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_it_is_the_peak_of_real_tensors_and_leaves_no_trace(
    train_recipe: Recipe, family: str
) -> None:
    setup = opened(train_recipe(family))
    before = {
        name: p for part in setup.family.parts.values() for name, p in part.named_parameters()
    }
    found = working_bytes(setup.family, setup.loss(), SMALL)
    after = {name: p for part in setup.family.parts.values() for name, p in part.named_parameters()}
    assert all(after[name] is p and p.grad is None for name, p in before.items())
    batch = activations._batch(setup.family, SMALL, torch.device("cpu"))
    with activations._Alive() as alive:
        latents = torch.zeros(batch.noise.shape)
        batch = replace(batch, noise=torch.zeros(batch.noise.shape))
        denoising_loss(setup.family, batch, setup.loss(), latents=latents).mean().backward()
    assert found == pytest.approx(alive.most, rel=0.02)
    assert found > sum(p.numel() * 4 for p in setup.plan.trained().values())  # the gradients


def test_it_grows_with_what_takes_memory(train_recipe: Recipe) -> None:
    path = train_recipe("sdxl")
    setup = opened(path)
    trained = sum(p.numel() * 4 for p in setup.plan.trained().values())

    def peak(of: Setup = setup, **changed: int) -> int:
        return working_bytes(of.family, of.loss(), replace(SMALL, **changed))

    alone = peak()
    assert peak(samples=4) - trained > 1.6 * (alone - trained)
    assert peak(height=128) > alone
    assert peak(chunks=3) > alone
    assert peak(pictures=8, height=256, width=256) > peak(height=256, width=256)
    assert peak(is_repeated=True) >= alone
    saving = opened(path, "model.gradient_checkpointing=true")
    assert peak(saving, samples=8) < 0.7 * peak(samples=8)
    lora = opened(path, "adapter.type=lora", "adapter.rank=2")
    assert peak(lora) < alone


def test_check_says_it_and_what_it_is_for(train_recipe: Recipe) -> None:
    setup = opened(train_recipe(), "data.micro_batch_size=2", "data.batch_size=4")
    found = describe(setup)
    kept = found["memory"]
    assert kept["total"] == kept["total_without_activations"] + kept["activations"]
    assert kept["activations"] > 0
    assert kept["largest_forward"]["samples"] == 2
    assert kept["largest_forward"]["is_repeated"]
    assert kept["largest_forward"]["chunks"] == 3  # every fifth caption is long
    areas = [[int(side) for side in line["bucket"].split("x")] for line in found["buckets"]]
    largest = max(width * height for width, height in areas)
    forward = kept["largest_forward"]
    assert forward["width"] * forward["height"] == largest
    assert "the largest forward: 2 samples of" in check_text(found, "")
    found["device_bytes"] = kept["total"] - 1
    assert "WARNING: that does not fit" in check_text(found, "")
    found["device_bytes"] = kept["total"]
    assert "does not fit" not in check_text(found, "")


def test_a_model_that_looks_at_its_numbers_is_said_to_be_unknown(
    train_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*_: object) -> int:
        return int(torch.empty(1).item())

    monkeypatch.setattr(memory, "working_bytes", look)
    setup = opened(train_recipe())
    with FakeTensorMode():
        kept = memory.memory(setup, 1)
    assert kept["total"] is None
    found = {**describe(setup), "memory": kept}
    assert "activations come on top: unknown (DataDependentOutput" in check_text(found, "")
