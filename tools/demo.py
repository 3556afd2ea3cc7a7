"""The whole chain on real photos, on a CPU, from nothing: what a new user runs first.

    python tools/demo.py [--to DIR] [--fresh]

Standard library only up to `enter`, which makes the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from _setup import ROOT, enter, venv_python

PREPARE = Path("recipes/tiny/prep.toml")
TRAIN = Path("recipes/tiny/sdxl.toml")
STOP_AT = 640  # samples: the run is stopped once it has a checkpoint there, and run again


def main() -> None:
    """Run every step and say what it did."""
    arguments = _arguments()
    enter(__file__)
    to: Path = arguments.to
    if arguments.fresh and to.exists():
        shutil.rmtree(to)
    started = time.monotonic()
    print(f"sdprep + sdtrain: the demonstration, into {to}\n", flush=True)
    prepared = prepare(to)
    reopen(prepared)
    run = train(to, prepared)
    report(run)
    print(f"\nall of it took {time.monotonic() - started:.0f} s")
    print(f"the data set:        {prepared}")
    print(f"pictures over time:  {run / 'samples' / 'grid.png'}")
    print(f"the whole story:     {run / 'report.html'}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--to", type=Path, default=ROOT / "demo", help="folder for the results")
    parser.add_argument("--fresh", action="store_true", help="delete earlier results first")
    arguments = parser.parse_args()
    arguments.to = arguments.to.resolve()
    return arguments


def prepare(to: Path) -> Path:
    """From photos to a prepared data set; returns its folder."""
    table, prepared = to / "photos.lance", to / "photos-prepared"
    places = ["--set", f"table={table}", "--set", f"publish.to={prepared}"]
    step("photos in, a prepared data set out", "sdprep", "run", str(PREPARE), *places)
    step("the same command again finds nothing left to do", "sdprep", "run", str(PREPARE), *places)
    step("where the table stands", "sdprep", "status", str(table))
    policy = ["--policy", str(PREPARE)]
    step(
        "the text that a trainer will see", "sdprep", "prompts", str(table), "--count", "3", *policy
    )
    step("the published split, checked again", "sdprep", "split", str(prepared), "--verify")
    return prepared


def train(to: Path, prepared: Path) -> Path:
    """Train a tiny model, stop it on the way, go on; returns the run folder."""
    model, run = to / "tiny-sdxl", to / "run-sdxl"
    if not (model / "model_index.json").is_file():
        step("a tiny random model of SDXL's shape", "sdtrain", "tiny", "sdxl", str(model))
    places = {"model.path": model, "data.path": prepared, "output": run}
    settings = [word for key, value in places.items() for word in ("--set", f"{key}={value}")]
    arguments = ["run", str(TRAIN), *settings]
    if not any((run / "checkpoints").glob("[0-9]*")):
        stop_on_the_way("training, until it is stopped on the way", run, arguments)
    step("the same command again goes on from there", "sdtrain", *arguments)
    return run


def stop_on_the_way(title: str, run: Path, arguments: list[str]) -> None:
    """Start training and end the process when its first checkpoint stands."""
    announce(title, "sdtrain", arguments)
    process = subprocess.Popen(command("sdtrain", arguments), cwd=ROOT, env=environment())
    while process.poll() is None:
        if any(int(path.name) >= STOP_AT for path in (run / "checkpoints").glob("[0-9]*")):
            process.terminate()
            process.wait()
            print("   (stopped)", flush=True)
            return
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"sdtrain ended with status {process.returncode}")


def report(run: Path) -> None:
    """Say what the evaluations found; every number is read from the run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    print("\n== loss on fixed images, noise and noise levels, in % since the start")
    for name in ("validation", "train_probe"):
        found = [x for x in lines if x["kind"] == "validation" and x["set"] == name]
        curve = "  ".join(f"{x['change_percent']:+.1f}" for x in found)
        print(f"{name:<12} {curve}")
        if len(found) > 10 or found[-1]["ci95_percent"][1] >= 0:
            sys.exit(f"the {name} loss did not fall for certain, or was measured too often")


def command(program: str, arguments: Sequence[str]) -> list[str]:
    """How to start a program of ours."""
    return [str(venv_python()), "-m", f"{program}.cli", *arguments]


def environment() -> dict[str, str]:
    """Tiny matrices are quickest on one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def announce(title: str, program: str, arguments: Sequence[str]) -> None:
    """Say what comes, and the command that a user would type."""
    shown = " ".join(arguments).replace(f"{ROOT}{os.sep}", "")
    print(f"\n== {title}\n$ {program} {shown}", flush=True)


def step(title: str, program: str, *arguments: str) -> None:
    """Show and run one command of ours; stop the demonstration if it fails."""
    announce(title, program, arguments)
    started = time.monotonic()
    status = subprocess.call(command(program, arguments), cwd=ROOT, env=environment())
    if status:
        sys.exit(f"{program} ended with status {status}")
    print(f"   ({time.monotonic() - started:.1f} s)", flush=True)


def reopen(prepared: Path) -> None:
    """Open the data set as any user of `datasets` would, and look for what must not be in it."""
    import tempfile

    import datasets

    print('\n== reopened\n>>> datasets.load_dataset("photos-prepared")', flush=True)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        data = datasets.load_dataset(str(prepared), cache_dir=cache)
        for split, rows in data.items():
            pictures = [row["image"] for row in rows]
            pixels = sum(picture.width * picture.height for picture in pictures)
            located = sum(bool(picture.getexif().get_ifd(0x8825)) for picture in pictures)
            print(
                f"{split}: {len(rows)} pictures decode, {pixels / 1e6:.1f} million pixels, "
                f"{located} with a GPS position"
            )
            if located:
                sys.exit("a published picture still says where it was taken")
        first = data["train"][0]
        print(f"first: {first['caption']!r}, {len(first['tags'])} tags, score {first['score']}")
        shared = set(data["train"]["group_id"]) & set(data["validation"]["group_id"])
        if shared:
            sys.exit(f"{len(shared)} groups of near duplicates are in both splits")
        print("no group of near duplicates is in both splits")


if __name__ == "__main__":
    main()
