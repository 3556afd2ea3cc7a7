"""Flow matching: the objective, its densities, and the family that shares SDXL's networks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open

from sdprep.errors import UserError
from sdprep.plugins import config_for
from sdtrain.adapters.full import Full
from sdtrain.batch import Batch
from sdtrain.export import export
from sdtrain.flow import FlowDensity, FlowObjective, dynamic_shift, shifted
from sdtrain.freezing import Rule, build_plan
from sdtrain.losses.mse import mse
from sdtrain.recipe import load_train_recipe
from sdtrain.sampling import Style, pictures_of
from sdtrain.step import denoising_loss
from sdtrain.trainer import train
from tests.test_families import load_pipeline
from tests.tiny import load_tiny, tiny_batch

LR = 1e-3
U = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
AREA = torch.full((101,), 1024 * 1024)
SHARES = torch.linspace(0, 1, 102, dtype=torch.float64)[:-1]


def objective(**options: Any) -> FlowObjective:
    return FlowObjective(FlowDensity(**{"kind": "logit_normal", "shift": 3.0, **options}))


# --- the objective --------------------------------------------------------------------------------


def test_noise_target_time_and_ratio() -> None:
    flow = objective()
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, 5, 4, 3, 2, generator=generator)
    alpha, sigma = flow.alpha_sigma(U)
    assert alpha.dtype == sigma.dtype == torch.float32
    torch.testing.assert_close(alpha + sigma, torch.ones(5))
    assert torch.equal(flow.target(clean, noise, U), noise - clean)
    assert flow.model_time(U).tolist() == pytest.approx([0, 100, 500, 900, 999])
    snr = flow.logsnr(U).double().exp()
    assert snr[1:].tolist() == pytest.approx([81, 1, (1 / 9) ** 2, (1 / 999) ** 2], rel=1e-5)
    assert math.isinf(float(snr[0]))  # no noise: legal
    # From noisy latents and the target follows the clean picture: x - u·(noise - clean) = clean.
    scales = [part.view(-1, 1, 1, 1) for part in (alpha, sigma)]
    noisy = scales[0] * clean + scales[1] * noise
    torch.testing.assert_close(noisy - scales[1] * (noise - clean), clean, rtol=0, atol=1e-5)


def test_noising_is_that_of_diffusers_flow_scheduler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    times = scheduler.timesteps[[0, 300, 700, 999]]
    clean, noise = torch.randn(2, 4, 4, 3, 2, generator=torch.Generator().manual_seed(2))
    u = times.double() / 1000
    alpha, sigma = (part.view(-1, 1, 1, 1) for part in objective().alpha_sigma(u))
    theirs = scheduler.scale_noise(clean, times, noise)
    torch.testing.assert_close(alpha * clean + sigma * noise, theirs, rtol=1e-5, atol=1e-5)


# --- densities ------------------------------------------------------------------------------------


def test_the_anchors_of_the_shift() -> None:
    levels = shifted(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 3.0)
    assert levels.tolist() == pytest.approx([0.25, 0.75, 0.964286], abs=5e-7)
    by_size = dynamic_shift(torch.tensor([256.0, 1024.0, 4096.0], dtype=torch.float64))
    assert by_size.tolist() == pytest.approx([math.exp(0.5), 1.877611, 3.158193], abs=5e-7)


@pytest.mark.parametrize("kind", ["logit_normal", "uniform", "mode", "shift", "mu"])
def test_a_density_is_a_rising_function_into_the_levels(kind: Any) -> None:
    for scale in (-1.0, 0.0, 1.29, 1.75):
        levels = FlowDensity(kind, 3.0, mode_scale=scale).quantile(SHARES, AREA)
        assert levels.dtype == torch.float64
        assert float(levels[0]) == 0
        assert float(levels.max()) < 1
        assert bool((levels.diff() >= -1e-15).all())
    last = torch.tensor([np.nextafter(1.0, 0.0)], dtype=torch.float64)
    for std in (1.0, 10.0):
        level = FlowDensity(kind, 1e6, logit_std=std).quantile(last, AREA[:1])
        assert float(level) < 1


def test_each_density_is_what_it_says() -> None:
    middle = torch.tensor([0.5], dtype=torch.float64)
    px = torch.tensor([512 * 512])
    found = {
        kind: float(FlowDensity(kind, 3.0).quantile(middle, px))
        for kind in ("logit_normal", "uniform", "mode", "shift", "mu")
    }
    expected = {"logit_normal": 0.75, "uniform": 0.5, "mode": 0.5, "shift": 0.75}
    assert found == pytest.approx({**expected, "mu": 1.877611 / 2.877611}, abs=1e-6)
    v = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    area = torch.full((20_000,), 1)
    logits = FlowDensity("logit_normal", 1.0, logit_mean=0.3, logit_std=0.8).quantile(v, area)
    assert float(torch.logit(logits).mean()) == pytest.approx(0.3, abs=1e-3)
    assert float(torch.logit(logits).std()) == pytest.approx(0.8, abs=1e-3)
    central = [
        float(((FlowDensity("mode", 1.0, mode_scale=s).quantile(v, area) - 0.5).abs() < 0.1).sum())
        for s in (-0.5, 0.0, 1.29)
    ]
    assert central[0] < central[1] < central[2]


def test_mode_equals_diffusers() -> None:
    from diffusers.training_utils import compute_density_for_timestep_sampling

    generator = torch.Generator().manual_seed(0)
    theirs = compute_density_for_timestep_sampling(
        "mode", 50, mode_scale=1.29, generator=generator, device="cpu"
    )
    v = torch.rand(50, generator=torch.Generator().manual_seed(0))
    ours = FlowDensity("mode", 1.0).quantile(1 - v.double(), AREA[:50])  # theirs falls in v
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=1e-6)


# --- the family -----------------------------------------------------------------------------------


def plain_step(folder: Path, batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
    """The loss and gradients of one flow-matching step on the UNet with nothing of ours."""
    import diffusers
    import transformers

    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").train()
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    states = []
    for end, name in (("", "CLIPTextModel"), ("_2", "CLIPTextModelWithProjection")):
        encoder = getattr(transformers, name).from_pretrained(folder / f"text_encoder{end}")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / f"tokenizer{end}")
        options = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
        output = encoder(tokenizer(batch.prompts, **options).input_ids, output_hidden_states=True)
        states.append(output.hidden_states[-2].detach())
    sizes = [[*m.original_size_hw, *m.crop_top_left, *m.target_size_hw] for m in batch.micro]
    added = {"text_embeds": output.text_embeds.detach(), "time_ids": torch.tensor(sizes)}
    latents = vae.encode(batch.pixels).latent_dist.mode().detach() * vae.config.scaling_factor
    u = batch.u.float().view(-1, 1, 1, 1)
    noisy = (1 - u) * latents + u * batch.noise
    output = unet(
        noisy, 1000 * batch.u.float(), torch.cat(states, -1), added_cond_kwargs=added
    ).sample
    u = u.flatten()
    weights = u**2 * (((1 - u) / u) ** 2).clamp(max=5)
    errors = (output - (batch.noise - latents)).square().mean((1, 2, 3))
    loss = (weights * errors).sum() / len(batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in unet.named_parameters()}


def test_a_whole_step_equals_plain_torch(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("sdxl_flow")
    family = load_tiny(folder)
    batch = tiny_batch(family, 3, height=32, width=48)
    plan = build_plan(family, [Rule("unet.**", lr=LR)], Full())
    weigh = config_for("weighting", "min_snr")().build()
    weights = weigh(family.logsnr(batch.u).exp(), family.prediction_type)
    loss = (weights * denoising_loss(family, batch, mse)).sum() / len(batch)
    loss.backward()
    expected, gradients = plain_step(folder, batch)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    for path, parameter in plan.trained().items():
        theirs = gradients[path.removeprefix("unet.")]
        torch.testing.assert_close(parameter.grad, theirs, rtol=1e-3, atol=1e-7)


def test_it_may_start_from_an_ordinary_checkpoint_and_says_so(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = config_for("family", "sdxl_flow")(shift=2.0).build(str(tiny_model("sdxl")))
    assert "was trained to predict epsilon" in capsys.readouterr().err
    assert family.prediction_type == "flow"
    family.save(tmp_path / "sdxl_flow")
    saved = json.loads((tmp_path / "sdxl_flow/scheduler/scheduler_config.json").read_text())
    assert saved["_class_name"] == "DPMSolverMultistepScheduler"
    assert saved["prediction_type"] == "flow_prediction"
    assert saved["use_flow_sigmas"] is True
    assert saved["flow_shift"] == 2.0
    capsys.readouterr()
    again = load_tiny(tmp_path / "sdxl_flow")
    assert "was trained to predict" not in capsys.readouterr().err
    assert again.folder.scheduler.config.flow_shift == 2.0  # the checkpoint's own, from now on
    v = torch.tensor([0.5], dtype=torch.float64)
    assert float(again.density(v, AREA[:1])) == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="was trained with flow matching"):
        config_for("family", "sdxl")().build(str(tmp_path / "sdxl_flow"))


def test_plain_diffusers_draws_the_same_picture(tiny_model: Callable[[str], Path]) -> None:
    from sdtrain.noise import noise_for

    folder = tiny_model("sdxl_flow")
    (ours,) = pictures_of(load_tiny(folder), ["a cat"], Style(7, 64, 4, 3.0))
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = noise_for(7, "sample", "a cat", 0, (4, 16, 16))[None]
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 64, "width": 64}
    theirs = pipeline("a cat", negative_prompt="", latents=noise, **options).images[0]
    difference = np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)
    assert np.abs(difference).max() <= 1
    sigmas = pipeline.scheduler.sigmas
    assert float(sigmas[0]) > 0.999
    assert float(sigmas[-1]) == 0
    # The network is told 1000 u, as in training; this solver rounds it down.
    assert pipeline.scheduler.timesteps.tolist() == [math.floor(1000 * s) for s in sigmas[:-1]]


def test_the_sampler_walks_the_line_that_was_trained(tiny_model: Callable[[str], Path]) -> None:
    """A network that knows noise and picture brings the one to the other exactly."""
    family = load_tiny(tiny_model("sdxl_flow"))
    scheduler = family.pipeline().scheduler
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    scheduler.set_timesteps(7)
    latents = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        u = torch.zeros(1, dtype=torch.float64)
        latents = scheduler.step(family.target(clean, noise, u), t, latents).prev_sample
    torch.testing.assert_close(latents, clean, rtol=0, atol=2e-3)


def test_a_run_is_evaluated_exported_and_opened_again(
    train_recipe: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = [
        *("train.samples=8", "validation.images=2", "validation.timesteps_per_image=2"),
        *('model.density="mu"', "model.shift=2.5", 'sampling.prompts=["a cat"]'),
    ]
    train(load_train_recipe(train_recipe("sdxl_flow"), settings))
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    means = [line["mean"] for line in lines if line["kind"] == "validation"]
    assert len(means) == 3
    assert all(math.isfinite(mean) for mean in means)
    assert (run / "samples" / "8" / "all.png").is_file()
    export(run, "single-file", tmp_path / "flow.safetensors")
    with safe_open(str(tmp_path / "flow.safetensors"), framework="pt") as file:
        about = dict(file.metadata())
        assert not {"v_pred", "ztsnr"} & set(file.keys())
    assert about["modelspec.prediction_type"] == "flow"
    assert about["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert about["sdtrain.flow_shift"] == "2.5"
    file = str(tmp_path / "flow.safetensors")
    config = str(tiny_model("sdxl"))
    again = config_for("family", "sdxl_flow")(config=config).build(file)
    found = dict(again.named_parameters())
    for path, parameter in load_model(run / "model").named_parameters():
        assert torch.equal(found[path], parameter), path
    assert again.folder.scheduler.config.flow_shift == 2.5
    with pytest.raises(UserError, match="flow matching"):
        config_for("family", "sdxl")(config=config).build(file)
    export(run / "model", "single-file", tmp_path / "again.safetensors")  # the folder is told apart
    with safe_open(str(tmp_path / "again.safetensors"), framework="pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "flow"


def load_model(folder: Path) -> Any:
    return config_for("family", "sdxl_flow")().build(str(folder))


def test_options_without_effect_are_refused() -> None:
    config = config_for("family", "sdxl_flow")
    for options in ({"density": "mu", "logit_mean": 0.5}, {"mode_scale": 1.0}):
        with pytest.raises(ValidationError, match="has no effect with density"):
            config(**options)
    dumped = config(density="mode", mode_scale=0.5).model_dump()
    assert config.model_validate(dumped).mode_scale == 0.5
