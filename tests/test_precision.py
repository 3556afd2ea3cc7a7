"""Weights in bfloat16: small steps arrive, a stop changes nothing, nonsense is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdprep.errors import RecipeError, UserError
from sdprep.plugins import config_for
from sdtrain import checkpoint, trainer
from sdtrain.check import check
from sdtrain.precision import Rounding, round_by_chance, seen_as_float32
from sdtrain.recipe import load_train_recipe
from sdtrain.run import Run
from sdtrain.run_folder import RunFolder
from sdtrain.setup import open_setup
from sdtrain.trackers.jsonl import read_metrics

torch.set_num_threads(1)

Recipe = Callable[..., Path]
PURE = ("precision.mixed=bf16", "precision.parameters=bf16")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rounding_by_chance_is_right_on_average_and_leaves_what_fits() -> None:
    upper, lower = torch.tensor(1.0 + 2**-7), torch.tensor(1.0)  # neighbours in bfloat16
    values = (lower + 0.3 * (upper - lower)).expand(20_000)
    rounded = round_by_chance(values, generator(0))
    assert rounded.dtype == torch.bfloat16
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert float((rounded.float() > 1).float().mean()) == pytest.approx(0.3, abs=0.015)
    negative = round_by_chance(-values, generator(0))
    assert torch.equal(negative, -rounded)
    fitting = torch.tensor([0.0, -0.0, 1.5, -3.0, 2.0**-130, 1e30]).bfloat16().float()
    for seed in range(20):
        assert torch.equal(round_by_chance(fitting, generator(seed)).float(), fitting)
    odd = torch.tensor([float("inf"), float("-inf"), float("nan")])
    bits = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # another NaN
    again = round_by_chance(torch.cat([odd, bits]), generator(1)).float()
    assert again[0] == float("inf")
    assert again[1] == float("-inf")
    assert again[2:].isnan().all()
    grid = round_by_chance(torch.zeros(3, 4).t(), generator(0))  # not contiguous
    assert grid.shape == (4, 3)


@pytest.mark.parametrize("rule", ["nearest", "stochastic", "kahan"])
def test_small_steps_are_lost_to_nearest_and_arrive_otherwise(rule: str) -> None:
    parameter = torch.nn.Parameter(torch.full((2000,), 1.0, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=2e-4)
    rounding = None if rule == "nearest" else Rounding(rule, 7, {"w": parameter})  # type: ignore[arg-type]
    for step in range(100):
        parameter.grad = torch.ones_like(parameter)
        if rounding is None:
            optimizer.step()
            optimizer.zero_grad()
        else:
            rounding.step(optimizer, 4 * step)
            assert parameter.grad is None
    assert parameter.dtype == torch.bfloat16
    mean = float(parameter.detach().float().mean())
    if rule == "nearest":
        assert mean == 1.0
    elif rule == "stochastic":
        assert mean == pytest.approx(0.98, abs=5e-4)
    else:
        assert rounding is not None
        whole = parameter.detach().float() + rounding.left_over["w"].float()
        assert mean == pytest.approx(0.98, abs=2**-9)
        assert float(whole.mean()) == pytest.approx(0.98, abs=2e-4)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd", "muon", "lion", "came"])
def test_optimizers_see_float32_and_take_the_steps_that_they_take_in_it(name: str) -> None:
    needs = {"lion": "bitsandbytes", "came": "came_pytorch"}.get(name)
    if needs:
        pytest.importorskip(needs)
    shapes = {"a": (8, 16), "b": (5,), "c": (4, 4, 3, 3)}
    narrow, wide = (
        {
            path: torch.nn.Parameter(torch.randn(shape, generator=generator(1)).bfloat16().to(kind))
            for path, shape in shapes.items()
        }
        for kind in (torch.bfloat16, torch.float32)
    )
    mine, theirs = (
        config_for("optimizer", name)().build(
            [{"params": list(p.values()), "lr": 1e-3, "name": "all"}]
        )
        for p in (narrow, wide)
    )
    rounding = Rounding("kahan", 0, narrow)
    for step in range(5):
        for path, shape in shapes.items():
            gradient = torch.randn(shape, generator=generator(10 + step)).bfloat16()
            narrow[path].grad, wide[path].grad = gradient, gradient.float()
        rounding.step(mine, step)
        theirs.step()
    for path in shapes:
        whole = narrow[path].detach().float() + rounding.left_over[path].float()
        torch.testing.assert_close(whole, wide[path].detach(), rtol=2e-5, atol=2e-6)
        for value in mine.state[narrow[path]].values():
            assert not isinstance(value, torch.Tensor) or value.dtype == torch.float32


def test_a_draw_depends_on_seed_clock_and_name_not_on_its_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stepped(seed: int, clock: int, portion: int) -> list[torch.Tensor]:
        monkeypatch.setattr("sdtrain.precision.MOST_WIDENED", portion)
        trained = {n: torch.nn.Parameter(torch.ones(50).bfloat16()) for n in ("a", "b", "c")}
        optimizer = torch.optim.SGD(list(trained.values()), lr=1e-3)
        for parameter in trained.values():
            parameter.grad = torch.ones_like(parameter)
        Rounding("stochastic", seed, trained).step(optimizer, clock)
        return [p.detach() for p in trained.values()]

    first = stepped(1, 8, 2**26)
    assert all(map(torch.equal, first, stepped(1, 8, 60)))
    assert all(map(torch.equal, first, stepped(1, 8, 1)))
    assert not torch.equal(first[0], first[1])
    assert not any(map(torch.equal, first, stepped(1, 12, 60)))
    assert not any(map(torch.equal, first, stepped(2, 8, 60)))


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_a_run_in_bfloat16_goes_on_exactly(train_recipe: Recipe, rounding: str) -> None:
    path = train_recipe()
    overrides = [*PURE, f"precision.rounding={rounding}", "train.samples=12"]
    overrides += ["checkpoint.every_samples=4"]
    trainer.train(load_train_recipe(path, overrides))
    folder = RunFolder(path.parent / "run")
    whole, metrics = checkpoint.read(folder.checkpoints / "12"), read_metrics(folder.metrics)
    assert {tensor.dtype for tensor in whole.trained.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in whole.optimizer.values()} == {torch.float32}
    assert set(whole.more) == ({"kahan"} if rounding == "kahan" else set())
    trainer.train(load_train_recipe(path, overrides), resume=str(folder.checkpoints / "4"))
    again = checkpoint.read(folder.checkpoints / "12")
    for kind in ("trained", "optimizer"):
        mine, theirs = getattr(again, kind), getattr(whole, kind)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), kind
    assert all(
        torch.equal(again.more["kahan"][k], v) for k, v in whole.more.get("kahan", {}).items()
    )
    assert read_metrics(folder.metrics) == metrics


def test_all_but_the_vae_is_narrow_and_learns_what_float32_does(train_recipe: Recipe) -> None:
    losses = {}
    for kind in ("fp32", "bf16"):
        overrides = ["precision.mixed=bf16", f"precision.parameters={kind}", "train.lr=1e-5"]
        recipe = load_train_recipe(train_recipe(), overrides)
        run = Run(open_setup(recipe), RunFolder(recipe.output))
        lines = [
            trainer.take_step(run, p) for _, p in zip(range(3), trainer.steps(run), strict=False)
        ]
        run.check_what_moved()
        losses[kind] = [line["loss"] for line in lines]
        found = {
            part: {p.dtype for p in network.parameters()}
            for part, network in run.setup.family.parts.items()
        }
        wanted = torch.float32 if kind == "fp32" else torch.bfloat16
        assert found == {"unet": {wanted}, "text_encoder": {wanted}, "vae": {torch.float32}}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


def test_memory_counts_the_formats(train_recipe: Recipe) -> None:
    def estimate(*overrides: str) -> dict[str, int]:
        return check(load_train_recipe(train_recipe(), overrides))["memory"]

    wide, narrow = estimate("precision.mixed=bf16"), estimate(*PURE)
    kahan = estimate(*PURE, "precision.rounding=kahan")
    assert narrow["gradients"] * 2 == wide["gradients"]
    assert narrow["optimizer"] == wide["optimizer"]
    assert kahan["weights"] - narrow["weights"] == narrow["gradients"]
    ema = estimate(*PURE, "ema.half_life_samples=9")
    assert ema["ema"] == 2 * narrow["gradients"]


def test_state_is_loaded_at_its_own_width() -> None:
    parameter = torch.nn.Parameter(torch.ones(3).bfloat16())
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.data = parameter.data.float()
    parameter.grad = torch.full((3,), 0.1)
    optimizer.step()
    saved = optimizer.state_dict()
    parameter.grad, parameter.data = None, parameter.data.bfloat16()
    with seen_as_float32({"w": parameter}):
        optimizer.load_state_dict(saved)
    assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32
    assert (parameter.dtype, parameter.shape) == (torch.bfloat16, (3,))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["precision.parameters=fp16"], "fp16 weights lose small steps"),
        ([*PURE, "precision.rounding=nearest"], "rounded to nearest lose every step"),
        ([*PURE, "precision.rounding=up"], "no such choice"),
        (["precision.parameters=bf16"], 'needs mixed = "bf16"'),
        (["precision.rounding=kahan"], 'rounding is for parameters = "bf16"'),
        ([*PURE, "adapter.type=lora"], "is for adapter full only"),
        ([*PURE, "optimizer.type=prodigy"], "prodigy takes no bf16 parameters"),
        (
            [*PURE, "optimizer.type=schedule_free", "schedule.type=constant"],
            "schedule_free takes no bf16 parameters",
        ),
    ],
)
def test_what_would_not_work_is_refused(
    train_recipe: Recipe, overrides: list[str], words: str
) -> None:
    with pytest.raises(RecipeError, match=words.replace("(", r"\(")):
        load_train_recipe(train_recipe(), overrides)


def test_a_run_says_what_format_and_device_have_against_each_other(
    train_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise UserError("stopped here")

    monkeypatch.setattr(trainer, "begin", stop)
    for mixed, is_told in (("no", False), ("bf16", True)):
        with pytest.raises(UserError, match="stopped here"):
            trainer.train(load_train_recipe(train_recipe(), [f"precision.mixed={mixed}"]))
        said = " ".join(capfd.readouterr().err.split())
        assert ("is slower than 'no' on most machines" in said) == is_told
