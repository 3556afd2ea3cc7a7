"""Freezing rules on tiny models, and the shipped presets on the full-size names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdprep.errors import UserError
from sdprep.plugins import config_for
from sdtrain.adapters.full import Full
from sdtrain.families.sdxl import StableDiffusionXL
from sdtrain.freeze_plan import FreezePlan
from sdtrain.freezing import Rule, build_plan
from sdtrain.globs import matches, nearest_paths
from sdtrain.losses.mse import mse
from sdtrain.step import denoising_loss
from sdtrain.tensor_hashes import tensor_hash
from tests.full_size import sdxl_unet
from tests.tiny import load_tiny, tiny_batch

names = st.lists(st.sampled_from(["unet", "0", "10", "to_q", "a"]), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("glob", "path", "expected"),
    [
        ("unet.*", "unet.weight", True),
        ("unet.*", "unet.conv_in.weight", False),
        ("unet.**", "unet.conv_in.weight", True),
        ("unet.**", "unet", False),
        ("unet.**", "unet_2.weight", False),
        ("text_encoder.**", "text_encoder_2.text_model.a", False),
        ("text_encoder*.**", "text_encoder_2.text_model.a", True),
        ("**.attn1.*", "unet.blocks.0.attn1.to_q", True),
        ("**.to_q", "unet.blocks.0.attn1.to_q", True),
        ("unet.up_blocks.1.**", "unet.up_blocks.10.weight", False),
        ("unet.up_blocks.?.w", "unet.up_blocks.1.w", True),
        ("unet.up_blocks.?.w", "unet.up_blocks.10.w", False),
        ("unet+conv", "unettconv", False),
    ],
)
def test_globs(glob: str, path: str, expected: bool) -> None:
    assert matches(glob, path) is expected


@given(names, st.integers(0, 5))
def test_a_star_is_one_name_and_two_stars_are_any_number(parts: list[str], at: int) -> None:
    path = ".".join(parts)
    at %= len(parts)
    starred = ".".join([*parts[:at], "*", *parts[at + 1 :]])
    assert matches(starred, path)
    assert not matches(starred, ".".join([*parts[: at + 1], "extra", *parts[at + 1 :]]))
    assert matches("**", path)
    assert matches(".".join([*parts[:at], "**"]), path)


def plan_for(folder: Path, rules: list[Rule], **options: Any) -> tuple[Any, FreezePlan]:
    family = load_tiny(folder)
    return family, build_plan(family, rules, Full(), **options)


def test_the_last_match_wins_and_the_rest_is_frozen(tiny_model: Callable[[str], Path]) -> None:
    rules = [
        Rule("unet.**", lr=1e-5),
        Rule("unet.up_blocks.1.**", lr=5e-7),
        Rule("unet.up_blocks.1.resnets.**", freeze=True),
        Rule("unet.conv_in", lr=0.0),
    ]
    family, plan = plan_for(tiny_model("sd15"), rules)
    assert [(group.name, group.lr) for group in plan.groups] == [
        ("unet.**", 1e-5),
        ("unet.up_blocks.1.**", 5e-7),
    ]
    for path, parameter in family.named_parameters():
        in_last = path.startswith("unet.up_blocks.1.")
        is_frozen = not path.startswith("unet.") or path.startswith(
            ("unet.up_blocks.1.resnets.", "unet.conv_in.")
        )
        assert parameter.requires_grad is not is_frozen, path
        assert (path in plan.frozen) is is_frozen
        assert (path in plan.groups[1].parameters) is (in_last and not is_frozen)
        assert (path in plan.groups[0].parameters) is (not in_last and not is_frozen)
    assert not family.parts["vae"].training
    assert not family.parts["unet"].up_blocks[1].resnets[0].training
    assert family.parts["unet"].up_blocks[1].attentions[0].training


def test_a_plan_does_not_depend_on_what_trained_before(tiny_model: Callable[[str], Path]) -> None:
    family = load_tiny(tiny_model("sd15"))
    for part in family.parts.values():
        part.requires_grad_(True).train()
    plan = build_plan(family, [Rule("unet.mid_block.**", lr=1e-5)], Full())
    assert not any(p.requires_grad for p in plan.frozen.values())
    assert all(path.startswith("unet.mid_block.") for path in plan.trained())
    assert not any(module.training for module in family.parts["vae"].modules())
    assert not any(module.training for module in family.parts["unet"].up_blocks.modules())


def test_the_table_adds_up(tiny_model: Callable[[str], Path]) -> None:
    rules = [Rule("unet.**", lr=1e-5), Rule("text_encoder_2.**", lr=0)]
    family, plan = plan_for(tiny_model("sdxl"), rules)
    for part, network in family.parts.items():
        rows = [row for row in plan.rows if row.part == part]
        assert sum(row.num_total for row in rows) == sum(p.numel() for p in network.parameters())
        assert sum(row.num_tensors for row in rows) == len(list(network.parameters()))
    assert plan.percent("unet") == 100
    assert plan.percent("text_encoder_2") == 0
    lines = plan.table().splitlines()
    assert lines[0].split() == ["part", "rule", "tensors", "trained", "/", "total", "%", "lr"]
    unet = next(line for line in lines if line.startswith("unet "))
    assert unet.split()[1:] == [
        "unet.**",
        str(len(list(family.parts["unet"].parameters()))),
        "1,360,740",
        "/",
        "1,360,740",
        "100.0000",
        "1e-05",
    ]
    assert any(line.startswith("vae") and line.endswith("frozen") for line in lines)
    plan.check_expected({"unet": 100.0, "vae": 0})
    with pytest.raises(UserError, match="100.0000 % would train"):
        plan.check_expected({"unet": 71.16})
    with pytest.raises(UserError, match="unett"):
        plan.check_expected({"unett": 71.16})


@pytest.mark.parametrize(
    ("glob", "hint"),
    [
        ("unet.up_blocks.1.attention.**", "unet.up_blocks.1.attentions.**"),
        ("unet.up_blocks.7.**", "unet.up_blocks.1.**"),
        ("unets.**", "unet.**"),
        ("text_encoder.encoder.**", "text_encoder.text_model.**"),
        ("unet.conv_in.weigth", "unet.conv_in.weight"),
        ("unet.down_blocks.0", "unet.down_blocks.0.**"),
        ("vae.**", "vae never trains"),
    ],
)
def test_a_rule_that_matches_nothing_names_the_nearest_paths(
    tiny_model: Callable[[str], Path], glob: str, hint: str
) -> None:
    with pytest.raises(UserError) as caught:
        plan_for(tiny_model("sd15"), [Rule("unet.**", lr=1e-5), Rule(glob, freeze=True)])
    assert repr(glob) in str(caught.value)
    assert hint in str(caught.value)


def test_nothing_to_train_is_refused(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="nothing would train"):
        plan_for(tiny_model("sd15"), [Rule("unet.**", lr=0)])
    last = "text_encoder.text_model.final_layer_norm"
    with pytest.raises(UserError, match=r"nothing would train.*\n.*2 tensors, behind layer 2"):
        plan_for(tiny_model("sdxl"), [Rule(last, lr=1e-5)])


def test_layers_that_an_adapter_cannot_take_are_named(tiny_model: Callable[[str], Path]) -> None:
    lora = config_for("adapter", "lora")(rank=4).build()
    with pytest.raises(UserError, match=r"'unet.\*\*.norm1' matches nothing that adapter lora"):
        build_plan(load_tiny(tiny_model("sd15")), [Rule("unet.**.norm1", lr=1e-4)], lora)


def test_a_rule_that_later_ones_overrule_is_noted(tiny_model: Callable[[str], Path]) -> None:
    rules = [Rule("unet.conv_in", freeze=True), Rule("unet.**", lr=1e-5)]
    _, plan = plan_for(tiny_model("sd15"), rules)
    said = "train rule 'unet.conv_in' decides nothing: later rules win wherever it matches"
    assert plan.notes == [said]
    assert said in plan.table()
    assert plan_for(tiny_model("sd15"), rules[::-1])[1].notes == []


def test_a_preset_for_another_size_is_named(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"^preset unet-71 rule 'unet.up_blocks.2.resnets.\*\*'"):
        plan_for(tiny_model("sdxl"), [], lr=1e-5, preset="unet-71")


def test_what_no_gradient_can_reach_is_frozen_and_said(
    tiny_model: Callable[[str], Path],
) -> None:
    rules = [Rule("unet.**", lr=1e-4), Rule("text_encoder*.**", lr=1e-3)]
    family, plan = plan_for(tiny_model("sdxl"), rules)
    dead = [path for path in plan.frozen if path.startswith("text_encoder.")]
    layer = "text_encoder.text_model.encoder.layers.1."
    norm = "text_encoder.text_model.final_layer_norm."
    assert dead
    assert all(path.startswith((layer, norm)) for path in dead)
    assert any(f"{len(dead)} tensors" in note for note in plan.notes)
    assert "(no gradient)" in plan.table()

    batch = tiny_batch(family, 2)
    denoising_loss(family, batch, mse).mean().backward()
    missing = [path for path, p in plan.trained().items() if p.grad is None]
    assert missing == []
    assert all(p.grad is None for p in plan.frozen.values())


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_frozen_tensors_keep_their_bytes_and_own_no_state(
    tiny_model: Callable[[str], Path], name: str
) -> None:
    rules = [Rule("unet.**", lr=1e-3), Rule("unet.mid_block.**", freeze=True)]
    rules += [Rule("text_encoder.text_model.encoder.layers.0.**", lr=1e-3)]
    family, plan = plan_for(tiny_model(name), rules)
    start = plan.frozen_hashes()
    trained = {path: tensor_hash(p) for path, p in plan.trained().items()}
    optimizer = config_for("optimizer", "adamw")().build(plan.optimizer_groups())
    for step in range(2):
        denoising_loss(family, tiny_batch(family, 2, seed=step), mse).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    plan.assert_frozen(start)
    assert len(optimizer.state) == len(trained)
    assert {id(p) for p in optimizer.state} == {id(p) for p in plan.trained().values()}
    same = [path for path, p in plan.trained().items() if tensor_hash(p) == trained[path]]
    assert same == []

    frozen_path, frozen = next(iter(plan.frozen.items()))
    with torch.no_grad():
        frozen.view(-1)[0] += 1e-7
    with pytest.raises(AssertionError, match=frozen_path):
        plan.assert_frozen(start)


class FullSize:
    """The full-size UNet's names and shapes as a family; nothing here runs a forward."""

    name = StableDiffusionXL.name
    presets = StableDiffusionXL.presets
    trainable_parts = ("unet",)

    def __init__(self) -> None:
        self.parts = {"unet": sdxl_unet()}

    def named_parameters(self) -> Any:
        return ((f"unet.{name}", p) for name, p in self.parts["unet"].named_parameters())

    def never_trained(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("preset", "frozen_tensors", "trained", "percent"),
    [
        ("unet-71", 476, 1_827_058_244, 71.1620),
        ("unet-63", 576, 1_629_562_564, 63.4697),
        (None, 0, 2_567_463_684, 100.0),
    ],
)
def test_presets_train_the_shares_they_are_named_for(
    preset: str | None, frozen_tensors: int, trained: int, percent: float
) -> None:
    plan = build_plan(FullSize(), [], Full(), lr=1e-5, preset=preset)  # type: ignore[arg-type]
    assert len(plan.frozen) == frozen_tensors
    assert len(plan.frozen) + len(plan.trained()) == 1_680
    assert sum(p.numel() for p in plan.trained().values()) == trained
    assert round(plan.percent("unet"), 4) == percent
    plan.check_expected({"unet": percent})


