"""Sweeps: the grid as recipes, runs in processes of their own, and the comparison."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sdprep.errors import RecipeError, UserError
from sdtrain import sweep as sweeping
from sdtrain.cli import app
from sdtrain.sweep import OUTCOME, compare_cells, plan_cells, report
from tests.test_compare import written

RATE = "train.rules.0.lr"


def test_every_combination_is_a_recipe_of_its_own(train_recipe: Callable[..., Path]) -> None:
    path = train_recipe()
    cells = plan_cells(path, ["seed=3"], [f"{RATE}=1e-4,1e-3", 'adapter.type=full,"lora"'], None)
    assert [cell.name for cell in cells] == [
        *("lr=0.0001_type=full", "lr=0.0001_type=lora"),
        *("lr=0.001_type=full", "lr=0.001_type=lora"),
    ]
    assert {cell.recipe.seed for cell in cells} == {3}
    assert [cell.recipe.train.rules[0].lr for cell in cells] == [1e-4, 1e-4, 1e-3, 1e-3]
    assert [cell.recipe.adapter.type for cell in cells] == ["full", "lora"] * 2
    assert [cell.output for cell in cells] == [path.parent / "run-sweep" / c.name for c in cells]
    assert len({cell.key for cell in cells}) == 4


@pytest.mark.parametrize("name", ["an ü", "\N{SNOWMAN}\N{GRINNING FACE}", "a\"b'c", "a\\b"])
def test_the_folder_of_a_sweep_may_have_any_name(
    train_recipe: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    (cell,) = plan_cells(train_recipe(), [], [f"{RATE}=1e-4"], tmp_path / name)
    assert cell.output == tmp_path / name / "lr=0.0001"


def test_values_may_be_tables_and_lists_of_any_length(train_recipe: Callable[..., Path]) -> None:
    path = train_recipe()
    rules = [f'[{{ match = "unet.{part}.**", lr = 1e-3 }}]' for part in ("up_blocks", "mid_block")]
    stops = "{ patience = 2 }, { patience = 3 }"
    cells = plan_cells(
        path, [], [f"train.rules={','.join(rules)}", f"validation.stop={stops}"], None
    )
    found = [(c.recipe.train.rules[0].match, c.recipe.validation.stop.patience) for c in cells]
    up, mid = "unet.up_blocks.**", "unet.mid_block.**"
    assert found == [(up, 2), (up, 3), (mid, 2), (mid, 3)]
    long = [f'["{"word " * 100}{number}"]' for number in (1, 2)]
    named = plan_cells(path, [], [f"sampling.prompts={','.join(long)}"], None)
    assert len({cell.name for cell in named}) == 2
    assert max(len(cell.name) for cell in named) < 80


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ([], "at least one"),
        ([f"{RATE}="], "expected key=value"),
        (["=1,2"], "expected key=value"),
        ([f"{RATE}=1e-4,1e-4"], "one name"),
        ([f"{RATE}=1e-4", f"{RATE}=1e-3"], "every key once"),
        ([f"{RATE}=1e-4,-1"], "must be >= 0"),
        (["train.sampels=1,2"], "sampels"),
        (["output=a,b"], "a folder of its own"),
    ],
)
def test_what_cannot_run_is_said_before_anything_runs(
    train_recipe: Callable[..., Path], over: list[str], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        plan_cells(train_recipe(), [], over, None)


def test_runs_without_an_evaluation_are_done_all_the_same(
    train_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = plan_cells(train_recipe(), [], [f"{RATE}=1e-4,1e-3"], tmp_path / "sweep")
    for cell in cells:
        cell.output.mkdir(parents=True)
        kept = {"key": cell.key, "outcome": {"verdict": None}}
        (cell.output / OUTCOME).write_text(json.dumps(kept), encoding="utf-8")
    found = compare_cells(cells, {})
    assert (found["set"], found["lowest"]) == (None, None)
    assert [run["mean"] for run in found["runs"]] == [None, None]
    assert report(found).count("was not evaluated") == 2
    assert "holds no evaluation" in capsys.readouterr().err


def test_runs_that_differ_in_nothing_are_told(
    train_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`train.lr` is a first rule, which those of the recipe overrule."""
    cells = plan_cells(train_recipe(), [], ["train.lr=1e-4,1e-3,1e-2"], tmp_path / "sweep")
    for cell, change in zip(cells, (-0.02, -0.02, -0.01), strict=True):
        written(cell.output, at0=0.0, at8=change)
        kept = {"key": cell.key, "outcome": {"verdict": None}}
        (cell.output / OUTCOME).write_text(json.dumps(kept), encoding="utf-8")
    found = compare_cells(cells, {})
    said = " ".join(capsys.readouterr().err.split())
    assert found["lowest"] == "lr=0.0001"
    assert "lr=0.001 ended with the very losses of lr=0.0001" in said
    assert "lr=0.01 ended" not in said


