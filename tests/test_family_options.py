"""What [model] says about noise levels and text: zero-terminal SNR, clip skip, empty prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
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
from sdtrain.export import export
from sdtrain.formats.schedulers import ddpm_scheduler
from sdtrain.freezing import Rule, build_plan
from sdtrain.loader import load
from sdtrain.losses.mse import mse
from sdtrain.recipe import load_train_recipe
from sdtrain.sampling import Style, pictures_of
from sdtrain.setup import open_setup
from sdtrain.step import denoising_loss
from tests.test_families import SD_BETAS, load_pipeline
from tests.tiny import load_tiny, tiny_batch
from tests.train_data import prepared_row, write_prepared

LAST = torch.tensor([0.9999], dtype=torch.float64)
BOTH = {"prediction_type": "v_prediction", "zero_terminal_snr": True}


# --- zero-terminal SNR on a checkpoint that has none ----------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.slow
def test_it_is_trained_saved_drawn_and_marked(
    tiny_model: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    family = load_tiny(tiny_model(name), **BOTH)
    assert bool(torch.isneginf(family.logsnr(LAST)))
    assert family.alpha_sigma(LAST)[0].tolist() == [0.0]
    batch = replace(tiny_batch(family, 2), u=LAST.repeat(2))
    with torch.no_grad():
        losses = denoising_loss(family, batch, mse)
        # without signal the velocity to predict is minus the picture, from noise alone
        latents = family.encode_images(batch.pixels)
        states = family.encode_prompts(batch.prompts)
        output = family.predict(batch.noise, batch.u, states, batch.micro)
    torch.testing.assert_close(losses, mse(output, -latents))

    family.save(tmp_path / name)
    saved = json.loads((tmp_path / name / "scheduler/scheduler_config.json").read_text())
    assert saved["prediction_type"] == "v_prediction"
    assert saved["rescale_betas_zero_snr"] is True
    assert saved["timestep_spacing"] == "trailing"
    again = load_tiny(tmp_path / name)
    assert again.prediction_type == "v_prediction"
    assert bool(torch.isneginf(again.logsnr(LAST)))
    assert not bool(
        torch.isneginf(load_tiny(tmp_path / name, zero_terminal_snr=False).logsnr(LAST))
    )
    (picture,) = pictures_of(again, ["a cat"], Style(7, 64, 2, 3.0))
    assert np.asarray(picture).std() > 0
    scheduler = load_pipeline(tmp_path / name).scheduler
    scheduler.set_timesteps(4)
    assert int(scheduler.timesteps[0]) == 999  # sampling begins where there is no signal

    export(tmp_path / name, "single-file", tmp_path / "a.safetensors")
    with safe_open(str(tmp_path / "a.safetensors"), framework="pt") as file:
        assert {"v_pred", "ztsnr"} <= set(file.keys())


def test_without_it_only_v_prediction_is_marked(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    load_tiny(tiny_model("sd15"), prediction_type="v_prediction").save(tmp_path / "v")
    saved = json.loads((tmp_path / "v/scheduler/scheduler_config.json").read_text())
    assert saved["rescale_betas_zero_snr"] is False
    export(tmp_path / "v", "single-file", tmp_path / "v.safetensors")
    with safe_open(str(tmp_path / "v.safetensors"), framework="pt") as file:
        assert "v_pred" in file.keys()  # noqa: SIM118
        assert "ztsnr" not in file.keys()  # noqa: SIM118


def test_epsilon_with_it_is_refused(
    tiny_model: Callable[[str], Path], train_recipe: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match="zero-terminal SNR with epsilon") as refused:
        load_tiny(tiny_model("sd15"), zero_terminal_snr=True)
    assert 'model.prediction_type = "v_prediction"' in refused.value.hint
    with pytest.raises(UserError, match="zero-terminal SNR with epsilon"):
        open_setup(load_train_recipe(train_recipe(), ["model.zero_terminal_snr=true"]))


def test_a_scheduler_that_knows_no_such_schedule_is_replaced() -> None:
    import diffusers

    plain = diffusers.PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1)  # SD 1.5's
    kept = ddpm_scheduler(plain, "v_prediction", is_zero_snr=False)
    assert type(kept) is diffusers.PNDMScheduler
    assert kept.config.prediction_type == "v_prediction"
    made = ddpm_scheduler(plain, "v_prediction", is_zero_snr=True)
    assert made.config.rescale_betas_zero_snr is True
    assert made.config.timestep_spacing == "trailing"
    assert made.config.clip_sample is False
    assert float(made.alphas_cumprod[-1]) == pytest.approx(0, abs=1e-6)
    euler = diffusers.EulerDiscreteScheduler(**SD_BETAS)  # SDXL's
    assert type(ddpm_scheduler(euler, "v_prediction", is_zero_snr=True)) is type(euler)


# --- layers ---------------------------------------------------------------------------------------


def with_more_layers(family: Any) -> Any:
    """The same family whose encoders have two more layers of their own, so that skips differ."""
    import copy

    for name in family.encoders:
        encoder = family.parts[name]
        inner = getattr(encoder, "text_model", encoder)
        layers = inner.encoder.layers
        generator = torch.Generator().manual_seed(1)
        for layer in list(layers):
            more = copy.deepcopy(layer)
            for parameter in more.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
            layers.append(more)
        encoder.config.num_hidden_layers = len(layers)
    return family


@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_sdxl_reads_the_layer_that_the_pipeline_reads(
    tiny_model: Callable[[str], Path], skipped: int
) -> None:
    family = with_more_layers(load_tiny(tiny_model("sdxl")))
    family.clip_skip = 2 + skipped  # ours counts layers from the end, theirs those beyond the usual
    states, _, pooled, _ = family.pipeline().encode_prompt(
        ["a cat", "red car, wrc"],
        device="cpu",
        do_classifier_free_guidance=False,
        clip_skip=skipped,
    )
    with torch.no_grad():
        ours = family.encode_prompts(["a cat", "red car, wrc"])
    torch.testing.assert_close(ours.groups[0][1], states, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.pooled, pooled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_layer_that_is_not_there_is_refused(tiny_model: Callable[[str], Path], name: str) -> None:
    with pytest.raises(UserError, match="model.clip_skip = 3, but text_encoder has 2 layers"):
        load_tiny(tiny_model(name), clip_skip=3)


@pytest.mark.parametrize(("name", "skip"), [("sd15", 1), ("sd15", 2), ("sdxl", 2), ("sdxl", 1)])
def test_gradients_reach_the_layers_that_are_read_and_no_others(
    tiny_model: Callable[[str], Path], name: str, skip: int
) -> None:
    family = load_tiny(tiny_model(name), clip_skip=skip)
    rules = [Rule("unet.**", lr=1e-4), Rule("text_encoder.**", lr=1e-5)]
    plan = build_plan(family, rules, Full())
    rates = {group.name: group.lr for group in plan.groups}
    assert rates == {"unet.**": 1e-4, "text_encoder.**": 1e-5}
    denoising_loss(family, tiny_batch(family, 2), mse).mean().backward()
    trained = plan.trained()
    without = [
        path
        for path, parameter in trained.items()
        if parameter.grad is None or not bool(parameter.grad.abs().sum())
    ]
    assert without == []
    assert all(parameter.grad is None for parameter in plan.frozen.values())
    layers = {path.split(".")[4] for path in trained if ".encoder.layers." in path}
    assert layers == {str(layer) for layer in range(2 - skip + 1)}
    norm = "text_encoder.text_model.final_layer_norm.weight"
    assert (norm in trained) is (name == "sd15")
    assert any(path.startswith("text_encoder_2") for path in plan.frozen) is (name == "sdxl")


# --- what an empty prompt means -------------------------------------------------------------------


def test_a_share_of_dropped_captions_is_zero_in_all_of_the_text_at_once(
    tiny_model: Callable[[str], Path],
) -> None:
    family = load_tiny(tiny_model("sdxl"), uncond_zero_prob=0.3)
    batch = tiny_batch(family, 4)
    prompts = ["", "a cat", "", ""]
    draws = torch.tensor([0.1, 0.1, 0.29, 0.31], dtype=torch.float64)
    with torch.no_grad():
        full = family.encode_prompts(prompts)
        mixed, _ = family.as_dropped(full, batch.micro, prompts, draws)
        (_, states), kept = mixed.groups[0], [False, True, False, True]
        assert (states.abs().sum((1, 2)) > 0).tolist() == kept
        assert (mixed.pooled.abs().sum(1) > 0).tolist() == kept  # one draw for both encoders
        assert torch.equal(states[1], full.groups[0][1][1])
        assert family.as_dropped(full, batch.micro, prompts, None)[0] is full  # evaluation

        batch = replace(batch, prompts=prompts)
        plain = denoising_loss(family, batch, mse)
        drawn = denoising_loss(family, replace(batch, text_draws=draws), mse)
        zero = denoising_loss(load_tiny(tiny_model("sdxl"), uncond="zero"), batch, mse)
    torch.testing.assert_close(drawn[[0, 2]], zero[[0, 2]])
    torch.testing.assert_close(drawn[[1, 3]], plain[[1, 3]])
    assert not torch.isclose(plain, drawn)[[0, 2]].any()


def test_the_draw_is_keyed_by_sample_and_visit(train_recipe: Callable[..., Path]) -> None:
    setup = open_setup(load_train_recipe(train_recipe("sdxl")))
    micro = [m for m, _ in zip(setup.micro_batches(), range(8), strict=False)]
    found: dict[tuple[str, int], float] = {}
    for _, batch in load(setup.reader(), micro, workers=0):
        assert batch.text_draws is not None
        keys = zip(batch.ids, batch.visits, strict=True)
        found |= dict(zip(keys, batch.text_draws.tolist(), strict=True))
    assert len(set(found.values())) == len(found) > 11
    again = setup.reader().batch([micro[3].slots[0]], [0.5])
    assert again.text_draws is not None
    assert float(again.text_draws[0]) == found[again.ids[0], again.visits[0]]


def test_empty_prompts_may_have_no_sizes(tiny_model: Callable[[str], Path]) -> None:
    family = load_tiny(tiny_model("sdxl"), uncond_zero_sizes=True)
    batch = tiny_batch(family, 2)  # the first prompt is empty
    seen = []
    projection = family.parts["unet"].add_time_proj
    hook = projection.register_forward_pre_hook(lambda _, given: seen.append(given[0].tolist()))
    with torch.no_grad():
        denoising_loss(family, batch, mse)
    assert seen == [[0] * 6 + batch.micro[1].time_ids()]
    seen.clear()
    pictures_of(family, ["a cat"], Style(7, 64, 1, 3.0))
    assert seen == [[0] * 6 + [64, 64, 0, 0, 64, 64]]  # the unconditional half comes first
    seen.clear()
    pictures_of(family, [""], Style(7, 64, 1, 3.0))
    assert seen == [[0] * 12]
    hook.remove()


def test_a_mix_of_zeros_with_zeros_is_refused() -> None:
    with pytest.raises(ValidationError, match="uncond_zero_prob goes with"):
        config_for("family", "sdxl")(uncond="zero", uncond_zero_prob=0.5)


# --- long prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_prompts_may_be_of_any_length(tiny_model: Callable[[str], Path], name: str) -> None:
    family = load_tiny(tiny_model(name), max_chunks=40)
    prompt = "cat " * (75 * 20 + 1)
    assert family.num_chunks(prompt) == 21
    with torch.no_grad():
        states = family.encode_prompts([prompt]).groups[0][1]
        batch = tiny_batch(family, 1)
        output = family.predict(batch.noise, batch.u, family.encode_prompts([prompt]), batch.micro)
    assert states.shape[1] == 21 * 77
    assert bool(torch.isfinite(output).all())


@pytest.mark.parametrize(("most", "is_cut"), [(4, True), (5, False)])
def test_prompts_that_the_model_would_cut_are_announced(
    train_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], most: int, is_cut: bool
) -> None:
    settings = ["prompt.max_chunks=5", f"model.max_chunks={most}"]
    open_setup(load_train_recipe(train_recipe(), settings))
    said = " ".join(capsys.readouterr().err.split())
    assert ("fitted to 5 chunks (prompt.max_chunks), and the model keeps 4" in said) is is_cut


@pytest.mark.parametrize("mode", ["tags", "caption", "pick", "concat", "concat_random"])
def test_the_recipes_prompt_mode_reaches_training(
    train_recipe: Callable[..., Path], tmp_path: Path, mode: str
) -> None:
    tag = {"name": "red_car", "category": "general", "score": 1.0, "source": "human"}
    rows = [prepared_row(number, tags=[tag], caption=f"photo {number}") for number in range(1, 5)]
    data = write_prepared(tmp_path / "dual", rows)  # whose own policy says: caption
    settings = [f'prompt.mode="{mode}"', "prompt.dropout_p=0.0", "prompt.pick.p_tags=0.5"]
    setup = open_setup(load_train_recipe(train_recipe(data=data), settings))
    texts = [slot.text.prompt for slot in islice(setup.order.slots(), 40)]
    has_tag = [bool(re.search("red.car", text)) for text in texts]
    has_caption = ["photo" in text for text in texts]
    tag_first = [bool(re.search("red.car.*photo", text)) for text in texts]
    assert all(tag or caption for tag, caption in zip(has_tag, has_caption, strict=True))
    both = [tag and caption for tag, caption in zip(has_tag, has_caption, strict=True)]
    expected = {"tags": (40, 0), "caption": (0, 40), "concat": (40, 40), "concat_random": (40, 40)}
    if mode == "pick":
        assert 8 < sum(has_tag) < 32
        assert not any(both)
    else:
        assert (sum(has_tag), sum(has_caption)) == expected[mode]
    if mode == "concat_random":
        assert 8 < sum(tag_first) < 32
    elif mode == "concat":
        assert all(tag_first)
