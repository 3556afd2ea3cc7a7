"""Keyed noise and stratified noise levels."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdtrain.noise import independent_u, noise_for, stratified_u

DRAW = (
    "from sdtrain.noise import noise_for, stratified_u;"
    "print(noise_for(3, 'noise', 'é x', 2, (4, 8, 8)).double().sum().item(),"
    "stratified_u(3, 100, 5).tolist())"
)


def test_noise_is_keyed_by_everything_and_nothing_else() -> None:
    shape = (4, 8, 8)
    base = noise_for(1, "noise", "a", 0, shape)
    assert base.dtype == torch.float32
    assert base.shape == shape
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(noise_for(1, "noise", "a", 0, shape), base)
    assert torch.equal(torch.get_rng_state(), before)
    others = [(2, "noise", "a", 0), (1, "validation", "a", 0), (1, "noise", "b", 0)]
    others += [(1, "noise", "a", 1)]
    for seed, purpose, sample, visit in others:
        assert not torch.equal(noise_for(seed, purpose, sample, visit, shape), base)


def test_noise_is_standard_normal() -> None:
    draws = torch.stack([noise_for(0, "noise", str(i), 0, (4, 16, 16)) for i in range(64)])
    assert abs(float(draws.mean())) < 4 / draws.numel() ** 0.5
    assert float(draws.std()) == pytest.approx(1, abs=0.01)
    flat = draws.flatten(1)
    correlation = (flat @ flat.T / flat.shape[1]).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 6 / flat.shape[1] ** 0.5


def test_draws_are_the_same_in_another_process_with_another_hash_seed() -> None:
    def run(hash_seed: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", DRAW],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1", "PATH": ""},
        ).stdout

    assert run("1") == run("2")


@given(st.integers(0, 2**63), st.integers(0, 10**12), st.integers(1, 200))
def test_every_stratum_gets_one_level(seed: int, samples_seen: int, batch_size: int) -> None:
    u = stratified_u(seed, samples_seen, batch_size)
    assert u.dtype == torch.float64
    assert u.shape == (batch_size,)
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert sorted(np.floor(u.numpy() * batch_size).astype(int)) == list(range(batch_size))
    assert torch.equal(stratified_u(seed, samples_seen, batch_size), u)


def test_levels_differ_between_steps_and_are_uniform() -> None:
    steps = torch.stack([stratified_u(0, 4 * step, 4) for step in range(2000)])
    assert not torch.equal(steps[0], steps[1])
    for slot in range(4):  # no slot is tied to a stratum
        counts = torch.histc(steps[:, slot].float(), 10, 0, 1)
        assert float((counts - 200).abs().max()) < 5 * 200**0.5


def test_stratified_levels_share_the_loss_out_more_evenly_than_independent_ones() -> None:
    """The variance of a step's loss over four samples, by spec/train.md: x 0.22."""

    def loss(u: torch.Tensor) -> torch.Tensor:
        return torch.exp(-4 * u)  # steep in the noise level, as real losses are

    stratified = torch.stack([loss(stratified_u(1, 4 * k, 4)).mean() for k in range(4000)])
    independent = torch.stack([loss(independent_u(1, 4 * k, 4)).mean() for k in range(4000)])
    assert float(stratified.var() / independent.var()) < 0.25
    assert float(stratified.mean()) == pytest.approx((1 - np.exp(-4)) / 4, rel=0.01)