def test_two_sweeps_in_one_folder_do_not_take_each_others_results(
    train_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each run prints is kept for the sweep that started it."""
    path = train_recipe()
    (cell,) = plan_cells(path, [], [f"{RATE}=1e-4"], None)
    program = "import json; print(json.dumps({'is_finished': True, 'samples_seen': 1}))"
    monkeypatch.setattr(sweeping, "_command", lambda *_: [sys.executable, "-c", program])
    first, second = sweeping._start(path, cell, None), sweeping._start(path, cell, None)
    for each in (second, first):
        each.process.wait()
        assert sweeping._finish(each) is None
    assert cell.outcome == {"is_finished": True, "samples_seen": 1}


@pytest.mark.parametrize(
    ("command", "more"), [("sweep", ("--over", "train.lr=1e-4,1e-3")), ("lr-find", ())]
)
def test_a_launcher_may_not_start_several(
    command: str,
    more: tuple[str, ...],
    train_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = CliRunner().invoke(app, [command, str(train_recipe()), *more])
    assert isinstance(result.exception, UserError)
    assert f"sdtrain {command} is one process" in result.exception.message
    assert "started 2 of them" in result.exception.message


def sweep(path: Path, *more: str) -> tuple[int, Any, str]:
    """Exit status, what `--json` printed, and the talk."""
    settings = ("train.samples=8", "validation.images=3", "validation.timesteps_per_image=2")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sdtrain.cli", "sweep", str(path), "--json", *more),
            *(part for text in settings for part in ("--set", text)),
        ],
        capture_output=True,
        text=True,
    )
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_runs_are_ranked_one_that_fails_is_named_and_only_it_runs_again(
    train_recipe: Callable[..., Path], prepared_folder: Path, tmp_path: Path
) -> None:
    path, late = train_recipe(), tmp_path / "comes late"
    over = ("--over", f"data.path={json.dumps(str(prepared_folder))},{json.dumps(str(late))}")
    status, found, said = sweep(path, *over, "--to", str(tmp_path / "sweep"))
    assert status == 2
    good, bad = found["runs"]
    assert good["mean"] > 0
    assert found["lowest"] == good["name"]
    assert found["set"] == "validation"
    assert bad["mean"] is None
    assert "comes late" in bad["failed"]
    assert "failed with exit status 2" in said
    assert not (Path(good["path"]) / "model").exists()
    before = (Path(good["path"]) / "metrics.jsonl").stat().st_mtime_ns

    late.symlink_to(prepared_folder, target_is_directory=True)
    status, found, said = sweep(path, *over, "--to", str(tmp_path / "sweep"))
    assert status == 0, said
    assert "1 of them done before" in said
    assert (Path(good["path"]) / "metrics.jsonl").stat().st_mtime_ns == before
    first, second = found["runs"]
    assert first["mean"] == second["mean"]  # the very same data
    assert second["against_the_lowest"]["change_percent"] == 0
    assert second["against_the_lowest"]["verdict"] == "cannot tell"
