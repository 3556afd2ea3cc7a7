"""Optimizers: a step, a resume through a checkpoint on disk, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from sdprep.errors import MissingExtraError, RecipeError, UserError
from sdprep.plugins import config_for, configs
from sdprep.recipe import options
from sdtrain import checkpoint
from sdtrain.adapters.full import Full
from sdtrain.averages import weights_to_use
from sdtrain.freezing import Rule, build_plan
from sdtrain.recipe import TrainRecipe
from sdtrain.update import _found_rates
from tests.tiny import load_tiny

PACKAGES = {
    **{"adafactor": "", "adamw": "", "muon": "", "sgd": ""},
    **{"adamw8bit": "bitsandbytes", "lion": "bitsandbytes"},
    **{"came": "came_pytorch", "prodigy": "prodigyopt", "schedule_free": "schedulefree"},
}
SHAPES = {
    "matrix": (64, 128),
    "wide": (32, 256),
    "conv": (4, 4, 3, 3),
    "bias": (8,),
    "zero": (16, 4),
}

Parameters = dict[str, torch.nn.Parameter]


def config(name: str, **settings: object) -> Any:
    package = PACKAGES[name]
    if package and find_spec(package) is None:
        pytest.skip(f"{package} is not installed; it comes with the extra [optim]")
    return config_for("optimizer", name)(**settings)


def parameters() -> Parameters:
    made = {}
    for seed, (path, shape) in enumerate(SHAPES.items()):
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        made[path] = torch.nn.Parameter(drawn * (path != "zero"))
    return made


def built(name: str, trained: Parameters, **settings: object) -> torch.optim.Optimizer:
    one, two = list(trained.values())[:2], list(trained.values())[2:]
    groups = [{"params": one, "lr": 0.01, "name": "a"}, {"params": two, "lr": 0.01, "name": "b"}]
    return config(name, **settings).build(groups)


def advance(optimizer: torch.optim.Optimizer, trained: Parameters, start: int, stop: int) -> None:
    for step in range(start, stop):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        for at, parameter in enumerate(trained.values()):
            generator = torch.Generator().manual_seed(100 * step + at)
            parameter.grad = torch.randn(parameter.shape, generator=generator) + parameter.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def taken(optimizer: torch.optim.Optimizer, trained: Parameters) -> checkpoint.Snapshot:
    names = {id(parameter): path for path, parameter in trained.items()}
    tensors, plain = checkpoint.optimizer_state(optimizer, names)
    state = {"format_version": checkpoint.FORMAT_VERSION, "samples_seen": 7, "optimizer": plain}
    return checkpoint.Snapshot(state, {p: t.detach() for p, t in trained.items()}, tensors)


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {path: t.detach().numpy().tobytes() for path, t in sorted(tensors.items())}


def test_every_optimizer_is_tested_here() -> None:
    assert sorted(configs("optimizer")) == sorted(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.slow
def test_a_run_that_stops_and_goes_on_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    settings = {"sgd": {"momentum": 0.9}}.get(name, {})
    trained = parameters()
    optimizer = built(name, trained, **settings)
    advance(optimizer, trained, 0, 3)
    written = checkpoint.write(tmp_path, taken(optimizer, trained), keep=1)
    advance(optimizer, trained, 3, 6)

    read = checkpoint.read(written)
    again = {path: torch.nn.Parameter(read.trained[path].clone()) for path in trained}
    resumed = built(name, again, **settings)
    names = {id(parameter): path for path, parameter in again.items()}
    checkpoint.restore_optimizer(resumed, names, read.optimizer, read.state["optimizer"])
    assert bits(taken(resumed, again).optimizer) == bits(read.optimizer)
    advance(resumed, again, 3, 6)

    assert bits(again) == bits(trained)
    mine, theirs = taken(resumed, again), taken(optimizer, trained)
    assert bits(mine.optimizer) == bits(theirs.optimizer)
    assert mine.optimizer
    assert mine.state == theirs.state


@pytest.mark.parametrize("name", PACKAGES)
def test_the_recipe_says_the_rates_and_settings_after_a_resume(name: str) -> None:
    trained = parameters()
    optimizer = built(name, trained)
    advance(optimizer, trained, 0, 2)
    snapshot = taken(optimizer, trained)
    resumed = built(name, trained, weight_decay=0.5)
    names = {id(parameter): path for path, parameter in trained.items()}
    checkpoint.restore_optimizer(resumed, names, snapshot.optimizer, snapshot.state["optimizer"])
    assert len(resumed.param_groups) >= 2
    assert {group["lr"] for group in resumed.param_groups} == {0.01}
    assert {group["weight_decay"] for group in resumed.param_groups} == {0.5}


def test_frozen_parameters_own_no_state(tiny_model: Callable[[str], Path]) -> None:
    family = load_tiny(tiny_model("sd15"))
    plan = build_plan(family, [Rule("unet.**.norm1.*", lr=1e-3)], Full())
    trained = plan.trained()
    before = {path: tensor.detach().clone() for path, tensor in plan.frozen.items()}
    installed = [name for name, needs in PACKAGES.items() if not needs or find_spec(needs)]
    assert len(before) > len(trained) > 5
    for name in installed:
        optimizer = config(name).build(plan.optimizer_groups())
        for parameter in trained.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert {id(p) for p in optimizer.state} <= {id(p) for p in trained.values()}, name
    for path, tensor in plan.frozen.items():
        assert torch.equal(tensor, before[path]), path
    assert len(installed) >= 3


@pytest.mark.parametrize("name", ["adafactor", "lion"])
def test_a_first_step_is_the_rate_with_the_gradients_sign(name: str) -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = config(name, weight_decay=0.0).build(
        [{"params": [parameter], "lr": 0.01, "name": "all"}]
    )
    parameter.grad = torch.tensor([5.0, -0.1, 0.7])
    optimizer.step()
    expected = torch.tensor([0.99, -1.99, 2.99])
    torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)


def test_eight_bits_stay_close_to_adamw() -> None:
    exact, small = parameters(), parameters()
    advance(built("adamw", exact), exact, 0, 20)
    eight = built("adamw8bit", small)
    advance(eight, small, 0, 20)
    assert eight.state[small["matrix"]]["state1"].dtype == torch.uint8
    torch.testing.assert_close(small["bias"], exact["bias"], rtol=1e-5, atol=1e-6)
    start = parameters()["matrix"]
    moved = (exact["matrix"] - start).norm()
    assert (small["matrix"] - exact["matrix"]).norm() < 0.05 * moved


@pytest.mark.parametrize("name", PACKAGES)
def test_the_state_takes_as_many_bytes_as_it_says(name: str) -> None:
    for settings in {"sgd": [{}, {"momentum": 0.9}], "prodigy": [{}, {"slice_p": 1}]}.get(
        name, [{}]
    ):
        trained = parameters()
        trained["small"] = torch.nn.Parameter(torch.ones(4095))
        trained["large"] = torch.nn.Parameter(torch.ones(8193))
        optimizer = built(name, trained, **settings)
        advance(optimizer, trained, 0, 1)
        said = config(name, **settings)
        for path, parameter in trained.items():
            kept = {
                key: value
                for key, value in optimizer.state.get(parameter, {}).items()
                if isinstance(value, torch.Tensor) and value.ndim and "qmap" not in key
            }
            bytes_kept = sum(value.numel() * value.element_size() for value in kept.values())
            if (name, path) == ("prodigy", "zero"):  # where it starts is a zero without dims
                bytes_kept += 4 * -(-parameter.numel() // said.slice_p)
            assert said.state_bytes(path, parameter.shape) == bytes_kept, (path, list(kept))


def test_muon_is_that_of_torch_on_matrices_and_adamw_elsewhere() -> None:
    trained, alone = parameters(), parameters()
    groups = [{"params": list(trained.values()), "paths": list(trained), "lr": 0.01, "name": "a"}]
    groups[0]["paths"] = ["time_embedding" if path == "wide" else path for path in trained]
    optimizer = config("muon", weight_decay=0.1).build(groups)
    assert [(g["name"], g["rule"]) for g in optimizer.param_groups] == [
        ("a (muon)", "a"),
        ("a (adamw)", "a"),
    ]
    matrices = [alone["matrix"], alone["zero"]]
    theirs = [
        torch.optim.Muon(
            matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", momentum=0.95
        ),
        torch.optim.AdamW([alone["wide"], alone["conv"], alone["bias"]], lr=0.01, weight_decay=0.1),
    ]
    for _ in range(3):
        for mine, other in zip(trained.values(), alone.values(), strict=True):
            mine.grad, other.grad = mine.detach().sin(), other.detach().sin()
        optimizer.step()
        for each in theirs:
            each.step()
    assert bits(trained) == bits(alone)
    assert set(optimizer.state[trained["matrix"]]) == {"momentum_buffer"}


def test_a_torch_without_muon_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"needs torch 2\.9"):
        config("muon").require()


def test_adamw_is_fused_where_asked() -> None:
    for asked, expected in (("auto", None), (True, True), (False, None)):
        assert built("adamw", parameters(), fused=asked).param_groups[0]["fused"] is expected


def test_schedule_free_gives_other_weights_than_it_trains_and_takes_nothing_back() -> None:
    trained = parameters()
    optimizer = built("schedule_free", trained)
    advance(optimizer, trained, 0, 5)
    training_point, state = bits(trained), bits(taken(optimizer, trained).optimizer)
    with weights_to_use(optimizer, trained):
        average = {path: p.detach().clone() for path, p in trained.items()}
    assert bits(trained) == training_point
    assert bits(taken(optimizer, trained).optimizer) == state
    for path, parameter in trained.items():
        z = optimizer.state[parameter]["z"]
        torch.testing.assert_close(0.9 * average[path] + 0.1 * z, parameter.detach())
    assert not torch.equal(average["matrix"], trained["matrix"])
    advance(optimizer, trained, 5, 6)  # still in the mode of training
    adamw = built("adamw", parameters())
    with weights_to_use(adamw, trained):
        assert all(group["params"] for group in adamw.param_groups)


def test_settings_are_those_of_the_authors() -> None:
    adafactor = built("adafactor", parameters())
    for group in adafactor.param_groups:
        assert not group["relative_step"]
        assert not group["scale_parameter"]
        assert not group["warmup_init"]
        assert group["clip_threshold"] == 1
    assert config("adafactor").max_grad_norm == 0
    lion, came = config_for("optimizer", "lion")(), config_for("optimizer", "came")()
    assert lion.betas == (0.9, 0.99)
    assert (came.betas, came.eps) == ((0.9, 0.999, 0.9999), (1e-30, 1e-16))
    assert config_for("optimizer", "sgd")().weight_decay == 0


def test_prodigy_and_restarts_are_refused_together() -> None:
    recipe: dict[str, Any] = {
        "output": Path("runs/x"),
        "model": {"family": "sd15", "path": "x"},
        "data": {"path": "x"},
        "train": {"samples": 100, "lr": 1.0},
        "optimizer": {"type": "prodigy"},
        "schedule": {"type": "cosine"},
    }
    assert TrainRecipe(**recipe).optimizer.slice_p == 11
    with pytest.raises(ValueError, match="prodigy cannot go with schedule restarts"):
        TrainRecipe(**{**recipe, "schedule": {"type": "restarts"}})
    TrainRecipe(**{**recipe, "schedule": {"type": "restarts"}, "optimizer": {"type": "adamw"}})


def test_prodigy_finds_its_step_and_takes_one_rate_for_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parameter = torch.nn.Parameter(torch.full((50,), 3.0))
    optimizer = config("prodigy").build([{"params": [parameter], "lr": 1.0, "name": "all"}])
    group = optimizer.param_groups[0]
    assert (group["slice_p"], group["safeguard_warmup"], group["weight_decay"]) == (11, True, 0.01)
    for _ in range(60):
        parameter.grad = parameter.detach().clone()
        optimizer.step()
    assert group["d"] > 100 * group["d0"]
    assert _found_rates(optimizer) == {"lr_times_d": {"all": group["d"]}}
    assert _found_rates(built("adamw", parameters())) == {}
    assert capsys.readouterr().out == ""  # belongs to --json
    groups = [{"params": [p], "lr": lr, "name": str(lr)} for p, lr in ((parameter, 1), (None, 2))]
    with pytest.raises(UserError, match="2 learning rates: 1, 2"):
        config("prodigy").build(groups)


@pytest.mark.parametrize("name", [name for name, package in PACKAGES.items() if package])
def test_a_missing_package_is_named_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(MissingExtraError, match=PACKAGES[name]) as caught:
        config_for("optimizer", name)().build([{"params": [parameter], "lr": 1.0, "name": "all"}])
    with pytest.raises(MissingExtraError, match=PACKAGES[name]):
        config_for("optimizer", name)().require()
    assert caught.value.extra == "optim"
    assert f"optimizer {name}" in caught.value.message


@pytest.mark.parametrize("name", PACKAGES)
def test_unknown_options_and_bounds_are_refused(name: str) -> None:
    plugin = config_for("optimizer", name)
    for wrong in ("momentums=0.9", "weight_decay=-1.0", "max_grad_norm=-1.0"):
        with pytest.raises(RecipeError, match=wrong.partition("=")[0]):
            options(plugin, [wrong])
