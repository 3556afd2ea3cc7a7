"""DeepSpeed's ZeRO does what one process does: real processes on gloo, where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sdprep.errors import MissingExtraError, UserError
from sdtrain import checkpoint
from sdtrain.engine import DistributedSection, Engine
from sdtrain.recipe import load_train_recipe
from sdtrain.trackers.jsonl import read_metrics
from sdtrain.world import ALONE, World
from sdtrain.zero import Zero, ZeroOptimizer
from tests import test_distributed as others
from tests.test_distributed import TOLERANCE, alone, distance, end, job, launched, went_on

DEEPSPEED = "distributed.engine=deepspeed"
STAGE_1 = "distributed.zero_stage=1"
EMA = "ema.half_life_samples=8"
SGD = ("optimizer.type=sgd", "optimizer.momentum=0.9")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: `1` alone, the others with DeepSpeed."""
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install '.[deepspeed]'")
    root = others.ready(tmp_path_factory.mktemp("deepspeed runs"))
    with pytest.MonkeyPatch.context() as patch:
        others.mini_in_place(patch)
        alone(root, "1", EMA, micro=4)
        alone(root, "1-sgd", *SGD, micro=4)
        alone(root, "1-stopped-by-another", "distributed.engine=fsdp2")
        both = [
            job(root, "2", DEEPSPEED, EMA, micro=2),
            job(root, "2-first", DEEPSPEED, STAGE_1, EMA, "ema.device=cpu"),
            job(root, "2-sgd", DEEPSPEED, *SGD, micro=3),
            job(root, "2-stopped", DEEPSPEED, stop_after=7),
            job(root, "2-stopped-ddp", stop_after=7),
        ]
        launched(root, 2, both)
        went_on(root, "2-stopped", "1-went-on")
        went_on(root, "2-stopped", "3-went-on")
        went_on(root, "2-stopped-ddp", "3-from-ddp")
        went_on(root, "2-stopped", "3-to-fsdp")
        three = [
            job(root, "3-went-on", DEEPSPEED),
            job(root, "3-from-ddp", DEEPSPEED, STAGE_1),
            job(root, "3-to-fsdp", others.FSDP),
        ]
        launched(root, 3, three)
        alone(root, "1-went-on")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("2", "1"),
        ("2-first", "1"),
        ("2-sgd", "1-sgd"),
        ("1-went-on", "1"),
        ("3-went-on", "1"),
        ("3-from-ddp", "1"),
        ("3-to-fsdp", "1"),
    ],
)
def test_it_ends_in_the_weights_of_one_process(runs: Path, name: str, like: str) -> None:
    one, other = end(runs, like), end(runs, name)
    assert one.state["step"] == other.state["step"] == 30
    assert distance(one.trained, other.trained) < TOLERANCE
    assert distance(one.optimizer, other.optimizer) < TOLERANCE
    assert other.state["trained_start"] == one.state["trained_start"]
    assert other.state["optimizer"]["groups"] == one.state["optimizer"]["groups"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2", "2-first"])
def test_averages_pictures_and_numbers_are_those_of_one(runs: Path, name: str) -> None:
    from safetensors.torch import load_file

    assert distance(end(runs, "1").more["ema"], end(runs, name).more["ema"]) < TOLERANCE
    model = load_file(runs / name / "model" / "mini.safetensors")
    for path, tensor in end(runs, name).trained.items():
        assert torch.equal(model[path], tensor)
    ones, theirs = (read_metrics(runs / each / "metrics.jsonl") for each in ("1", name))
    for one, other in zip(ones, theirs, strict=True):
        assert list(one) == list(other)
        for key in ("loss", "grad_norm", "mean"):
            if one.get(key) is not None:
                assert other[key] == pytest.approx(one[key], rel=2e-4), (one["samples_seen"], key)


@pytest.mark.slow
def test_one_that_is_asked_to_stop_stops_all_after_the_same_step(runs: Path) -> None:
    kept = checkpoint.checkpoints(runs / "2-stopped" / "checkpoints")
    assert [path.name for path in kept] == ["28"]


# --- without DeepSpeed ---------------------------------------------------------------------------


def test_where_it_is_not_installed_that_is_said_with_the_line_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdtrain.zero.find_spec", lambda name: None)
    section = DistributedSection(engine="deepspeed")
    with pytest.raises(MissingExtraError, match=r"pip install .*deepspeed"):
        section.build(World(0, 2))
    assert type(section.build(ALONE)) is Engine  # one process needs none of it


def test_the_stage_is_the_recipes(monkeypatch: pytest.MonkeyPatch, train_recipe: Any) -> None:
    monkeypatch.setattr("sdtrain.zero.find_spec", lambda name: name)
    for stage in (1, 2):
        built = DistributedSection(engine="deepspeed", zero_stage=stage).build(World(0, 2))
        assert isinstance(built, Zero)
        assert (built.stage, built.is_sharded, built.has_spread_state) == (stage, False, True)
    with pytest.raises(UserError, match=r"zero_stage = 3 .*fsdp2"):
        load_train_recipe(train_recipe(), [DEEPSPEED, "distributed.zero_stage=3"])


def test_what_it_cannot_do_is_refused(train_recipe: Any) -> None:
    for settings, words in (
        (["optimizer.type=adafactor"], "deepspeed cannot go with optimizer adafactor"),
        (["precision.mixed=fp16"], "deepspeed cannot go with precision.mixed fp16"),
        (['train.phases=[{samples=8, parts=["unet"]}]'], "cannot go with train.phases"),
    ):
        with pytest.raises(UserError, match=words):
            load_train_recipe(train_recipe(), [DEEPSPEED, *settings])


def two_in_a_row() -> tuple[list[nn.Parameter], ZeroOptimizer, torch.optim.Optimizer]:
    """Two parameters laid out as one row of six, all of it held by this process."""
    parameters: Any = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    start = 0
    for parameter in parameters:
        place, count = SimpleNamespace(start=0, numel=parameter.numel()), parameter.numel()
        of_row = SimpleNamespace(start=start, numel=count)
        parameter._hp_mapping = SimpleNamespace(
            lp_fragment_address=place, hp_fragment_address=of_row
        )
        start += count
    row = nn.Parameter(torch.ones(6))
    rows = torch.optim.AdamW([{"params": [row], "lr": 0.1, "name": "all"}])
    outer = SimpleNamespace(optimizer=rows, refresh_fp32_params=lambda: None)
    live = SimpleNamespace(
        optimizer=outer, step=rows.step, get_global_grad_norm=lambda: torch.tensor(2.5)
    )
    groups = [{"params": list(parameters), "lr": 0.1, "name": "all"}]
    names = {id(parameter): f"p{at}" for at, parameter in enumerate(parameters)}
    return parameters, ZeroOptimizer(groups, live, ALONE, names), rows


def test_state_goes_by_parameter_and_comes_back_into_the_row() -> None:
    parameters, optimizer, rows = two_in_a_row()
    row = rows.param_groups[0]["params"][0]
    row.grad = torch.arange(6.0)
    for parameter in parameters:
        parameter.sum().backward()
    optimizer.param_groups[0]["lr"] = 0.2
    assert optimizer.clip_and_step() == 2.5
    assert rows.param_groups[0]["lr"] == 0.2
    names = {id(parameter): f"p{at}" for at, parameter in enumerate(parameters)}
    tensors, plain = checkpoint.optimizer_state(optimizer, names)  # type: ignore[arg-type]
    assert tensors["p0/exp_avg"].tolist() == pytest.approx(torch.tensor([[0, 0.1], [0.2, 0.3]]))
    assert tensors["p1/exp_avg"].tolist() == pytest.approx([0.4, 0.5])
    assert tensors["p0/step"] == tensors["p1/step"] == 1
    before = {name: value.clone() for name, value in rows.state[row].items()}
    fresh, other, other_rows = two_in_a_row()
    names = {id(parameter): f"p{at}" for at, parameter in enumerate(fresh)}
    checkpoint.restore_optimizer(other, names, tensors, plain)  # type: ignore[arg-type]
    after = other_rows.state[other_rows.param_groups[0]["params"][0]]
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_counts_that_differ_within_a_row_are_refused() -> None:
    parameters, optimizer, _ = two_in_a_row()
    names = {id(parameter): f"p{at}" for at, parameter in enumerate(parameters)}
    tensors = {"p0/step": torch.tensor(3.0), "p0/exp_avg": torch.zeros(2, 2)}
    plain = {"groups": [], "values": {}}
    with pytest.raises(UserError, match="stepped unequally often"):
        checkpoint.restore_optimizer(optimizer, names, tensors, plain)  # type: ignore[arg-type]
    tensors |= {"p1/step": torch.tensor(2.0), "p1/exp_avg": torch.zeros(2)}
    with pytest.raises(UserError, match="stepped unequally often"):
        checkpoint.restore_optimizer(optimizer, names, tensors, plain)  # type: ignore[arg-type]


def test_a_parameter_without_gradient_would_be_decayed_and_is_refused() -> None:
    parameters, optimizer, _ = two_in_a_row()
    parameters[0].sum().backward()
    with pytest.raises(UserError, match="1 parameters got no gradient in this step: p1"):
        optimizer.clip_and_step()
