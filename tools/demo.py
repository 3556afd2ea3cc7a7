"""The whole chain on real photos, on a CPU, from nothing: what a new user runs first.

    python tools/demo.py [--to DIR] [--fresh]

Standard library only up to `enter`, which makes the environment.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from _setup import ROOT, enter, venv_python

RECIPE = Path("recipes/tiny/prep.toml")


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
    print(f"\nall of it took {time.monotonic() - started:.0f} s; the data set: {prepared}")


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
    step("photos in, a prepared data set out", "sdprep", "run", str(RECIPE), *places)
    step("the same command again finds nothing left to do", "sdprep", "run", str(RECIPE), *places)
    step("where the table stands", "sdprep", "status", str(table))
    policy = ["--policy", str(RECIPE)]
    step(
        "the text that a trainer will see", "sdprep", "prompts", str(table), "--count", "3", *policy
    )
    step("the published split, checked again", "sdprep", "split", str(prepared), "--verify")
    return prepared


def step(title: str, program: str, *arguments: str) -> None:
    """Show and run one command of ours; stop the demonstration if it fails."""
    shown = " ".join(arguments).replace(str(ROOT) + "/", "")
    print(f"\n== {title}\n$ {program} {shown}", flush=True)
    started = time.monotonic()
    command = [str(venv_python()), "-m", f"{program}.cli", *arguments]
    status = subprocess.call(command, cwd=ROOT)
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
