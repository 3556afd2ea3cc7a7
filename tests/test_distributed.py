"""Several processes do what one does: real ones, connected by gloo, against a run alone."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdprep.errors import UserError
from sdtrain import checkpoint, launch, trainer
from sdtrain.engine import PIECE_BYTES, _pieces
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import open_setup
from sdtrain.stopping import StopRequest
from sdtrain.trackers.jsonl import read_metrics
from sdtrain.world import ALONE, World, _announced, what_failed
from tests import mini_family
from tests.train_data import SIZES, prepared_row, write_prepared, write_recipe

torch.set_num_threads(1)

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-5
BASE = (
    *("data.resolution_px=32", "data.run_samples=3", "train.samples=119", "schedule.type=constant"),
    *("schedule.warmup_samples=0", "checkpoint.every_samples=1000", "optimizer.type=adamw"),
    *("validation.images=2", "validation.train_probe_images=3", "validation.every_samples=1000"),
    "validation.timesteps_per_image=3",
    'train.rules=[{match="unet.**", lr=3e-3}, {match="text_encoder.**", lr=1e-2},'
    ' {match="unet.time.**", freeze=true}]',
)
"""30 steps of 4 samples, the last of 3; ragged sizes and texts; two parts, and one frozen rule."""


def job(
    root: Path, name: str, *settings: str, micro: int = 1, stop_after: int = 0
) -> dict[str, Any]:
    out = (f"output={(root / name).as_posix()}", f"data.micro_batch_size={micro}")
    return {
        "recipe": str(root / "recipe.toml"),
        "settings": [*BASE, *out, *settings],
        "stop_after": stop_after,
    }


FSDP = "distributed.engine=fsdp2"
ZERO = "distributed.engine=deepspeed"
PHASES = (
    'train.phases=[{samples=9, parts=["unet"]}, {samples=12, parts=["text_encoder"]}]',
    "train.repeat_phases=true",
)
FREE = ("optimizer.type=schedule_free", "optimizer.weight_decay=0.01")


def jobs_of(root: Path, world: int) -> list[dict[str, Any]]:
    """What each launch trains; the two that are stopped are gone on with by others."""
    if world == 2:
        return [
            job(root, "2", micro=2),
            job(root, "2-fsdp", FSDP, "ema.half_life_samples=8", micro=2),
            job(root, "2-stopped", stop_after=7),
            job(root, "2-stopped-fsdp", FSDP, stop_after=7),
            job(root, "2-stopped-phases", FSDP, *PHASES, stop_after=7),
            job(root, "2-stopped-free", FSDP, *FREE, stop_after=7),
        ]
    if world == 3:
        return [
            job(root, "3", micro=3),
            job(root, "3-fsdp", FSDP),
            job(root, "3-went-on"),
            job(root, "3-went-on-fsdp", FSDP),
            job(root, "3-went-on-phases", FSDP, *PHASES),
            job(root, "3-went-on-free", FSDP, *FREE),
        ]
    return [job(root, "4")]


def launched(root: Path, world: int, jobs: Sequence[dict[str, Any]]) -> None:
    """Train in `world` processes of their own."""
    listed = root / f"jobs-{world}.json"
    listed.write_text(json.dumps(jobs), encoding="utf-8")
    port = launch._free_port()
    workers = []
    for rank in range(world):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world)}
        env |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(HERE / "distributed_worker.py"), str(listed)]
        workers.append(
            subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        )
    try:
        said = [worker.communicate(timeout=600)[1].decode() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * world, "\n".join(said)
    if all(job.get("is_mini", True) for job in jobs):  # libraries of real families chat
        assert not any(said[1:]), f"only the main process talks, not: {said[1:]}"


def went_on(root: Path, source: str, to: str) -> None:
    shutil.copytree(root / source, root / to)


def ready(root: Path) -> Path:
    """A folder with a prepared data set and a recipe."""
    rows = [
        prepared_row(number, caption="a dog" + " and more of it" * (number % 7 * 2 % 5))
        for number in range(18)
    ]
    assert len({SIZES[number % len(SIZES)] for number in range(18)}) > 2
    data = write_prepared(root / "prepared", rows[:14], rows[14:])
    write_recipe(
        root / "recipe.toml", model=root / "no", data=data, output=root / "no", family="sd15"
    )
    return root


def mini_in_place(patch: pytest.MonkeyPatch) -> None:
    """Let this process train the mini family, as the workers do."""
    patch.setattr("sdtrain.setup.open_model", mini_family.open_mini)
    patch.setattr("sdtrain.hand_over.open_model", mini_family.open_mini)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: `1` alone, the others in several processes."""
    root = ready(tmp_path_factory.mktemp("distributed runs"))  # a space in the path, on purpose
    with pytest.MonkeyPatch.context() as patch:
        mini_in_place(patch)
        alone(root, "1", micro=4)
        launched(root, 2, jobs_of(root, 2))
        for kind in ("", "-fsdp"):
            went_on(root, f"2-stopped{kind}", f"3-went-on{kind}")
            went_on(root, f"2-stopped{kind}", f"1-went-on{kind}")
        for kind in ("-phases", "-free"):
            went_on(root, f"2-stopped{kind}", f"3-went-on{kind}")
        launched(root, 3, jobs_of(root, 3))
        launched(root, 4, jobs_of(root, 4))
        alone(root, "1-went-on")
        alone(root, "1-went-on-fsdp", FSDP)
        alone(root, "1-ema", "ema.half_life_samples=8", micro=4)
        alone(root, "1-phases", *PHASES, micro=4)
        alone(root, "1-free", *FREE, micro=4)
    return root