def test_presets_that_do_not_fit_are_named(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("sdxl")
    with pytest.raises(UserError, match="did you mean|Did you mean unet-71"):
        plan_for(folder, [], lr=1e-5, preset="unet71")
    with pytest.raises(UserError, match=r"Set train\.lr"):
        plan_for(folder, [], preset="unet-71")
    with pytest.raises(UserError, match="matches no parameter"):
        plan_for(folder, [], lr=1e-5, preset="unet-71")
    with pytest.raises(UserError, match="There are: none"):
        plan_for(tiny_model("sd15"), [], lr=1e-5, preset="unet-71")


def test_layers_that_the_full_size_text_encoder_never_trains() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, vocab_size=49408
            )
        )
    family = SimpleNamespace(parts={"text_encoder": encoder}, clip_skip=2)
    globs = next(iter(StableDiffusionXL.never_trained(family).values()))  # type: ignore[arg-type]
    dead = 0
    for name, parameter in encoder.named_parameters():
        path = f"text_encoder.text_model.{name.removeprefix('text_model.')}"
        dead += parameter.numel() if any(matches(glob, path) for glob in globs) else 0
    assert sum(p.numel() for p in encoder.parameters()) == 123_060_480
    assert dead == 7_089_408


def test_nearest_paths_never_fails() -> None:
    assert nearest_paths("anything.**", ["unet.conv.weight"])
    assert nearest_paths("", ["unet.conv.weight"])
