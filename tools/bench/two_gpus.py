"""One GPU against two: whether they end in the same weights, and how fast each engine is.

    python tools/bench/two_gpus.py --to results/                       # a machine with two GPUs
    python tools/bench/two_gpus.py --to results/ --device cpu --quick  # the same on gloo, tiny

First a tiny model is trained for 30 AdamW steps in float32: by one process with accumulation, and
by two with each engine. Then full-size SDXL with random weights is timed, LoRA and full, in bf16.
Data and models are made on the spot; nothing is downloaded, and the steps are those of `sdtrain
run`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sdtrain.picture_rows import PictureRows

STEPS = 30
BATCH = 4
WARM_UP = 3
TOLERANCE = 1e-5


class Captioned(PictureRows):
    """Pictures in memory whose texts are captions; the loader's workers find it here."""

    def records(self, rows: Any) -> list[dict[str, Any]]:
        """What a prompt is rendered from."""
        return [{**record, "tags": []} for record in super().records(rows)]


def main() -> None:
    """Run every case in processes of its own and write `two_gpus.md` and `two_gpus.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="Time the tiny model, not full size.")
    parser.add_argument("--only", choices=("agreement", "speed"))
    parser.add_argument("--steps", type=int, default=10, help="Timed steps.")
    parser.add_argument("--micro", type=int, default=4, help="Samples per GPU and step when timed.")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments)
        return
    to = arguments.to.resolve()
    to.mkdir(parents=True, exist_ok=True)
    write_models(to)
    found: list[dict[str, Any]] = []
    for processes in (1, 2):
        found += launched(to, processes, cases(processes, arguments), arguments)
    compare(to, found)
    (to / "two_gpus.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (to / "two_gpus.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    wanted = sum(len(cases(processes, arguments)) for processes in (1, 2))
    if len(found) < wanted or not all(case.get("agrees", True) for case in found):
        sys.exit(f"{wanted - len(found)} of {wanted} cases are missing, or some do not agree")


def cases(processes: int, arguments: Any) -> list[dict[str, Any]]:
    """What one launch measures."""
    engines = ["ddp"] if processes == 1 else ["ddp", "fsdp2"]
    engines += ["deepspeed"] if processes == 2 and find_spec("deepspeed") else []
    listed: list[dict[str, Any]] = []
    if arguments.only != "speed":
        listed += [{"kind": "agreement", "engine": engine, "adapter": "full"} for engine in engines]
    if arguments.only != "agreement":
        listed += [
            {"kind": "speed", "engine": engine, "adapter": adapter}
            for adapter in ("lora", "full")
            for engine in engines
        ]
    return [{**case, "processes": processes} for case in listed]


def write_models(to: Path) -> None:
    """The tiny model, once."""
    if not (to / "tiny").is_dir():
        from sdtrain.tiny import write_tiny

        write_tiny("sdxl", to / "tiny", 7)


def launched(
    to: Path, processes: int, listed: list[dict[str, Any]], arguments: Any
) -> list[dict[str, Any]]:
    """Measure cases in connected processes; what the main one found."""
    from sdtrain.launch import _free_port

    jobs = to / f"jobs-{processes}.json"
    jobs.write_text(json.dumps(listed), encoding="utf-8")
    words = ["--to", str(to), "--device", arguments.device, "--worker", str(jobs)]
    words += ["--steps", str(arguments.steps), "--micro", str(arguments.micro)]
    words += ["--quick"] if arguments.quick else []
    port = str(_free_port())
    workers = []
    for rank in range(processes):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
        env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        env |= {"MASTER_ADDR": "127.0.0.1"}
        workers.append(subprocess.Popen([sys.executable, __file__, *words], env=env))
    while any(worker.poll() is None for worker in workers):
        if any(worker.poll() for worker in workers):  # one failed: the others wait in vain
            time.sleep(15)
            for worker in workers:
                worker.kill()
        time.sleep(0.2)
    if any(worker.returncode for worker in workers):
        print(f"{processes} processes ended with {[w.returncode for w in workers]}", flush=True)
    lines = to / f"found-{processes}.jsonl"
    return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]


# --- in a worker ---------------------------------------------------------------------------------


def work(arguments: Any) -> None:
    """Run every case of a launch; the main process appends a line for each."""
    from sdtrain.world import connected, end_process

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    listed = json.loads(arguments.worker.read_text(encoding="utf-8"))
    place = arguments.to / f"found-{listed[0]['processes']}.jsonl"
    with connected() as world:
        if world.is_main:
            place.write_text("", encoding="utf-8")
        for case in listed:
            line = measure(case, arguments, world)
            if world.is_main:
                with place.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
            gc.collect()
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
    end_process(0)


def measure(case: dict[str, Any], arguments: Any, world: Any) -> dict[str, Any]:
    """Train one case for its steps; seconds a step, peak memory, or the tensors kept."""
    from sdtrain.run import Run
    from sdtrain.run_folder import RunFolder

    is_speed = case["kind"] == "speed"
    setup = open_case(case, arguments, world)
    run = Run(setup, RunFolder(arguments.to / "no run"))
    if not is_speed:
        train(run, STEPS)
        keep(run, arguments.to / f"{name(case)}.safetensors")
        return case
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = train(run, arguments.steps)
    peak = torch.cuda.max_memory_allocated() / 1e9 if arguments.device == "cuda" else 0.0
    samples = setup.recipe.data.batch_size
    return {
        **case,
        "trained_parameters": sum(p.numel() for p in run.trained.values()),
        "samples_per_step": samples,
        "seconds_per_step": round(seconds, 4),
        "images_per_second": round(samples / seconds, 3),
        "peak_gb": round(peak, 2),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def train(run: Any, count: int) -> float:
    """Take some steps; seconds a step, of those after the warm-up."""
    from sdtrain.trainer import steps
    from sdtrain.update import take_step

    is_cuda = run.setup.device.type == "cuda"
    started = time.perf_counter()
    for number, parts in enumerate(steps(run)):
        if number == min(WARM_UP, count - 1):
            _ = torch.cuda.synchronize() if is_cuda else None
            started = time.perf_counter()
        take_step(run, parts)
        if number + 1 == count + (WARM_UP if count < STEPS else 0):
            break
    _ = torch.cuda.synchronize() if is_cuda else None
    return (time.perf_counter() - started) / (number + 1 - min(WARM_UP, count - 1))


def keep(run: Any, path: Path) -> None:
    """Write the trained tensors, whole."""
    from safetensors.torch import save_file

    tensors = {key: run.setup.engine.take(p) for key, p in run.trained.items()}
    if run.setup.world.is_main:
        save_file(tensors, path)


def open_case(case: dict[str, Any], arguments: Any, world: Any) -> Any:
    """The setup of `sdtrain run` over pictures made here, and a model of either size."""
    from sdprep.prompt_policy import PromptPolicy
    from sdprep.recipe import validate
    from sdtrain import setup as setups
    from sdtrain.dataset import TrainingData
    from sdtrain.recipe import TrainRecipe

    is_full_size = case["kind"] == "speed" and not arguments.quick
    side = 1024 if is_full_size else 64
    rows = pictures(side, ragged=case["kind"] == "agreement")
    policy = PromptPolicy.model_validate({"mode": "caption"})
    data = TrainingData("made here", rows, None, policy, "this benchmark", "", {})
    setups.open_data = lambda *_, **__: data
    if is_full_size:
        setups.open_model = open_full_size
    batch = BATCH if case["kind"] == "agreement" else arguments.micro * world.size
    wanted: dict[str, Any] = {
        "output": str(arguments.to / "no run"),
        "model": {"family": "sdxl", "path": str(arguments.to / "tiny")},
        "data": {
            "path": "made here",
            "batch_size": batch,
            "micro_batch_size": 1 if case["kind"] == "agreement" else arguments.micro,
            "resolution_px": side,
            "max_upscale": 4.0,
            "workers": 2 if is_full_size else 0,
        },
        "train": {
            "samples": batch * STEPS - 1,
            "rules": [{"match": "unet.**", "lr": 1e-3 if case["kind"] == "agreement" else 1e-5}],
        },
        "adapter": {"type": case["adapter"]},
        "precision": {
            "mixed": "bf16" if is_full_size else "no",
            "device": arguments.device,
        },
        "distributed": {"engine": case["engine"]},
    }
    return setups.open_setup(validate(wanted, TrainRecipe, "two_gpus"), world)


def pictures(side: int, *, ragged: bool) -> Any:
    """Keyed noise as pictures: square, or of several shapes and text lengths."""
    from PIL import Image

    from sdprep.seeding import rng_for

    shapes = [(side, side), (side * 2 // 3, side * 3 // 2), (side * 3 // 2, side * 2 // 3)]
    found, prompts = [], []
    for number in range(18):
        width, height = shapes[number % 3 if ragged else 0]
        draw = rng_for(5, "picture", number).integers(0, 256, (height // 8, width // 8, 3), "uint8")
        found.append(Image.fromarray(draw).resize((width, height)))
        more = ", a long sentence that goes on and on" * (12 if ragged and number % 5 == 0 else 0)
        prompts.append(f"photo number {number} of a dog{more}")
    return Captioned(found, prompts)


def open_full_size(recipe: Any, device: torch.device) -> Any:
    """In place of `setup.open_model`: full-size SDXL with random weights, nothing hashed."""
    from sdxl_step import networks

    from sdtrain import run as runs
    from sdtrain.families.sdxl import Config, StableDiffusionXL
    from sdtrain.freezing import build_plan

    runs.tensor_hashes = lambda named: {name: "" for name, _ in named}  # type: ignore[assignment]
    family = StableDiffusionXL(
        networks(device), Config(gradient_checkpointing=True), recipe.precision.mixed
    )
    family.to(device)
    adapter = recipe.adapter.build()
    plan = build_plan(family, recipe.train.rules, adapter)
    return family, adapter, defaultdict(str), plan


# --- results -------------------------------------------------------------------------------------


def name(case: dict[str, Any]) -> str:
    """Of the file of a case."""
    return f"{case['processes']}-{case['engine']}"


def compare(to: Path, found: list[dict[str, Any]]) -> None:
    """Put into every case of agreement how far it ended from the one process."""
    from safetensors.torch import load_file

    for case in found:
        if case["kind"] == "agreement":
            one, other = (
                load_file(to / "1-ddp.safetensors"),
                load_file(to / f"{name(case)}.safetensors"),
            )
            apart = sum(float((one[k] - other[k]).double().square().sum()) for k in one)
            size = sum(float(one[k].double().square().sum()) for k in one)
            case["relative_difference"] = math.sqrt(apart / size)
            case["agrees"] = case["relative_difference"] <= TOLERANCE


def table(found: list[dict[str, Any]]) -> str:
    """Both results as Markdown."""
    lines = [
        "| processes | engine | difference after 30 steps | within 1e-5 |",
        "|---|---|---|---|",
    ]
    for case in found:
        if case["kind"] == "agreement":
            lines.append(
                f"| {case['processes']} | {case['engine']} | {case['relative_difference']:.2g} "
                f"| {'yes' if case['agrees'] else 'NO'} |"
            )
    lines += ["", "| adapter | processes | engine | s/step | images/s | peak GB per GPU |"]
    lines.append("|---|---|---|---|---|---|")
    for case in found:
        if case["kind"] == "speed":
            lines.append(
                f"| {case['adapter']} | {case['processes']} | {case['engine']} "
                f"| {case['seconds_per_step']} | {case['images_per_second']} | {case['peak_gb']} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
