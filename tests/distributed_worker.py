"""One process of a launch: trains a list of recipes, one after the other, as its launcher says.

    torchrun … tests/distributed_worker.py JOBS.json

Each job: `recipe`, `settings`, `stop_after` (steps after which one process, the last, is asked to
stop; 0: never), `is_mini` (true unless false: it trains the mini family whatever the recipe says).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from sdtrain import sharding, trainer
from sdtrain.recipe import load_train_recipe
from sdtrain.world import World, connected, end_process
from tests import mini_family

torch.set_num_threads(1)


def train(job: dict[str, Any], world: World) -> None:
    original, left = trainer.take_step, [job["stop_after"]]

    def counted(*arguments: Any) -> dict[str, Any]:
        line = original(*arguments)
        left[0] -= 1
        if left[0] == 0 and world.rank == world.size - 1:
            signal.raise_signal(signal.SIGTERM)
        return line

    trainer.take_step = counted
    try:
        trainer.train(load_train_recipe(job["recipe"], job["settings"]), world=world)
    finally:
        trainer.take_step = original


def main() -> None:
    sharding.SMALLEST_UNIT = 1
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if all(job.get("is_mini", True) for job in jobs):
        mini_family.install()
    with connected() as world:
        for job in jobs:
            train(job, world)
    end_process(0)


if __name__ == "__main__":
    main()
