"""The memory that `sdtrain check` foresees for a step of full-size SDXL, beside what a GPU takes.

    python tools/bench/memory_estimate.py [--to DIR]

Random weights; each line is one forward and backward at 1024 px in bf16 autocast. Compared is what
is on top of weights: activations, gradients, half-precision copies. Needs an NVIDIA GPU with about
80 GB; two minutes. Writes memory_estimate.json and prints a table.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

from sdxl_step import networks  # noqa: E402

from sdprep.plugins import config_for  # noqa: E402
from sdtrain import activations  # noqa: E402
from sdtrain.activations import Forward, working_bytes  # noqa: E402
from sdtrain.families.sdxl import Config, StableDiffusionXL  # noqa: E402
from sdtrain.freezing import Rule, build_plan  # noqa: E402
from sdtrain.losses.mse import mse  # noqa: E402
from sdtrain.step import denoising_loss  # noqa: E402

UNET = (Rule("unet.**", lr=1e-5),)
ALL = (*UNET, Rule("text_encoder.**", lr=1e-6), Rule("text_encoder_2.**", lr=1e-6))
CASES = (  # name, adapter, rules, gradient checkpointing, samples, chunks, pictures
    ("full", "full", UNET, False, 2, 1, 0),
    ("full, checkpointing", "full", UNET, True, 2, 1, 0),
    ("full, checkpointing, VAE", "full", UNET, True, 4, 1, 4),
    ("full and text, 3 chunks", "full", ALL, True, 4, 3, 1),
    ("LoRA", "lora", UNET, False, 2, 1, 0),
    ("LoRA, checkpointing, VAE", "lora", UNET, True, 4, 1, 1),
)


def main() -> None:
    """Measure every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    lines = []
    for case in CASES:
        lines.append(measured(*case))
        print(json.dumps(lines[-1]), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    asked.to.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, "cases": lines}, indent=1)
    (asked.to / "memory_estimate.json").write_text(text + "\n", encoding="utf-8")
    print("| case | samples | foreseen GB | taken GB | ratio | s to foresee |")
    print("|---|---:|---:|---:|---:|---:|")
    for line in lines:
        print(
            f"| {line['case']} | {line['samples']} | {line['foreseen_gb']} | {line['taken_gb']} "
            f"| {line['ratio']} | {line['seconds']} |"
        )


def measured(
    name: str, adapter: str, rules: Any, saves: bool, samples: int, chunks: int, pictures: int
) -> dict[str, Any]:
    """One case: foreseen, then done."""
    device = torch.device("cuda")
    family = StableDiffusionXL(networks(device), Config(gradient_checkpointing=saves), "bf16")
    family.to(device)
    build_plan(family, rules, config_for("adapter", adapter)().build())
    forward = Forward(1024, 1024, samples, chunks, pictures, is_repeated=False)
    started = time.perf_counter()
    foreseen = working_bytes(family, mse, forward)
    seconds = time.perf_counter() - started
    batch = activations._batch(family, forward, device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if pictures:
        family.encode_images(torch.zeros(pictures, 3, 1024, 1024, device=device))
    latents = torch.zeros(batch.noise.shape, device=device)
    denoising_loss(family, batch, mse, latents=latents).mean().backward()
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    return {
        "case": name,
        "samples": samples,
        "chunks": chunks,
        "foreseen_gb": round(foreseen / 1e9, 2),
        "taken_gb": round(taken / 1e9, 2),
        "ratio": round(foreseen / taken, 3),
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