def alone(root: Path, name: str, *settings: str, micro: int = 1) -> None:
    wanted = job(root, name, *settings, micro=micro)
    trainer.train(load_train_recipe(wanted["recipe"], wanted["settings"]))


def end(root: Path, name: str) -> checkpoint.Snapshot:
    return checkpoint.read(root / name / "checkpoints" / "119")


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative difference of all tensors together."""
    assert a.keys() == b.keys()
    apart = sum(float((a[key] - b[key]).double().square().sum()) for key in a)
    return math.sqrt(apart / sum(float(a[key].double().square().sum()) for key in a))


OTHERS = (
    *("2", "2-fsdp", "3", "3-fsdp", "4"),
    *("1-went-on", "1-went-on-fsdp", "3-went-on", "3-went-on-fsdp"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_any_number_of_processes_ends_in_the_same_weights(runs: Path, name: str) -> None:
    one, other = end(runs, "1"), end(runs, name)
    assert one.state["step"] == other.state["step"] == 30
    apart = distance(one.trained, other.trained)
    assert apart < TOLERANCE
    assert distance(one.optimizer, other.optimizer) < TOLERANCE
    moved = other.state["trained_start"]
    assert moved == one.state["trained_start"]
    assert sorted(moved) == ["text_encoder", "unet"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["phases", "free"])
def test_what_a_sharded_run_can_beside_adamw_ends_in_the_same_weights(
    runs: Path, kind: str
) -> None:
    one, other = end(runs, f"1-{kind}"), end(runs, f"3-went-on-{kind}")
    assert one.state["step"] == other.state["step"] == 30
    assert distance(one.trained, other.trained) < TOLERANCE
    assert distance(one.optimizer, other.optimizer) < TOLERANCE
    assert distance(one.trained, end(runs, "1").trained) > 100 * TOLERANCE


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.slow
def test_every_number_that_is_logged_is_the_same(runs: Path, name: str) -> None:
    ones = read_metrics(runs / "1" / "metrics.jsonl")
    others = [
        line
        for line in read_metrics(runs / name / "metrics.jsonl")
        if not line.get("set", "").endswith("_ema")  # one of the runs has averages as well
    ]
    assert [line["samples_seen"] for line in ones] == [line["samples_seen"] for line in others]
    for one, other in zip(ones, others, strict=True):
        assert list(one) == list(other)
        for key in ("loss", "loss_debiased", "grad_norm", "mean"):
            if one.get(key) is not None:
                assert other[key] == pytest.approx(one[key], rel=2e-4), (one["samples_seen"], key)
    # before the first step the model is the same, so what is measured must be, to rounding
    assert others[0]["kind"] == "validation"
    assert others[0]["mean"] == pytest.approx(ones[0]["mean"], rel=1e-6)
    assert others[0]["probe_id"] == ones[0]["probe_id"]


@pytest.mark.parametrize("name", ["2", "3", "4", "2-fsdp", "3-fsdp"])
@pytest.mark.slow
def test_stable_eval_does_not_depend_on_the_number_of_processes(runs: Path, name: str) -> None:
    matrices = sorted((runs / "1" / "validation").glob("*/0.npz"))
    assert len(matrices) == 2
    for path in matrices:
        there = runs / name / path.relative_to(runs / "1")
        with np.load(path) as one, np.load(there) as other:
            np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-6)
            assert (other["u"] == one["u"]).all()


@pytest.mark.slow
def test_averages_and_the_model_come_whole_out_of_a_sharded_run(runs: Path) -> None:
    from safetensors.torch import load_file

    one, other = end(runs, "1-ema"), end(runs, "2-fsdp")
    assert distance(one.more["ema"], other.more["ema"]) < TOLERANCE
    model = load_file(runs / "2-fsdp" / "model" / "mini.safetensors")
    for path, tensor in other.trained.items():
        assert torch.equal(model[path], tensor)


@pytest.mark.slow
def test_compiled_blocks_may_be_spread(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    root = ready(tmp_path)
    compiled = ("compile.mode=blocks", "compile.backend=aot_eager", "train.samples=8")
    model = f"model.path={tiny_model('sd15').as_posix()}"
    rules = 'train.rules=[{match="unet.**", lr=1e-3}]'
    alone(root, "1", *compiled, model, rules, micro=2)
    wanted = job(root, "2", *compiled, model, rules, FSDP)
    launched(root, 2, [{**wanted, "is_mini": False}])
    one, two = (checkpoint.read(root / name / "checkpoints" / "8") for name in "12")
    assert distance(one.trained, two.trained) < TOLERANCE
    assert distance(one.optimizer, two.optimizer) < TOLERANCE


@pytest.mark.slow
def test_one_process_that_is_asked_to_stop_stops_all_after_the_same_step(runs: Path) -> None:
    for kind in ("", "-fsdp"):
        kept = checkpoint.checkpoints(runs / f"2-stopped{kind}" / "checkpoints")
        assert [path.name for path in kept] == ["28"]
        last = read_metrics(runs / f"2-stopped{kind}" / "metrics.jsonl")[-1]
        assert last["samples_seen"] == 28


# --- what each process takes ---------------------------------------------------------------------


def test_shares_are_contiguous_and_whole() -> None:
    for count in range(12):
        for size in range(1, 6):
            shares = [World(rank, size).share(count) for rank in range(size)]
            assert [at for share in shares for at in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_gradients_travel_in_pieces_of_one_type_in_order() -> None:
    gradients = [torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.zeros(1)]
    assert [[len(g) for g in piece] for piece in _pieces(gradients)] == [[3], [2], [1]]
    large = [torch.empty(PIECE_BYTES // 4, device="meta") for _ in range(3)]
    assert [len(piece) for piece in _pieces([*large, torch.zeros(1)])] == [1, 1, 1, 1]


# --- launchers that announce what is not there ---------------------------------------------------


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"RANK": "0"}, "WORLD_SIZE is not"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            "does not fit",
        ),
        ({"WORLD_SIZE": "two"}, "no number"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "started only this one"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun"),
    ],
)
def test_a_world_that_is_announced_and_not_there_is_refused(
    env: dict[str, str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        _announced(env)


def test_one_process_needs_no_world() -> None:
    assert _announced({}) == _announced({"WORLD_SIZE": "1", "RANK": "0"}) == ALONE
    assert _announced({"ACCELERATE_MIXED_PRECISION": "no"}) == ALONE  # accelerate launch alone


@pytest.mark.slow
def test_accelerate_that_starts_one_process_for_two_is_refused(tmp_path: Path) -> None:
    """The real launcher, in case it leaves other traces one day."""
    script = tmp_path / "script.py"
    script.write_text(
        "from sdtrain.world import connected\nwith connected() as w: print('size', w.size)\n"
    )
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    done = subprocess.run(
        [*accelerate, "--num_processes", "2", "--cpu", str(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
    )
    assert done.returncode != 0
    assert "announced several processes, but started only this one" in done.stderr
    assert "size" not in done.stdout


@pytest.mark.parametrize(
    ("asked", "words"),
    [("cuda:1", "names one device for 2 processes"), ("cuda", "sees no NVIDIA GPU")],
)
def test_a_device_that_cannot_be_shared_is_refused(asked: str, words: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=words):
        World(0, 2, 0, 2).device(asked)
    assert World(1, 2, 1, 2).device("cpu").type == "cpu"


def test_fewer_gpus_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes on this machine, but PyTorch sees 1 GPUs"):
        World(0, 2, 0, 2).device("auto")


def test_num_processes_beside_another_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a launcher has started this process already"):
        launch.launch(["run", "recipe.toml"], 2)


def test_what_an_engine_cannot_do_is_refused(train_recipe: Any) -> None:
    for settings, words in (
        (["optimizer.type=adafactor", FSDP], "cannot go with optimizer adafactor"),
        (["precision.mixed=fp16", FSDP], "cannot go with precision.mixed fp16"),
        (["precision.mixed=bf16", "precision.parameters=bf16", FSDP], "with precision.parameters"),
        (["ema.half_life_samples=8", "ema.device=cpu", FSDP], "cannot go with ema.device cpu"),
        (['train.phases=[{samples=8, parts=["unet"]}]', ZERO], "cannot go with train.phases"),
        (["compile.mode=blocks", ZERO], "cannot go with compile.mode"),
        (
            ["optimizer.type=schedule_free", "schedule.type=constant", ZERO],
            r"schedule_free \(adamw and sgd can\)",
        ),
    ):
        with pytest.raises(UserError, match=words):
            load_train_recipe(train_recipe(), settings)


def test_ctrl_break_is_a_request_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.name != "nt":  # the signal exists on Windows only; another stands in for it
        monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGBREAK)  # type: ignore[attr-defined]
        assert stop.is_set


# --- through the command line --------------------------------------------------------------------


def command(path: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "sdtrain.cli", "run", str(path), *words]


def wait_for(metrics: Path, lines: int, process: subprocess.Popen[bytes]) -> None:
    while len(read_metrics(metrics)) < lines and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.slow
def test_the_command_line_stops_and_goes_on_with_another_number(
    train_recipe: Any, tmp_path: Path
) -> None:
    path = train_recipe()
    settings = ["data.resolution_px=32", "train.samples=62", "adapter.type=lora", "adapter.rank=2"]
    words = [word for setting in settings for word in ("--set", setting)]
    whole = trainer.train(load_train_recipe(path, [*settings, f"output={tmp_path / 'whole'}"]))
    assert whole.checkpoint is not None
    both = subprocess.Popen(
        command(path, *words, "--num-processes", "2", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_for(tmp_path / "run" / "metrics.jsonl", 1, both)
    both.send_signal(signal.SIGTERM)
    out, err = both.communicate(timeout=300)
    assert both.returncode == 0, err.decode()
    stopped = json.loads(out)
    assert not stopped["is_finished"]
    assert 0 < stopped["samples_seen"] < 62
    outcome = trainer.train(load_train_recipe(path, settings))
    assert outcome.is_finished
    assert outcome.checkpoint is not None
    ends = [checkpoint.read_trained(Path(each.checkpoint)) for each in (whole, outcome)]
    assert distance(*ends) < TOLERANCE


def run_failing(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_an_error_of_all_processes_is_said_once(train_recipe: Any, tmp_path: Path) -> None:
    path = train_recipe()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cat.jpg").write_bytes(b"")
    done = run_failing(command(path, "--num-processes", "2"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("is no run folder") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_picture_that_one_process_cannot_read_is_said_once_and_written_down(
    train_recipe: Any, tmp_path: Path
) -> None:
    """Process 0 only loses its peer; what it writes down is the cause, not that."""
    rows = [prepared_row(number) for number in range(8)]
    path = train_recipe(data=write_prepared(tmp_path / "data", rows))
    setup = open_setup(load_train_recipe(path, ["data.resolution_px=32"]), ALONE)
    last = next(setup.order.steps(0, 22, 4)).slots[-1].sample_id  # a sample of process 1
    next(row for row in rows if row["id"] == last)["image"]["bytes"] = b"no picture"
    write_prepared(tmp_path / "data", rows)
    words = ("--set", "data.resolution_px=32", "--set", "data.workers=1")
    done = run_failing(command(path, "--num-processes", "2", *words))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("does not decode") == 1
    assert "There is no checkpoint yet" in done.stderr
    assert "Traceback" not in done.stderr
    assert "leaked" not in done.stderr
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert f"({last})" in line["message"]


@pytest.mark.parametrize("why", ["disk full", ""])
def test_a_process_that_lost_another_says_what_that_one_said_or_that_it_said_nothing(
    monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    class Store:
        def check(self, keys: list[str]) -> bool:
            return bool(why)

        def get(self, key: str) -> bytes:
            return why.encode()

    monkeypatch.setattr("sdtrain.world._stores", [Store()])
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    assert what_failed(lost).startswith(why or "another process ended without a word")
    assert what_failed(UserError("mine")) == "mine"
