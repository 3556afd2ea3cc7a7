"""A few steps of full-size SDXL with random weights, for every way of training its UNet.

    python tools/bench/cuda_paths.py [--to DIR] [--micro 2] [--steps 6] [--only NAME]...
    python tools/bench/cuda_paths.py --tiny      # tiny sizes on a CPU: does each way run at all?

All ways see the same weights, latents, conditioning and noise, in one process. Writes
cuda_paths.json and cuda_paths.md: seconds a step, ratio to the baseline (bf16 autocast, float32
weights, fused AdamW), peak memory, and how far its losses are from the baseline's. A way that fails
is listed with its error. Needs an NVIDIA GPU with about 80 GB; a few minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

from sdtrain.averages import Ema, EmaSection  # noqa: E402
from sdtrain.batch import Batch, MicroConditioning  # noqa: E402
from sdtrain.compiling import CompileSection, blocks, compile_blocks, require_compiler  # noqa: E402
from sdtrain.deterministic import WORKSPACES, deterministic  # noqa: E402
from sdtrain.freezing import Rule, build_plan  # noqa: E402
from sdtrain.losses.mse import mse  # noqa: E402
from sdtrain.noise import noise_for, stratified_u  # noqa: E402
from sdtrain.precision import Rounding  # noqa: E402
from sdtrain.step import denoising_loss  # noqa: E402

PROMPT = "a photo of a dog on a beach, waves, sunset, wet fur, looking at viewer"
LR = 1e-5
WARM_STEPS = 2
GIGABYTE = 1e9


@dataclass(frozen=True)
class Way:
    """One way of training."""

    name: str
    optimizer: str = "adamw"
    settings: dict[str, Any] = field(default_factory=dict)
    autocast: str = "bf16"
    rounding: str | None = None
    checkpointing: bool = False
    compiled: bool = False
    ema: str | None = None
    deterministic: bool = False
    rank: int | None = None


BASELINE = "bf16 autocast, fused AdamW"
AGAIN = ", again"
WAYS = (
    Way(BASELINE),
    Way(BASELINE + AGAIN),
    Way("deterministic kernels", deterministic=True),
    Way("deterministic kernels" + AGAIN, deterministic=True),
    Way("AdamW, not fused", settings={"fused": False}),
    Way("gradient checkpointing", checkpointing=True),
    Way("fp16 autocast with scaler", autocast="fp16"),
    Way("no autocast (float32)", autocast="no", checkpointing=True),
    Way("bf16 weights, stochastic rounding", rounding="stochastic"),
    Way("bf16 weights, Kahan", rounding="kahan"),
    Way("bf16 weights, stochastic, Adafactor", "adafactor", rounding="stochastic"),
    Way("Adafactor", "adafactor"),
    Way("AdamW 8-bit", "adamw8bit"),
    Way("bf16 weights, stochastic, AdamW 8-bit", "adamw8bit", rounding="stochastic"),
    Way("Muon", "muon"),
    Way("EMA on the GPU", ema="same"),
    Way("EMA on the CPU", ema="cpu"),
    Way("compiled by block", compiled=True),
    Way("LoRA, rank 16", rank=16),  # last: it changes the networks for good
)


@dataclass
class Bench:
    """What all ways share."""

    family: Any
    device: torch.device
    start: dict[str, torch.Tensor]
    latents: torch.Tensor
    conditioning: Any
    micro: MicroConditioning
    backend: str

    def batch(self, step: int) -> Batch:
        """The step's own noise and noise levels, the same for every way."""
        count, shape = len(self.latents), tuple(self.latents.shape[1:])
        names = [str(slot) for slot in range(count)]
        batch = Batch(
            ids=names,
            visits=[0] * count,
            pixels=torch.empty(count, 0),
            prompts=[PROMPT] * count,
            micro=[self.micro] * count,
            noise=torch.stack([noise_for(0, "noise", name, step, shape) for name in names]),
            u=stratified_u(0, step * count, count),
        )
        return batch.to(self.device)


