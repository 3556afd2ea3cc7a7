"""Stopping and going on, gently or by kill -9, ends in the same bytes as never stopping."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdprep.errors import UserError
from sdtrain import checkpoint, stopping, trainer
from sdtrain.recipe import load_train_recipe
from sdtrain.run import begin
from sdtrain.run_folder import RunFolder
from sdtrain.setup import open_setup
from sdtrain.stopping import StopRequest
from sdtrain.trackers.jsonl import read_metrics

torch.set_num_threads(1)

Recipe = Callable[..., Path]
JUDGED = (
    *("validation.images=1", "validation.train_probe_images=1"),
    *("validation.timesteps_per_image=2", "validation.every_samples=10"),
)


def run(path: Path, *overrides: str, **options: Any) -> trainer.Outcome:
    return trainer.train(load_train_recipe(path, overrides), **options)


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, optimizer, state of the clock, and every line of the metrics."""
    ends = [
        checkpoint.read(checkpoint.checkpoints(path / "checkpoints")[-1]) for path in (one, other)
    ]
    assert ends[0].samples_seen == ends[1].samples_seen
    for kind in ("trained", "optimizer"):
        a, b = getattr(ends[0], kind), getattr(ends[1], kind)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), kind
    for key in ("loss_fit", "effort", "step", "evaluations"):
        assert ends[0].state[key] == ends[1].state[key]
    assert read_metrics(one / "metrics.jsonl") == read_metrics(other / "metrics.jsonl")


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Send this very process a SIGTERM after so many steps, once."""
    original, left = trainer.take_step, [0]

    def counted(*arguments: Any) -> dict[str, Any]:
        line = original(*arguments)
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGTERM)
        return line

    def after(steps: int) -> None:
        left[0] = steps

    monkeypatch.setattr(trainer, "take_step", counted)
    return after


def test_stopped_anywhere_it_ends_in_the_same_bytes(
    train_recipe: Recipe, stop_after: Callable[[int], None]
) -> None:
    whole, parts = train_recipe(output="whole"), train_recipe(output="parts")
    assert run(whole, *JUDGED).is_finished
    for steps, expected in ((1, 4), (2, 12), (1, 16)):  # 14 rows: 16 lies in the second epoch
        stop_after(steps)
        outcome = run(parts, *JUDGED)
        assert (outcome.samples_seen, outcome.is_finished) == (expected, False)
    stop_after(0)
    assert run(parts, *JUDGED, "data.micro_batch_size=2", "data.workers=0").is_finished
    assert_same_end(whole.parent / "whole", parts.parent / "parts")
    matrices = sorted(
        path.relative_to(whole.parent / "whole").as_posix()
        for path in (whole.parent / "whole" / "validation").rglob("*.npz")
    )
    assert len(matrices) == 8
    for name in matrices:
        mine, theirs = ((p.parent / p.stem / name).read_bytes() for p in (whole, parts))
        assert mine == theirs


def test_dropout_of_the_model_itself_goes_on_too(
    train_recipe: Recipe,
    tiny_model: Callable[[str], Path],
    stop_after: Callable[[int], None],
    tmp_path: Path,
) -> None:
    """A model's configuration may ask for dropout, which torch draws from its own generators."""
    model = shutil.copytree(tiny_model("sd15"), tmp_path / "with dropout")
    config = model / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dropout": 0.4}))
    short = (f"model.path={json.dumps(str(model))}", "train.samples=12")
    whole, parts = train_recipe(output="whole"), train_recipe(output="parts")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert run(whole, *short).is_finished
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    stop_after(2)
    assert not run(parts, *short).is_finished
    stop_after(0)
    assert run(parts, *short).is_finished
    assert_same_end(whole.parent / "whole", parts.parent / "parts")
    dry = train_recipe(output="dry")
    run(dry, "train.samples=12")
    ends = [checkpoint.read_trained(p.parent / p.stem / "checkpoints" / "12") for p in (whole, dry)]
    assert any(not torch.equal(ends[0][key], ends[1][key]) for key in ends[0])  # it was at work


def test_a_finished_run_stays_as_it_is(train_recipe: Recipe) -> None:
    path = train_recipe()
    first = run(path, "train.samples=5")
    before = {p: p.stat().st_mtime_ns for p in (path.parent / "run").rglob("*") if p.is_file()}
    assert run(path, "train.samples=5") == first
    after = {p: p.stat().st_mtime_ns for p in (path.parent / "run").rglob("*") if p.is_file()}
    assert after == before


