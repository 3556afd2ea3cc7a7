"""One optimizer step of full-size SDXL with random weights, beside twenty lines of plain PyTorch.

    python tools/bench/sdxl_step.py [--micro 4] [--steps 10]

Both sides encode pictures and prompts, run the UNet forward and backward in bf16 autocast, and step
AdamW; weights, pictures and prompts are the same. Needs an NVIDIA GPU with about 80 GB for `full`.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from sdtrain.batch import Batch, MicroConditioning
from sdtrain.families._sdxl import PIPELINE
from sdtrain.families.sdxl import Config, StableDiffusionXL
from sdtrain.formats.diffusers import Folder
from sdtrain.freezing import build_plan
from sdtrain.losses.mse import mse
from sdtrain.noise import noise_for, stratified_u
from sdtrain.recipe import Rule
from sdtrain.step import denoising_loss

PROMPT = "a photo of a dog on a beach, waves, sunset, wet fur, looking at viewer"


def main() -> None:
    """Measure every setting and print one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    for name, adapter in (("lora", "lora"), ("full", "full")):
        torch.cuda.reset_peak_memory_stats()
        print(json.dumps(measure(name, adapter, arguments.micro, arguments.steps)), flush=True)
        gc.collect()
        torch.cuda.empty_cache()


def networks(device: torch.device | str = "cpu") -> Folder:
    """Full-size networks with random weights, drawn on a device, and the real tokenizers."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    torch.manual_seed(0)
    vocabulary = Path(__file__).resolve().parents[2] / "sdprep" / "data" / "clip_tokenizer"
    first = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12)
    first.num_attention_heads = 12
    second = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
        projection_dim=1280,
    )
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        four = 4
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * four,
            up_block_types=("UpDecoderBlock2D",) * four,
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.13025,
            sample_size=1024,
        )
        text_encoder = CLIPTextModel(first)
        text_encoder_2 = CLIPTextModelWithProjection(second)
    parts = {
        "unet": unet,
        "vae": vae,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
    }
    tokenizers = {
        "tokenizer": CLIPTokenizer.from_pretrained(vocabulary),
        "tokenizer_2": CLIPTokenizer.from_pretrained(vocabulary, pad_token="!"),
    }
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    return Folder(PIPELINE, parts, tokenizers, scheduler, {})


def measure(name: str, adapter: str, micro: int, steps: int) -> dict[str, Any]:
    """Seconds per step of ours and of plain PyTorch, and the peak memory of ours."""
    import importlib

    options = Config(gradient_checkpointing=True)
    family = StableDiffusionXL(networks(), options, "bf16")
    family.to("cuda")
    config = importlib.import_module(f"sdtrain.adapters.{adapter}").Config()
    rules = (Rule(match="unet.**", lr=1e-5),)
    plan = build_plan(family, rules, config.build())
    trained = list(plan.trained().values())
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    pixels = torch.rand(micro, 3, 1024, 1024, device="cuda") * 2 - 1
    sizes = MicroConditioning((1024, 1024), (0, 0), (1024, 1024))
    noise = torch.stack([noise_for(0, "noise", str(i), 0, (4, 128, 128)) for i in range(micro)])

    def ours() -> None:
        batch = Batch(
            ids=[str(i) for i in range(micro)],
            visits=[0] * micro,
            pixels=pixels,
            prompts=[PROMPT] * micro,
            micro=[sizes] * micro,
            noise=noise,
            u=stratified_u(0, 0, micro),
        )
        denoising_loss(family, batch.to("cuda"), mse).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    ours_seconds = timed(ours, steps)
    peak = torch.cuda.max_memory_allocated() / 1e9
    plain_seconds = timed(lambda: plain_step(family, optimizer, pixels, noise), steps)
    return {
        "setting": name,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "micro_batch": micro,
        "trained_parameters": sum(p.numel() for p in trained),
        "seconds_per_step": round(ours_seconds, 4),
        "plain_seconds_per_step": round(plain_seconds, 4),
        "ours_to_plain": round(ours_seconds / plain_seconds, 4),
        "images_per_second": round(micro / ours_seconds, 3),
        "peak_gb": round(peak, 2),
    }


def plain_step(family: Any, optimizer: Any, pixels: torch.Tensor, noise: torch.Tensor) -> None:
    """The same step in plain PyTorch, straight on the networks."""
    parts, folder = family.parts, family.folder
    with torch.no_grad():
        latents = parts["vae"].encode(pixels).latent_dist.mode() * 0.13025
        hidden = []
        pooled = None
        with torch.autocast("cuda", torch.bfloat16):
            for encoder, tokenizer in zip(
                ("text_encoder", "text_encoder_2"), folder.tokenizers.values(), strict=True
            ):
                ids = tokenizer(
                    [PROMPT] * len(pixels),
                    padding="max_length",
                    max_length=77,
                    truncation=True,
                    return_tensors="pt",
                ).input_ids.to("cuda")
                answer = parts[encoder](ids, output_hidden_states=True)
                hidden.append(answer.hidden_states[-2])
                pooled = answer[0]
    timesteps = torch.randint(0, 1000, (len(pixels),))
    noisy = folder.scheduler.add_noise(latents, noise.to("cuda"), timesteps.to("cuda"))
    time_ids = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * len(pixels), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        prediction = parts["unet"](
            noisy,
            timesteps.to("cuda"),
            torch.cat(hidden, -1),
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
        ).sample
    torch.nn.functional.mse_loss(prediction.float(), noise.to("cuda")).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def timed(work: Callable[[], None], steps: int) -> float:
    """Seconds per call, after three warm-up calls."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


if __name__ == "__main__":
    main()
