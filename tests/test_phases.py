"""Phases: whose turn it is, what resting means, and that a stop in the middle changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdprep.errors import RecipeError, UserError
from sdtrain import checkpoint, trainer
from sdtrain.check import check
from sdtrain.phases import PhasePlan, PhaseSection, PhaseSwitch, resting_left_out
from sdtrain.recipe import load_train_recipe
from sdtrain.run import Run
from sdtrain.run_folder import RunFolder
from sdtrain.setup import open_setup
from sdtrain.trackers.jsonl import read_metrics

torch.set_num_threads(1)

Recipe = Callable[..., Path]
RULES = 'train.rules=[{ match = "**", lr = 1e-3 }]'
TURNS = (
    RULES,
    "train.phases=[{ samples = 6, parts = ['text_encoder'] }, { samples = 5, parts = ['unet'] }]",
    "train.repeat_phases=true",
    "optimizer.weight_decay=0.5",
)


def plan_of(*lengths: int, repeats: bool = False) -> PhasePlan:
    return PhasePlan(
        tuple(PhaseSection(samples=length, parts=("unet",)) for length in lengths), repeats
    )


def test_whose_turn_it_is() -> None:
    once, again = plan_of(6, 5), plan_of(6, 5, repeats=True)
    assert [once.at(clock) for clock in (0, 5, 6, 10)] == [0, 0, 1, 1]
    assert [again.at(clock) for clock in (0, 5, 6, 10, 11, 16, 17, 22)] == [0, 0, 1, 1, 0, 0, 1, 0]
    assert list(again.starts(18)) == [(0, 0), (6, 1), (11, 0), (17, 1)]
    assert list(once.starts(100)) == [(0, 0), (6, 1)]
    with pytest.raises(AssertionError):
        once.at(11)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 60))
def test_turns_follow_the_starts(lengths: list[int], clock: int) -> None:
    plan = plan_of(*lengths, repeats=True)
    before = [index for start, index in plan.starts(clock + 1) if start <= clock]
    assert plan.at(clock) == before[-1]


def test_parts_take_turns_and_rest_untouched(train_recipe: Recipe) -> None:
    recipe = load_train_recipe(train_recipe(), TURNS)
    run = Run(open_setup(recipe), RunFolder(recipe.output))
    groups = ["** (unet)", "** (text_encoder)"]
    assert sorted(group["name"] for group in run.optimizer.param_groups) == sorted(groups)
    seen = []
    for _, parts in zip(range(6), trainer.steps(run), strict=False):
        before = {path: p.detach().clone() for path, p in run.trained.items()}
        states = {
            path: {k: v.clone() for k, v in run.optimizer.state[p].items()}
            for path, p in run.trained.items()
            if p in run.optimizer.state
        }
        line = trainer.take_step(run, parts)
        moved = {path for path, p in run.trained.items() if not torch.equal(p, before[path])}
        live = {path.split(".")[0] for path in moved}
        seen.append((line["samples_seen"], *live))
        assert len(live) == 1
        assert list(line["lr"]) == [f"** ({live.pop()})"]
        for path, parameter in run.trained.items():
            if path in moved:
                continue
            assert parameter.grad is None
            assert not parameter.requires_grad or path.startswith(seen[-1][1])
            for key, value in states.get(path, {}).items():
                assert torch.equal(value, run.optimizer.state[parameter][key]), (path, key)
        assert run.setup.family.parts["unet"].training is (seen[-1][1] == "unet")
    run.check_what_moved()
    # Steps start at 0 4 8 12 16 20; the phases begin at 0 6 11 17 22.
    names = ["text_encoder", "text_encoder", "unet", "text_encoder", "text_encoder", "unet"]
    assert [name for _, name in seen] == names
    steps = {
        path.split(".")[0]: int(run.optimizer.state[p]["step"])
        for path, p in run.trained.items()
        if p in run.optimizer.state
    }
    assert steps == {"text_encoder": 4, "unet": 2}
    assert set(run.effort) == set(groups)
    assert {p.grad for p in run.setup.plan.frozen.values()} == {None}


def test_a_part_before_its_turn_owns_nothing_and_must_not_have_moved(
    train_recipe: Recipe,
) -> None:
    recipe = load_train_recipe(train_recipe(), TURNS)
    run = Run(open_setup(recipe), RunFolder(recipe.output))
    trainer.take_step(run, next(trainer.steps(run)))
    assert run.parts_trained == {"text_encoder"}
    owners = {run.names[id(p)].split(".")[0] for p in run.optimizer.state}
    assert owners == {"text_encoder"}
    run.check_what_moved()
    with torch.no_grad():
        run.trained["unet.conv_in.bias"].add_(1)
    with pytest.raises(AssertionError, match="unet changed before the phase"):
        run.check_what_moved()


@pytest.mark.parametrize(
    ("optimizer", "clocks"), [("adamw", ("4", "12")), ("schedule_free", ("12",))]
)
@pytest.mark.slow
def test_stopped_in_any_phase_it_ends_in_the_same_bytes(
    train_recipe: Recipe,
    optimizer: str,
    clocks: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if optimizer == "schedule_free":
        pytest.importorskip("schedulefree")
    overrides = [*TURNS, f"optimizer.type={optimizer}", "schedule.type=constant"]
    overrides += ["checkpoint.every_samples=4", "checkpoint.keep=9", "train.samples=16"]
    path = train_recipe()
    folder = RunFolder(path.parent / "run")
    trainer.train(load_train_recipe(path, overrides))
    printed = capsys.readouterr().err
    assert "at 8 samples phase 2 of 2, again and again: 5 samples of unet" in printed
    assert "** (rests)" in printed
    whole, metrics = checkpoint.read(folder.checkpoints / "16"), read_metrics(folder.metrics)
    for clock in clocks:
        trainer.train(load_train_recipe(path, overrides), resume=str(folder.checkpoints / clock))
        again = checkpoint.read(folder.checkpoints / "16")
        for kind in ("trained", "optimizer"):
            mine, theirs = getattr(again, kind), getattr(whole, kind)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine), (clock, kind)
        for key in ("effort", "parts_trained", "trained_start"):
            assert again.state[key] == whole.state[key]
        assert read_metrics(folder.metrics) == metrics


def two_parts(device: str) -> tuple[PhaseSwitch, torch.optim.AdamW, dict[str, torch.nn.Parameter]]:
    trained = {path: torch.nn.Parameter(torch.ones(3, device=device)) for path in ("a.w", "b.w")}
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": 0.1, "name": path} for path, p in trained.items()]
    )
    phases = tuple(PhaseSection(samples=4, parts=(part,)) for part in "ab")
    return PhaseSwitch(PhasePlan(phases, True), trained, {}), optimizer, trained


def test_only_groups_whose_turn_it_is_are_stepped() -> None:
    switch, optimizer, trained = two_parts("cpu")
    assert switch.enter(0, optimizer)
    assert not switch.enter(3, optimizer)
    for parameter in trained.values():
        parameter.grad = torch.ones(3)
    with resting_left_out(optimizer):
        assert [group["name"] for group in optimizer.param_groups] == ["a.w"]
        optimizer.step()
    assert len(optimizer.param_groups) == 2
    assert torch.equal(trained["b.w"].detach(), torch.ones(3))
    assert switch.enter(4, optimizer)
    assert trained["a.w"].grad is None


@pytest.mark.gpu
def test_what_rests_waits_on_the_cpu_and_comes_home() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    switch, optimizer, trained = two_parts("cuda")
    switch.enter(0, optimizer)
    trained["a.w"].grad = torch.ones(3, device="cuda")
    optimizer.step()
    state = optimizer.state[trained["a.w"]]
    kept = state["exp_avg"].cpu()
    homes = {key: value.device for key, value in state.items()}
    switch.enter(4, optimizer)
    assert {value.device.type for value in state.values()} == {"cpu"}
    switch.enter(8, optimizer)
    assert {key: value.device for key, value in state.items()} == homes
    assert torch.equal(state["exp_avg"].cpu(), kept)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["train.phases=[{samples = 10, parts = ['unet', 'text_encoder']}]"],
            "end at 10 of the run's 22 samples",
        ),
        (
            ["train.phases=[{samples = 30, parts = ['unett']}]"],
            "names 'unett', of which nothing trains",
        ),
        (["train.phases=[{samples = 30, parts = ['vae']}]"], "names 'vae'"),
        (
            ["train.phases=[{samples = 30, parts = ['unet']}]"],
            "rules train text_encoder, but no phase of the run does",
        ),
        (
            [
                "train.phases=[{samples = 22, parts = ['unet']}, "
                "{samples = 22, parts = ['text_encoder']}]"
            ],
            "rules train text_encoder, but no phase",
        ),
        (  # its turn is at 21, and the last step begins at 20
            [
                "train.phases=[{samples = 21, parts = ['unet']}, "
                "{samples = 22, parts = ['text_encoder']}]"
            ],
            "rules train text_encoder, but no phase of the run does: .* begin a step at 20",
        ),
        (
            ["train.phases=[{samples = 3, parts = ['unet', 'text_encoder']}]"],
            "has 3 samples, fewer than a step's 4",
        ),
    ],
)
def test_phases_that_make_no_sense_are_refused(
    train_recipe: Recipe, overrides: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        open_setup(load_train_recipe(train_recipe(), [RULES, *overrides]))


def test_a_run_that_is_cut_short_may_end_before_the_turn_of_a_part(
    train_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--final` makes such a recipe where a run was best before its second phase."""
    turns = (
        "train.phases=[{samples = 16, parts = ['unet']}, {samples = 6, parts = ['text_encoder']}]"
    )
    overrides = [RULES, turns, "train.samples=8"]
    with pytest.raises(UserError, match="rules train text_encoder, but no phase of the run does"):
        open_setup(load_train_recipe(train_recipe(), overrides))
    capsys.readouterr()
    cut = load_train_recipe(train_recipe(), [*overrides, "train.schedule_samples=22"])
    assert trainer.train(cut, keeps_model=False).is_finished
    assert "ends before a step of phase 2" in capsys.readouterr().err
    with pytest.raises(UserError, match="the last of its 12 samples"):
        open_setup(load_train_recipe(train_recipe(), [*overrides, "train.schedule_samples=12"]))


