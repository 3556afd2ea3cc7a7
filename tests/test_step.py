"""One whole step against plain torch, and what a batch must not change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdprep.plugins import config_for
from sdtrain.adapters.full import Full
from sdtrain.batch import Batch, MicroConditioning
from sdtrain.freezing import Rule, build_plan
from sdtrain.losses.mse import mse
from sdtrain.step import denoising_loss
from tests.tiny import load_tiny, tiny_batch

LR, DECAY = 1e-3, 0.01


def plain_step(folder: Path, batch: Batch) -> tuple[torch.Tensor, dict[str, Any], dict[str, Any]]:
    """A min-SNR step on the UNet with nothing of ours: loss, gradients, and updated weights."""
    import diffusers
    import transformers

    is_xl = (folder / "text_encoder_2").is_dir()
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").train()
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    t = (batch.u * 1000).long()
    a = (1 - betas).cumprod(0)[t].view(-1, 1, 1, 1)
    states, added = [], {}
    for end in ["", "_2"] if is_xl else [""]:
        classes = {"": "CLIPTextModel", "_2": "CLIPTextModelWithProjection"}
        encoder = getattr(transformers, classes[end]).from_pretrained(folder / f"text_encoder{end}")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / f"tokenizer{end}")
        tokens = tokenizer(
            batch.prompts, padding="max_length", max_length=77, return_tensors="pt"
        ).input_ids
        output = encoder(tokens, output_hidden_states=True)
        states.append((output.hidden_states[-2] if is_xl else output.last_hidden_state).detach())
        if end == "_2":
            sizes = [
                [*m.original_size_hw, *m.crop_top_left, *m.target_size_hw] for m in batch.micro
            ]
            added = {"text_embeds": output.text_embeds.detach(), "time_ids": torch.tensor(sizes)}
    latents = vae.encode(batch.pixels).latent_dist.mode().detach() * vae.config.scaling_factor
    noisy = (a.sqrt() * latents + (1 - a).sqrt() * batch.noise).float()
    output = unet(noisy, t, torch.cat(states, -1), added_cond_kwargs=added).sample
    weights = (5 / (a / (1 - a)).flatten()).clamp(max=1)
    loss = (weights * (output - batch.noise).square().mean((1, 2, 3))).sum() / len(batch)
    loss.backward()
    gradients = {name: p.grad for name, p in unet.named_parameters()}
    # The first AdamW step from zero moments: the mean is g, the root of the square is |g|.
    updated = {
        name: p.detach() * (1 - LR * DECAY) - LR * p.grad / (p.grad.abs() + 1e-8)
        for name, p in unet.named_parameters()
    }
    return loss.detach(), gradients, updated


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_whole_step_equals_plain_torch(tiny_model: Callable[[str], Path], name: str) -> None:
    folder = tiny_model(name)
    family = load_tiny(folder)
    batch = tiny_batch(family, 3, height=32, width=48)
    plan = build_plan(family, [Rule("unet.**", lr=LR)], Full())
    optimizer = config_for("optimizer", "adamw")(weight_decay=DECAY).build(plan.optimizer_groups())
    weigh = config_for("weighting", "min_snr")().build()
    per_sample = denoising_loss(family, batch, mse)
    assert per_sample.shape == (3,)
    assert per_sample.dtype == torch.float32
    weights = weigh(family.logsnr(batch.u).exp(), family.prediction_type)
    loss = (weights * per_sample).sum() / len(batch)
    loss.backward()

    expected, gradients, updated = plain_step(folder, batch)
    torch.testing.assert_close(loss.detach().double(), expected.double(), rtol=1e-6, atol=0)
    ours = {path.removeprefix("unet."): p for path, p in plan.trained().items()}
    assert ours.keys() == gradients.keys()
    for path, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, gradients[path], rtol=1e-4, atol=1e-7)
    optimizer.step()
    for path, parameter in ours.items():
        # Where a gradient is nearly zero, its sign decides the step and rounding the sign.
        clear = gradients[path].abs() > 1e-5
        torch.testing.assert_close(parameter[clear], updated[path][clear], rtol=1e-5, atol=1e-6)


def one(batch: Batch, slot: int) -> Batch:
    some = slice(slot, slot + 1)
    parts = {key: value for key, value in vars(batch).items() if value is not None}
    return Batch(**{key: value[some] for key, value in parts.items()})


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_sample_does_not_depend_on_its_batch(
    tiny_model: Callable[[str], Path], name: str
) -> None:
    family = load_tiny(tiny_model(name))
    batch = tiny_batch(family, 4)
    with torch.no_grad():
        together = denoising_loss(family, batch, mse)
        apart = torch.cat([denoising_loss(family, one(batch, slot), mse) for slot in range(4)])
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=0)


def test_cached_latents_and_conditioning_give_the_same_loss(
    tiny_model: Callable[[str], Path],
) -> None:
    family = load_tiny(tiny_model("sdxl"))
    batch = tiny_batch(family, 2)
    with torch.no_grad():
        plain = denoising_loss(family, batch, mse)
        latents = family.encode_images(batch.pixels)
        conditioning = family.encode_prompts(batch.prompts)
        blank = replace(batch, pixels=torch.zeros_like(batch.pixels), prompts=["x"] * 2)
        cached = denoising_loss(family, blank, mse, latents=latents, conditioning=conditioning)
        assert not torch.equal(denoising_loss(family, blank, mse), plain)
    assert torch.equal(cached, plain)


def test_velocity_prediction_changes_the_target_only(tiny_model: Callable[[str], Path]) -> None:
    family = load_tiny(tiny_model("sd15"), prediction_type="v_prediction")
    batch = tiny_batch(family, 2)
    alpha, sigma = (scale.view(-1, 1, 1, 1) for scale in family.alpha_sigma(batch.u))
    latents = family.encode_images(batch.pixels)
    with torch.no_grad():
        noisy = alpha * latents + sigma * batch.noise
        states = family.encode_prompts(batch.prompts)
        output = family.predict(noisy, batch.u, states, batch.micro)
        expected = mse(output, alpha * batch.noise - sigma * latents)
        torch.testing.assert_close(denoising_loss(family, batch, mse), expected)
    pipeline = family.pipeline()
    assert pipeline.unet is family.parts["unet"]
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_gradient_checkpointing_computes_twice_and_changes_nothing(
    tiny_model: Callable[[str], Path], name: str
) -> None:
    gradients, calls = [], []
    for is_on in (False, True):
        family = load_tiny(tiny_model(name), gradient_checkpointing=is_on)
        plan = build_plan(family, [Rule("unet.**", lr=LR)], Full())
        count: list[int] = []
        resnet = family.parts["unet"].mid_block.resnets[1]
        resnet.conv1.register_forward_hook(lambda *_, count=count: count.append(1))
        denoising_loss(family, tiny_batch(family, 2), mse).mean().backward()
        gradients.append({path: p.grad for path, p in plan.trained().items()})
        calls.append(len(count))
    assert calls == [1, 2]
    for path, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][path], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_half_precision_forwards_still_give_float32_losses_and_gradients(
    tiny_model: Callable[[str], Path], name: str
) -> None:
    exact = load_tiny(tiny_model(name))
    family = load_tiny(tiny_model(name))
    family.precision = "bf16"
    rules = [Rule("unet.**", lr=1e-3), Rule("text_encoder*.**", lr=1e-3)]
    plan = build_plan(family, rules, Full())
    batch = tiny_batch(family, 3)
    dtypes = []
    hook = family.parts["unet"].conv_out.register_forward_hook(
        lambda module, given, output: dtypes.append(output.dtype)
    )
    loss = denoising_loss(family, batch, mse)
    hook.remove()
    assert dtypes == [torch.bfloat16]
    assert loss.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(loss, denoising_loss(exact, batch, mse), rtol=0.05, atol=0)
    loss.mean().backward()
    assert all(p.grad is not None for p in plan.trained().values())
    assert {p.grad.dtype for p in plan.trained().values() if p.grad is not None} == {torch.float32}


def test_a_batch_with_parts_of_different_lengths_is_our_bug(
    tiny_model: Callable[[str], Path],
) -> None:
    batch = tiny_batch(load_tiny(tiny_model("sd15")), 2)
    with pytest.raises(AssertionError, match="prompts"):
        replace(batch, prompts=["one"])
    with pytest.raises(AssertionError, match="float64"):
        replace(batch, u=batch.u.float())


def test_time_ids_put_height_first() -> None:
    micro = MicroConditioning((1, 2), (3, 4), (5, 6))
    assert micro.time_ids() == [1, 2, 3, 4, 5, 6]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_step_on_cuda_never_waits_and_agrees_with_the_cpu(
    tiny_model: Callable[[str], Path], name: str, precision: str
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU that torch can see")
    with torch.no_grad():
        cpu = load_tiny(tiny_model(name))
        batch = tiny_batch(cpu, 3)
        expected = denoising_loss(cpu, batch, mse)
    family = load_tiny(tiny_model(name)).to("cuda")
    family.precision = precision
    build_plan(family, [Rule("unet.**", lr=1e-3), Rule("text_encoder.**", lr=1e-3)], Full())
    moved = batch.to("cuda")
    denoising_loss(family, moved, mse).mean().backward()  # warm up the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = denoising_loss(family, moved, mse)
        loss.mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = {"no": 1e-3, "bf16": 0.05, "fp16": 0.01}[precision]
    torch.testing.assert_close(loss.detach().cpu(), expected, rtol=tolerance, atol=0)
