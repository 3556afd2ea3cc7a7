"""The families against diffusers' own pipelines and schedulers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdprep.errors import DataError, UserError
from sdprep.plugins import config_for, configs
from sdtrain.batch import MicroConditioning
from sdtrain.ddpm import DdpmObjective, alphas_cumprod_of, zero_terminal
from tests.tiny import load_tiny, tiny_batch

FAMILIES = ("sd15", "sdxl")
WITH_FLOW = (*FAMILIES, "sdxl_flow")  # whose objective is tested in test_flow.py
LEVELS = torch.arange(1000, dtype=torch.float64) / 1000
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def load_pipeline(folder: Path) -> Any:
    import diffusers

    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    extra = {"safety_checker": None} if name == "StableDiffusionPipeline" else {}
    return getattr(diffusers, name).from_pretrained(str(folder), **extra)


def test_every_family_is_tested_here() -> None:
    assert tuple(configs("family")) == WITH_FLOW


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_targets_equal_diffusers_scheduler(prediction_type: str) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**SD_BETAS, num_train_timesteps=1000)
    objective = DdpmObjective(alphas_cumprod_of(scheduler.config), prediction_type)
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(1000, 4, 3, 5, generator=generator)
    noise = torch.randn(1000, 4, 3, 5, generator=generator)
    timesteps = torch.arange(1000)
    assert torch.equal(objective.model_time(LEVELS), timesteps)
    assert torch.equal(objective.model_time(LEVELS + 0.00099), timesteps)

    alpha, sigma = (scale.view(-1, 1, 1, 1) for scale in objective.alpha_sigma(LEVELS))
    expected = scheduler.add_noise(clean, noise, timesteps)
    torch.testing.assert_close(alpha * clean + sigma * noise, expected, rtol=2e-5, atol=2e-5)
    target = objective.target(clean, noise, LEVELS)
    velocity = scheduler.get_velocity(clean, noise, timesteps)
    torch.testing.assert_close(
        target, noise if prediction_type == "epsilon" else velocity, rtol=2e-5, atol=2e-5
    )


def test_the_table_of_noise_levels() -> None:
    objective = DdpmObjective(alphas_cumprod_of(SD_BETAS), "epsilon")
    expected = {0: 0.99915, 1: 0.99829603, 100: 0.89422348, 500: 0.27633268, 999: 0.00466010}
    for t, value in expected.items():
        assert round(float(objective.alphas_cumprod[t]), 8) == value
    snr = objective.logsnr(LEVELS).double().exp()
    assert float(snr[0]) == pytest.approx(1175.47, abs=0.005)
    assert float(snr[999]) == pytest.approx(0.00468192, abs=5e-9)
    assert [int((snr < bound).nonzero()[0]) for bound in (5, 1)] == [147, 354]


def test_zero_terminal_snr_equals_diffusers_and_the_table() -> None:
    from diffusers import DDPMScheduler

    ours = alphas_cumprod_of({**SD_BETAS, "rescale_betas_zero_snr": True})
    theirs = DDPMScheduler(**SD_BETAS, rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=2e-5)
    assert float(ours[999]) == 0
    assert float(ours[0]) == pytest.approx(0.99915, abs=1e-12)
    assert float(ours[500]) == pytest.approx(0.2410188, abs=5e-8)
    assert float(ours[998]) == pytest.approx(1.96789e-7, abs=5e-13)
    objective = DdpmObjective(ours, "v_prediction")
    assert float(objective.logsnr(LEVELS)[999]) == -float("inf")


def test_epsilon_with_zero_terminal_snr_is_refused() -> None:
    with pytest.raises(UserError, match="zero-terminal"):
        DdpmObjective(zero_terminal(alphas_cumprod_of(SD_BETAS)), "epsilon")


@pytest.mark.parametrize(
    "prompts", [["", "a photo of a cat"], ["red car, wrc", "1girl, ünïcode ✓"]]
)
def test_prompts_encode_as_in_the_sd15_pipeline(
    tiny_model: Callable[[str], Path], prompts: list[str]
) -> None:
    folder = tiny_model("sd15")
    pipeline = load_pipeline(folder)
    family = load_tiny(folder)
    theirs, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    with torch.no_grad():
        ours = family.encode_prompts(prompts)
    torch.testing.assert_close(ours.groups[0][1], theirs, rtol=0, atol=1e-6)
    assert ours.pooled is None


def test_clip_skip_reads_an_earlier_layer_through_the_final_norm(
    tiny_model: Callable[[str], Path],
) -> None:
    # diffusers' own clip_skip fails under transformers 5, so the layers are run by hand.
    family = load_tiny(tiny_model("sd15"), clip_skip=2)
    encoder = family.parts["text_encoder"]
    tokenizer = family.folder.tokenizers["tokenizer"]
    ids = tokenizer(["a cat"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        ours = family.encode_prompts(["a cat"]).groups[0][1]
        last = family.encode_prompts(["a cat"], clip_skip=1).groups[0][1]
        encoder.encoder.layers = encoder.encoder.layers[:-1]
        expected = encoder(ids).last_hidden_state
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(ours, last)


@pytest.mark.parametrize(
    "prompts", [["", "a photo of a cat"], ["red car, wrc", "1girl, ünïcode ✓"]]
)
def test_prompts_encode_as_in_the_sdxl_pipeline(
    tiny_model: Callable[[str], Path], prompts: list[str]
) -> None:
    folder = tiny_model("sdxl")
    states, _, pooled, _ = load_pipeline(folder).encode_prompt(
        prompts, device="cpu", do_classifier_free_guidance=False
    )
    with torch.no_grad():
        ours = load_tiny(folder).encode_prompts(prompts)
    torch.testing.assert_close(ours.groups[0][1], states, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.pooled, pooled, rtol=0, atol=1e-6)


def test_time_ids_equal_the_sdxl_pipeline(tiny_model: Callable[[str], Path]) -> None:
    pipeline = load_pipeline(tiny_model("sdxl"))
    micro = MicroConditioning((1200, 801), (17, 250), (832, 1216))
    theirs = pipeline._get_add_time_ids(
        micro.original_size_hw,
        micro.crop_top_left,
        micro.target_size_hw,
        dtype=torch.float32,
        text_encoder_projection_dim=pipeline.text_encoder_2.config.projection_dim,
    )
    assert torch.tensor([micro.time_ids()], dtype=torch.float32).equal(theirs)
    assert micro.time_ids() == [1200, 801, 17, 250, 832, 1216]


def test_the_network_is_told_the_sizes(tiny_model: Callable[[str], Path]) -> None:
    family = load_tiny(tiny_model("sdxl"))
    batch = tiny_batch(family, 2)
    seen = []
    embed = family.parts["unet"].add_time_proj
    hook = embed.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    with torch.no_grad():
        family.predict(batch.noise, batch.u, family.encode_prompts(batch.prompts), batch.micro)
    hook.remove()
    assert seen[0].tolist() == batch.micro[0].time_ids() * 2


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_of_different_lengths_do_not_touch_each_other(
    tiny_model: Callable[[str], Path], name: str
) -> None:
    family = load_tiny(tiny_model(name))
    batch = tiny_batch(family, 4)
    long = ", ".join(["red car"] * 60)
    prompts = ["a cat", long, "", "a dog " * 50]
    with torch.no_grad():
        together = family.predict(batch.noise, batch.u, family.encode_prompts(prompts), batch.micro)
        for slot, prompt in enumerate(prompts):
            alone = family.predict(
                batch.noise[slot : slot + 1],
                batch.u[slot : slot + 1],
                family.encode_prompts([prompt]),
                batch.micro[:1],
            )
            torch.testing.assert_close(together[slot], alone[0], rtol=1e-5, atol=1e-5)
    assert [family.num_chunks(prompt) for prompt in prompts] == [1, 3, 1, 2]


def test_dropped_captions_become_the_empty_prompt_or_zeros(
    tiny_model: Callable[[str], Path],
) -> None:
    folder = tiny_model("sdxl")
    with torch.no_grad():
        empty = load_tiny(folder).encode_prompts(["", "a cat"])
        zero = load_tiny(folder, uncond="zero").encode_prompts(["", "a cat"])
    assert empty.groups[0][1][0].abs().sum() > 0
    assert zero.groups[0][1][0].abs().sum() == 0
    assert zero.pooled[0].abs().sum() == 0
    assert torch.equal(zero.groups[0][1][1], empty.groups[0][1][1])
    assert torch.equal(zero.pooled[1], empty.pooled[1])


def test_a_saved_folder_says_what_no_prompt_means_and_what_is_predicted(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    for uncond in ("empty", "zero"):
        options = {"uncond": uncond, "prediction_type": "v_prediction"}
        load_tiny(tiny_model("sdxl"), **options).save(tmp_path / uncond)
        index = json.loads((tmp_path / uncond / "model_index.json").read_text())
        assert index["force_zeros_for_empty_prompt"] is (uncond == "zero")
        scheduler = load_pipeline(tmp_path / uncond).scheduler
        assert scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", WITH_FLOW)
def test_images_encode_as_the_vae_says(tiny_model: Callable[[str], Path], name: str) -> None:
    family = load_tiny(tiny_model(name))
    pixels = tiny_batch(family, 2, height=48, width=64).pixels
    latents = family.encode_images(pixels)
    vae = family.parts["vae"]
    with torch.no_grad():
        scale = 0.18215 if name == "sd15" else 0.13025
        expected = vae.encode(pixels).latent_dist.mode() * scale
    assert latents.shape == (2, family.latent_channels, 12, 16)
    torch.testing.assert_close(latents, expected)
    assert not latents.requires_grad


@pytest.mark.parametrize("name", FAMILIES)
def test_canonical_paths_and_a_round_trip_through_disk(
    tiny_model: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    family = load_tiny(tiny_model(name))
    before = dict(family.named_parameters())
    encoders = [path for path in before if path.startswith("text_encoder")]
    assert len(encoders) == {"sd15": 36, "sdxl": 73}[name]
    outside = [path for path in encoders if path.split(".")[1] != "text_model"]
    assert outside == {"sd15": [], "sdxl": ["text_encoder_2.text_projection.weight"]}[name]
    with torch.no_grad():
        for parameter in before.values():
            parameter.add_(0.01)
    family.save(tmp_path / "saved folder")

    with safe_open(str(tmp_path / "saved folder/text_encoder/model.safetensors"), "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118
    copy = tmp_path / name
    (tmp_path / "saved folder").rename(copy)
    after = dict(load_tiny(copy).named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[path], before[path]) for path in before)
    assert load_pipeline(copy).tokenizer("a photo of a cat").input_ids[1:-1] == [
        *(320, 1125, 539, 320, 2368)
    ]
    assert (copy / "tokenizer" / "merges.txt").stat().st_size > 500_000


def test_a_checkpoint_with_missing_tensors_is_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "sd15"
    shutil.copytree(tiny_model("sd15"), copy)
    weights = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(str(weights))
    del tensors["text_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(tensors, str(weights), metadata={"format": "pt"})
    with pytest.raises(DataError, match="text_encoder lacks 1 tensors"):
        load_tiny(copy)


def test_wrong_paths_and_kinds_are_named(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_model("sdxl")
    wrong_family = config_for("family", "sd15")()
    with pytest.raises(UserError, match="StableDiffusionXLPipeline"):
        wrong_family.build(str(folder))
    with pytest.raises(UserError, match="model_index"):
        wrong_family.build(str(tmp_path))
    with pytest.raises(UserError, match="Did you mean .*sdxl"):
        wrong_family.build(str(folder.parent / "sdx"))
    with pytest.raises(UserError, match="no single file"):
        wrong_family.build("model.safetensors")


@pytest.mark.parametrize("name", WITH_FLOW)
def test_pictures_are_drawn_under_the_text_that_trains(
    tiny_model: Callable[[str], Path], name: str
) -> None:
    family = load_tiny(tiny_model(name))
    pipeline = family.pipeline()
    options: dict[str, Any] = {
        "num_inference_steps": 2,
        "height": 32,
        "width": 48,
        "output_type": "pt",
        "guidance_scale": 3.0,
    }
    by_text = pipeline(
        "a cat", negative_prompt="", generator=torch.Generator().manual_seed(3), **options
    )
    with torch.no_grad():
        inputs = family.pipeline_inputs(["a cat"])
    by_states = pipeline(generator=torch.Generator().manual_seed(3), **inputs, **options)
    torch.testing.assert_close(by_states.images, by_text.images, rtol=0, atol=1e-5)
    long = family.pipeline_inputs(["a cat, " * 40])
    assert long["prompt_embeds"].shape == long["negative_prompt_embeds"].shape
    assert long["prompt_embeds"].shape[1] == 154


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("convention", ["n77", "n75+2"])
def test_long_prompts_are_guided_away_from_as_many_empty_chunks(
    tiny_model: Callable[[str], Path], name: str, convention: str
) -> None:
    """With n75+2, what is left out between the chunks of a prompt is left out of empty ones too."""
    family = load_tiny(tiny_model(name), chunk_convention=convention)
    with torch.no_grad():
        inputs = family.pipeline_inputs(["a cat, " * 40])
        (chunk,) = family.encode_prompts([""]).groups[0][1]
    inner = [chunk[:77], chunk[:77]] if convention == "n77" else [chunk[:76], chunk[1:]]
    assert inputs["negative_prompt_embeds"].shape == inputs["prompt_embeds"].shape
    assert torch.equal(inputs["negative_prompt_embeds"][0], torch.cat(inner))