def test_phases_that_can_be_refused_early_are(train_recipe: Recipe) -> None:
    for overrides, words in (
        (["train.repeat_phases=true"], "repeat_phases needs"),
        (["train.phases=[{samples = 0, parts = ['unet']}]"], "must be > 0"),
        (["train.phases=[{samples = 9, parts = []}]"], "parts"),
        (["train.phases=[{samples = 9, parts = ['unet', 'unet']}]"], "named once"),
        ([*TURNS, "optimizer.type=prodigy"], "takes no phases"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_train_recipe(train_recipe(), overrides)


def test_check_shows_a_table_for_each_phase(train_recipe: Recipe) -> None:
    from sdtrain.check_text import check_text

    found = check(load_train_recipe(train_recipe(), TURNS))
    assert [(phase["samples"], phase["parts"]) for phase in found["phases"]] == [
        (6, ["text_encoder"]),
        (5, ["unet"]),
    ]
    rates = found["learning_rate"]
    for at, clock in enumerate(rates["samples_seen"]):
        is_text = clock % 11 < 6
        for group, curve in rates["lr"].items():
            assert (curve[at] > 0) == (("text_encoder" in group) == is_text), (group, clock)
    text = check_text(found, "the whole table")
    assert "phase 2 of 2, again and again: 5 samples of unet" in text
    first = next(line for line in found["phases"][0]["table"] if line.startswith("unet"))
    assert "(rests)" in first
    assert first.endswith("frozen")
    at_once = check(load_train_recipe(train_recipe(), [RULES]))["memory"]
    numbers = {
        part: sum(row["num_trained"] for row in found["freeze"]["rows"] if row["part"] == part)
        for part in ("unet", "text_encoder")
    }
    assert at_once["gradients"] == 4 * sum(numbers.values())
    assert found["memory"]["gradients"] == 4 * max(numbers.values())
    assert found["memory"]["optimizer"] == 8 * max(numbers.values())