@pytest.mark.parametrize(
    ("before", "after", "package"),
    [
        ("{type='adamw'}", "{type='adafactor'}", "transformers"),
        ("{type='adamw'}", "{type='lion'}", "bitsandbytes"),
        ("{type='schedule_free'}", "{type='adamw'}", "schedulefree"),
        ("{type='prodigy',slice_p=11}", "{type='prodigy',slice_p=5}", "prodigyopt"),
    ],
)
def test_another_optimizer_begins_afresh_and_says_so(
    train_recipe: Recipe,
    before: str,
    after: str,
    package: str,
    stop_after: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(package)
    path, constant = train_recipe(), ("schedule.type=constant", "train.samples=12")
    stop_after(2)
    stopped = run(path, f"optimizer={before}", *constant)
    assert stopped.checkpoint is not None
    used = checkpoint.read_trained(Path(stopped.checkpoint))
    recipe = load_train_recipe(path, [f"optimizer={after}", *constant])
    going_on = begin(
        open_setup(recipe), RunFolder(recipe.output), resume="auto", accept=["optimizer"]
    )
    assert "the optimizer begins afresh" in " ".join(capsys.readouterr().err.split())
    assert not going_on.optimizer.state
    assert all(torch.equal(going_on.trained[name].data, value) for name, value in used.items())
    end = run(path, f"optimizer={after}", *constant, accept=["optimizer"])
    assert end.samples_seen == 12


def test_a_changed_recipe_is_refused_until_it_is_accepted(train_recipe: Recipe) -> None:
    path = train_recipe()
    run(path, "train.samples=8")
    changed = ("train.samples=12", "data.batch_size=2", "optimizer.eps=1e-7")
    with pytest.raises(UserError) as caught:
        run(path, "optimizer.type=adamw", *changed)
    for words in ("train.samples: 8 -> 12", "data.batch_size: 4 -> 2", "optimizer.eps"):
        assert words in caught.value.message
    outcome = run(path, "train.samples=12", accept=["train.samples"])
    assert outcome.samples_seen == 12
    seen = [line["samples_seen"] for line in read_metrics(path.parent / "run" / "metrics.jsonl")]
    assert seen == [4, 8, 12]
    assert load_train_recipe(path.parent / "run" / "recipe.toml").train.samples == 12


def test_changed_data_is_refused_and_moved_data_is_not(
    train_recipe: Recipe, prepared_folder: Path, tmp_path: Path
) -> None:
    from tests.train_data import prepared_row, write_prepared

    run(train_recipe(), "train.samples=5")
    moved = shutil.copytree(prepared_folder, tmp_path / "moved")
    assert run(train_recipe(data=moved), "train.samples=5").is_finished
    rows = [prepared_row(number) for number in range(18)]
    rows[3]["caption"] = "something else"
    edited = write_prepared(tmp_path / "edited", rows[:14], rows[14:])
    with pytest.raises(UserError, match="data_fingerprint") as found:
        run(train_recipe(data=edited), "train.samples=5")
    some = "train still has 14 rows, some with other pictures, texts or refusals"
    assert f"The data set has changed: {some}. " in found.value.hint
    rows[3] = prepared_row(3)
    grown = write_prepared(tmp_path / "grown", [*rows[:14], prepared_row(20)], rows[14:17])
    with pytest.raises(UserError, match="data_fingerprint") as found:
        run(train_recipe(data=grown), "train.samples=5")
    assert "train has 15 rows and had 14, validation has 3 rows and had 4. " in found.value.hint


def test_never_and_a_path(train_recipe: Recipe, tmp_path: Path) -> None:
    path = train_recipe()
    run(path, "train.samples=12")
    with pytest.raises(UserError, match="already holds checkpoints"):
        run(path, "train.samples=12", resume="never")
    with pytest.raises(UserError, match="is no checkpoint"):
        run(path, "train.samples=12", resume=str(tmp_path / "nowhere"))
    folder = RunFolder(path.parent / "run")
    before = read_metrics(folder.metrics)
    old = checkpoint.read(folder.checkpoints / "12")
    assert run(path, "train.samples=12", resume=str(folder.checkpoints / "8")).is_finished
    new = checkpoint.read(folder.checkpoints / "12")
    assert all(torch.equal(old.trained[key], new.trained[key]) for key in old.trained)
    assert read_metrics(folder.metrics) == before


def test_a_folder_of_something_else_is_left_alone(train_recipe: Recipe) -> None:
    path = train_recipe(output="photos")
    (path.parent / "photos").mkdir()
    (path.parent / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="is no run folder"):
        run(path)


def test_two_processes_do_not_write_one_run(train_recipe: Recipe) -> None:
    path = train_recipe()
    code = (
        "import sys; from pathlib import Path; from sdtrain.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).writing(): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path.parent / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for settings in ((), ("model.path=not-there",)):  # said before anything is opened
            with pytest.raises(UserError, match=f"process {holder.pid}"):
                run(path, *settings)
    finally:
        holder.kill()
        holder.wait()
    assert RunFolder(path.parent / "run").writing().__enter__() is None  # died with its holder


def command(path: Path) -> list[str]:
    return [sys.executable, "-m", "sdtrain.cli", "run", str(path), "--json"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups to signal")
def test_what_reaches_every_process_of_a_job_stops_it_gently(train_recipe: Recipe) -> None:
    """As clusters end a job: SIGTERM to program and loaders, and once more by a launcher."""
    path = train_recipe()
    settings = ["train.samples=400", "data.workers=2", "checkpoint.every_samples=400"]
    words = [word for setting in settings for word in ("--set", setting)]
    process = subprocess.Popen(
        [*command(path), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not read_metrics(path.parent / "run" / "metrics.jsonl"):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    stopped = json.loads(out)
    assert not stopped["is_finished"]
    assert stopped["checkpoint"]
    assert stopped["samples_seen"] > 0


def test_asked_twice_it_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the same request, on another way
        assert stop.is_set
        monkeypatch.setattr(stopping, "SAME_REQUEST_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_weights(train_recipe: Recipe) -> None:
    whole, killed = train_recipe(output="whole"), train_recipe(output="killed")
    run(whole)
    chance = random.Random(7)  # what a machine has done by then varies enough
    metrics = killed.parent / "killed" / "metrics.jsonl"
    for least in (chance.randint(1, 3), chance.randint(2, 6)):
        process = subprocess.Popen(
            command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(read_metrics(metrics)) < least:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.4)
        process.kill()
        process.wait()
    done = subprocess.run(command(killed), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["is_finished"] is True
    assert_same_end(whole.parent / "whole", killed.parent / "killed")
