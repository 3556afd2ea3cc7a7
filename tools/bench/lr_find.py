"""Whether the rate that `sdtrain lr-find` advises beats ten times and a tenth of itself.

    python tools/bench/lr_find.py --data demo/photos-prepared --model demo/tiny-sdxl

Trains the tiny model of the demonstration on real photos: one ramp, then three runs of equal length
at the advised rate, ×10 and ÷10, compared on one probe. Minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from sdprep.recipe import validate
from sdtrain.compare import compare_paths
from sdtrain.lr_find import find_lr, with_rates
from sdtrain.recipe import TrainRecipe, load_train_recipe
from sdtrain.trainer import train

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "tiny" / "sdxl.toml"
RESULTS = ROOT / "tools" / "bench" / "results"


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a prepared folder")
    parser.add_argument("--model", type=Path, required=True, help="a tiny model")
    parser.add_argument("--samples", type=int, default=1600)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(arguments.data, arguments.model, arguments.samples, Path(scratch))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "lr_find.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def measure(data: Path, model: Path, samples: int, scratch: Path) -> dict[str, Any]:
    """One ramp and three runs; what each lost or gained against the advised rate."""
    settings = [
        f"model.path={model}",
        f"data.path={data}",
        f"output={scratch / 'run'}",
        f"train.samples={samples}",
        'train.rules=[{match="unet.**", lr=3e-3}, {match="text_encoder.**", lr=1e-4}]',
        "sampling.prompts=[]",
        "validation.images=16",
        "validation.train_probe_images=16",
        f"validation.every_samples={samples}",
    ]
    recipe = load_train_recipe(RECIPE, settings)
    ramp = find_lr(recipe, start=None, end=None, steps=200, to=None)
    lr = ramp["advice"]["recipes"]["constant"]["lr"]
    runs = {}
    for name, factor in (("advised", 1.0), ("times 10", 10.0), ("a tenth", 0.1)):
        changed = with_rates(recipe, factor * lr / 3e-3, {"type": "constant"})
        changed["output"] = str(scratch / name)
        train(validate(changed, TrainRecipe, name))
        runs[name] = scratch / name
    against = {
        # no path of this machine
        name: [
            pair.to_json() | {"a": "advised", "b": name}
            for pair in compare_paths([runs["advised"], path])
        ]
        for name, path in runs.items()
        if name != "advised"
    }
    return {"bounds": ramp["bounds"], "lr": lr, "samples": samples, "against the advised": against}


if __name__ == "__main__":
    main()
