"""Adapters: the output at the start, the algebra, the parameter counts, and the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sdprep.errors import UserError
from sdprep.plugins import config_for, configs
from sdtrain.formats.lora_keys import kohya_stem
from sdtrain.freezing import Rule, build_plan
from tests.test_families import load_pipeline
from tests.tiny import load_tiny, tiny_batch

FAMILIES = ("sd15", "sdxl")
EVERYTHING = [Rule("unet.**", lr=1e-3), Rule("text_encoder*.**", lr=5e-4)]


def predict(family: Any) -> torch.Tensor:
    batch = tiny_batch(family, 3)
    with torch.no_grad():
        conditioning = family.encode_prompts(batch.prompts)
        return family.predict(batch.noise, batch.u, conditioning, batch.micro)


def with_lora(folder: Path, **options: Any) -> tuple[Any, Any, Any]:
    family = load_tiny(folder)
    adapter = config_for("adapter", "lora")(**{"rank": 4, **options}).build()
    plan = build_plan(family, EVERYTHING, adapter)
    return family, adapter, plan


def disturb(plan: Any) -> None:
    """Stand in for training: give the outer matrices values."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for path, parameter in plan.trained().items():
            if "lora_B" in path:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_every_adapter_is_tested_here() -> None:
    from tests.test_adapters_kinds import CASES

    assert list(configs("adapter")) == sorted({"full", "lora", *(case[0] for case in CASES)})


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_starts_as_the_base_and_merges_into_what_it_says(
    tiny_model: Callable[[str], Path], name: str
) -> None:
    base = load_tiny(tiny_model(name))
    family, adapter, plan = with_lora(tiny_model(name), alpha=2.0)
    assert torch.equal(predict(family), predict(base))
    disturb(plan)
    changed = predict(family)
    assert (changed - predict(base)).abs().max() > 1e-3

    expected = dict(base.named_parameters())
    trained = plan.trained()
    for path in adapter.layers:
        down, up = trained[f"{path}.lora_A.weight"], trained[f"{path}.lora_B.weight"]
        expected[f"{path}.weight"] = expected[f"{path}.weight"] + 2.0 / 4 * up @ down
    adapter.merge(family)
    torch.testing.assert_close(predict(family), changed, rtol=5e-6, atol=5e-6)
    merged = dict(family.named_parameters())
    assert list(merged) == list(expected)
    for path, parameter in merged.items():
        torch.testing.assert_close(parameter.data, expected[path].data, rtol=0, atol=1e-6)
    assert not [n for n, _ in family.parts["unet"].named_parameters() if "lora" in n]


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_trains_only_its_own_matrices(tiny_model: Callable[[str], Path], name: str) -> None:
    family, _, plan = with_lora(tiny_model(name))
    assert all("lora_" in path for path in plan.trained())
    assert not any(parameter.requires_grad for _, parameter in family.named_parameters())
    encoders = {path.split(".")[0] for path in plan.trained()} - {"unet"}
    assert encoders == {part for part in family.parts if part.startswith("text_encoder")}
    last_layer = "text_encoder.text_model.encoder.layers.1."
    assert any(path.startswith(last_layer) for path in plan.trained()) is (name == "sd15")
    assert [group.lr for group in plan.groups] == [1e-3, 5e-4]
    assert "alpha = rank" in plan.notes[-1]
    before = torch.get_rng_state()
    _, _, again = with_lora(tiny_model(name))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(plan.trained().values(), again.trained().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_rules_choose_the_modules(tiny_model: Callable[[str], Path]) -> None:
    family = load_tiny(tiny_model("sd15"))
    adapter = config_for("adapter", "lora")(targets="attention").build()
    rules = [Rule("unet.**.attn2.to_k", lr=1e-4), Rule("unet.mid_block.**", freeze=True)]
    plan = build_plan(family, rules, adapter)
    owners = {path.rpartition(".lora_")[0] for path in plan.trained()}
    assert owners
    assert all(path.endswith("attn2.to_k") and ".mid_block." not in path for path in owners)


def test_a_rule_without_a_layer_for_the_adapter_is_refused(
    tiny_model: Callable[[str], Path],
) -> None:
    adapter = config_for("adapter", "lora")().build()
    rules = [Rule("unet.**", lr=1e-4), Rule("unet.conv_in.**", lr=1e-4)]
    with pytest.raises(UserError, match=r"unet\.conv_in\.\*\*.* adapter lora can train"):
        build_plan(load_tiny(tiny_model("sd15")), rules, adapter)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "lora-kohya.safetensors"])
def test_both_files_reload_in_diffusers_with_the_same_output(
    tiny_model: Callable[[str], Path],
    name: str,
    file: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    family, adapter, plan = with_lora(tiny_model(name), alpha=3.0)
    disturb(plan)
    expected = predict(family)
    assert [path.name for path in adapter.save(family, tmp_path)].count(file) == 1

    pipeline = load_pipeline(tiny_model(name))
    pipeline.load_lora_weights(str(tmp_path), weight_name=file)
    assert not [record for record in caplog.records if "not" in record.message.lower()]
    reloaded = load_tiny(tiny_model(name))
    for part in family.trainable_parts:
        reloaded.parts[part] = getattr(pipeline, part)
    torch.testing.assert_close(predict(reloaded), expected, rtol=1e-5, atol=1e-5)


def test_keys_of_the_full_size_models(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    blocks = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    config = {"layers_per_block": 2, "up_block_types": blocks}
    xl: Any = {"has_two_encoders": True, "unet_config": config}
    block = "transformer_blocks.0.attn1.to_q"
    assert (
        kohya_stem(f"unet.down_blocks.1.attentions.0.{block}", **xl)
        == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    )
    assert kohya_stem(f"unet.up_blocks.1.attentions.2.{block}", **xl).startswith(
        "lora_unet_output_blocks_5_1_"
    )
    assert kohya_stem(f"unet.mid_block.attentions.0.{block}", **xl).startswith(
        "lora_unet_middle_block_1_transformer"
    )
    layer = "text_model.encoder.layers.3.mlp.fc1"
    assert kohya_stem(f"text_encoder_2.{layer}", **xl) == (
        "lora_te2_text_model_encoder_layers_3_mlp_fc1"
    )
    assert kohya_stem(
        f"text_encoder.{layer}", has_two_encoders=False, unet_config=config
    ).startswith("lora_te_text_")
    family, adapter, _ = with_lora(tiny_model("sd15"), alpha=3.0)
    adapter.save(family, tmp_path)
    with safe_open(str(tmp_path / "pytorch_lora_weights.safetensors"), "pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
        keys = list(opened.keys())
    assert settings["unet.lora_alpha"] == 3.0
    encoder_keys = [key for key in keys if key.startswith("text_encoder")]
    assert encoder_keys
    assert all(key.startswith("text_encoder.text_model.encoder.") for key in encoder_keys)