def main() -> None:
    """Run every way, print a line each, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--to", type=Path, default=HERE / "results")
    parser.add_argument("--micro", type=int, default=2, help="samples a step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=420, help="nothing is begun after these")
    parser.add_argument("--only", action="append", help="part of a name; the baseline always runs")
    parser.add_argument("--backend", help="of torch.compile; default: inductor, tiny: aot_eager")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a CPU")
    asked = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACES)  # read once, for all ways
    began = time.perf_counter()
    bench = open_bench(asked.tiny, asked.micro, asked.backend)
    results: list[dict[str, Any]] = []
    for way in WAYS:
        if asked.only and way.name != BASELINE and not any(o in way.name for o in asked.only):
            continue
        if time.perf_counter() - began > asked.seconds:
            results.append({"way": way.name, "error": "left out: no time left"})
            continue
        results.append(tried(bench, way, asked.steps))
        print(json.dumps({k: v for k, v in results[-1].items() if k != "traceback"}), flush=True)
    compare(results)
    write(asked.to, bench, results, asked)


def open_bench(is_tiny: bool, count: int, backend: str | None) -> Bench:
    """The model with random weights, and what is trained on."""
    from sdprep.plugins import config_for

    device = torch.device("cpu" if is_tiny else "cuda")
    if is_tiny:
        from sdtrain.tiny import write_tiny

        folder = write_tiny("sdxl", Path(tempfile.mkdtemp()) / "tiny", 0)
        family: Any = config_for("family", "sdxl")().build(str(folder), precision="bf16")
    else:
        from sdxl_step import networks

        from sdtrain.families.sdxl import Config, StableDiffusionXL

        with torch.device(device):
            family = StableDiffusionXL(networks(device), Config(), "bf16")
        family.to(device)
    side = family.default_resolution_px
    pixels = torch.nn.functional.interpolate(
        noise_for(0, "pixels", "all", 0, (count, 3, 16, 16)), (side, side), mode="bilinear"
    )
    for part in family.parts.values():
        part.requires_grad_(False)
    with torch.no_grad():  # float32, so that no way gets it in another one's format
        latents = family.encode_images(pixels.tanh().to(device))
        conditioning = family.encode_prompts([PROMPT] * count)
    start = {path: p.detach().to("cpu", copy=True) for path, p in unet_parameters(family)}
    micro = MicroConditioning((side, side), (0, 0), (side, side))
    chosen = backend or ("aot_eager" if is_tiny else "inductor")
    return Bench(family, device, start, latents, conditioning, micro, chosen)


def unet_parameters(family: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """What trains."""
    return ((path, p) for path, p in family.named_parameters() if path.startswith("unet."))


def tried(bench: Bench, way: Way, steps: int) -> dict[str, Any]:
    """The result of one way, or why there is none."""
    found: dict[str, Any] = {"way": way.name}
    try:
        with deterministic(way.deterministic), prepared(bench, way) as plan:
            found |= measured(bench, way, plan, steps)
    except Exception as error:  # one way must not lose the others
        found["error"] = f"{type(error).__name__}: {str(error).strip()[:600]}"
        found["traceback"] = traceback.format_exc()[-4000:]
    tidy(bench)
    return found


@contextmanager
def prepared(bench: Bench, way: Way) -> Iterator[Any]:
    """The networks as at the start, in the way's formats; undone afterwards."""
    from sdprep.plugins import config_for

    family, unet = bench.family, bench.family.parts["unet"]
    kind = torch.bfloat16 if way.rounding else torch.float32
    for path, parameter in unet_parameters(family):
        parameter.grad = None
        parameter.data = bench.start[path].to(bench.device, kind, copy=True)
    family.precision = way.autocast
    if way.checkpointing:
        unet.enable_gradient_checkpointing()
    if way.compiled:
        section = CompileSection(mode="blocks", backend=bench.backend)
        require_compiler(section, bench.device)
        compile_blocks(family, section)
    adapter = config_for("adapter", "lora" if way.rank else "full")
    options = {"rank": way.rank, "alpha": float(way.rank)} if way.rank else {}
    try:
        yield build_plan(family, [Rule("unet.**", lr=LR)], adapter(**options).build())
    finally:
        if way.checkpointing:
            unet.disable_gradient_checkpointing()
        for block in blocks(unet):
            block._compiled_call_impl = None


def tidy(bench: Bench) -> None:
    """Give back what a way took."""
    for _, parameter in unet_parameters(bench.family):
        parameter.grad = None
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def measured(bench: Bench, way: Way, plan: Any, steps: int) -> dict[str, Any]:
    """Losses of every step, seconds of those after the warm ones, and peak memory."""
    from sdprep.plugins import config_for

    config: Any = config_for("optimizer", way.optimizer)(**way.settings)
    wants_paths = getattr(config, "wants_paths", False)
    optimizer = config.build(plan.optimizer_groups(with_paths=wants_paths))
    trained = plan.trained()
    rounding = Rounding(way.rounding, 0, trained) if way.rounding else None  # type: ignore[arg-type]
    ema = Ema(EmaSection(half_life_samples=1000, device=way.ema), trained) if way.ema else None  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler(bench.device.type, enabled=way.autocast == "fp16")
    losses: list[torch.Tensor] = []
    clock = 0.0
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(WARM_STEPS + steps):
        batch = bench.batch(step)
        if step == WARM_STEPS:
            wait(bench)
            clock = time.perf_counter()
        loss = denoising_loss(
            bench.family, batch, mse, latents=bench.latents, conditioning=bench.conditioning
        ).mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm or float("inf"))
        if rounding is None:
            scaler.step(optimizer)
        else:
            rounding.step(optimizer, step)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(trained, len(bench.latents))
        losses.append(loss.detach())
    wait(bench)
    seconds = (time.perf_counter() - clock) / steps
    peak = torch.cuda.max_memory_allocated() if bench.device.type == "cuda" else 0
    return {
        "seconds_per_step": round(seconds, 4),
        "peak_gb": round(peak / GIGABYTE, 2),
        "trained_parameters": sum(p.numel() for p in trained.values()),
        "losses": [float(loss) for loss in losses],
        "checksum": checksum(trained.values()),
        "settings": {k: v for k, v in asdict(way).items() if k != "name" and v},
    }


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """A number that differs if any bit of any weight does, almost surely."""
    found = 0
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(torch.int16)
        found = (31 * found + int(bits.sum(dtype=torch.int64))) % 2**61
    return found


def wait(bench: Bench) -> None:
    """Until the device is done."""
    if bench.device.type == "cuda":
        torch.cuda.synchronize()


def compare(results: Sequence[dict[str, Any]]) -> None:
    """Add the ratio to the baseline, and the largest relative difference of a loss from its."""
    base = next((r for r in results if r["way"] == BASELINE and "losses" in r), None)
    for found in results:
        if base is None or "losses" not in found:
            continue
        pairs = list(zip(found["losses"], base["losses"], strict=True))
        found["ratio"] = round(found["seconds_per_step"] / base["seconds_per_step"], 3)
        if found["way"].endswith(AGAIN):
            first = next(r for r in results if r["way"] == found["way"].removesuffix(AGAIN))
            found["same_bits"] = found["checksum"] == first.get("checksum")
        found["first_loss_difference"] = abs(pairs[0][0] / pairs[0][1] - 1)
        found["largest_loss_difference"] = max(abs(a / b - 1) for a, b in pairs)


def write(to: Path, bench: Bench, results: Sequence[dict[str, Any]], asked: Any) -> None:
    """Write both files."""
    is_cuda = bench.device.type == "cuda"
    about = {
        "device": torch.cuda.get_device_name() if is_cuda else "CPU (tiny sizes)",
        "torch": torch.__version__,
        "samples_per_step": len(bench.latents),
        "steps": asked.steps,
        "warm_steps": WARM_STEPS,
        "latents": list(bench.latents.shape),
        "compile_backend": bench.backend,
    }
    to.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, "ways": list(results)}, indent=1)
    (to / "cuda_paths.json").write_text(text + "\n", encoding="utf-8")
    head = "| way | s/step | ratio | peak GB | first loss | largest loss difference |\n"
    lines = [head + "|---|---:|---:|---:|---:|---:|"]
    for found in results:
        if "error" in found:
            reason = found["error"].replace("\n", " ").replace("|", "/")
            lines.append(f"| {found['way']} | | | | | {reason[:200]} |")
            continue
        lines.append(
            f"| {found['way']} | {found['seconds_per_step']:.3f} | {found.get('ratio', '')} | "
            f"{found['peak_gb']:.1f} | {found['losses'][0]:.5f} | "
            f"{found.get('largest_loss_difference', float('nan')):.2e} |"
        )
    for found in results:
        if "same_bits" in found:
            same = "the same" if found["same_bits"] else "other"
            lines.append(f"\n{found['way']}: {same} bits in all weights at the end.")
    facts = ", ".join(f"{key} {value}" for key, value in about.items())
    page = "# Ways of training SDXL's UNet, random weights\n\n" + f"{facts}\n\n"
    (to / "cuda_paths.md").write_text(page + "\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
