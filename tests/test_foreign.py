"""Models and adapters that this program did not save are measured like its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdprep.errors import DataError
from sdprep.plugins import config_for
from sdtrain.export import export
from sdtrain.foreign import kind_of, read_deltas, with_adapter
from sdtrain.formats.lora_keys import write_diffusers, write_kohya
from sdtrain.freezing import Rule, build_plan
from sdtrain.noise import noise_for
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import Setup, open_setup
from sdtrain.validate import validate_checkpoints
from tests.adapter_reader import merge_kohya
from tests.evaluated import WITH_EVALUATION

Recipe = Callable[..., Path]
LAYERS = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (3, 2.0),
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2": (2, 2.0),
    "unet.down_blocks.0.resnets.0.conv1": (2, 2.0),
    "text_encoder.text_model.encoder.layers.1.self_attn.q_proj": (4, 2.0),
}


@pytest.fixture(scope="module")
def places(tiny_model: Callable[[str], Path]) -> dict[str, tuple]:
    from tests.tiny import load_tiny

    found = {}
    for name in ("sd15", "sdxl"):
        family = load_tiny(tiny_model(name))
        found[name] = family, dict(family.named_parameters())
    return found


def layers(parameters: dict) -> tuple[dict, dict]:
    """Tensors of a LoRA in kohya's names, and what it should add to each weight."""
    generator = torch.Generator().manual_seed(1)
    modules, expected = {}, {}
    for wanted, (rank, alpha) in LAYERS.items():
        # The two models have their attention in different blocks.
        module = (
            wanted if f"{wanted}.weight" in parameters else wanted.replace("s.0.att", "s.1.att")
        )
        shape = parameters[f"{module}.weight"].shape
        down = torch.randn((rank, *shape[1:]), generator=generator)
        up = torch.randn((shape[0], rank, *(1 for _ in shape[2:])), generator=generator)
        modules[module] = {"down": down, "up": up, "alpha": torch.tensor(alpha)}
        product = torch.einsum("or,ri->oi", up.reshape(shape[0], rank), down.reshape(rank, -1))
        expected[f"{module}.weight"] = (alpha / rank) * product.reshape(shape)
    return modules, expected


@pytest.mark.parametrize("family_name", ["sd15", "sdxl"])
@pytest.mark.parametrize("spelling", ["kohya", "peft", "no prefix"])
def test_every_spelling_adds_the_same(
    places: dict, family_name: str, spelling: str, tmp_path: Path
) -> None:
    family, parameters = places[family_name]
    modules, expected = layers(parameters)
    file = tmp_path / "lora.safetensors"
    if spelling == "kohya":
        ends = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
        write_kohya(
            file, {m: {ends[e]: t for e, t in of.items()} for m, of in modules.items()}, family
        )
    else:
        ends = {"down": "lora_A.weight", "up": "lora_B.weight", "alpha": "alpha"}
        names = {m: {ends[e]: t for e, t in of.items()} for m, of in modules.items()}
        write_diffusers(file, names)
        if spelling == "no prefix":
            tensors = {k.replace(".text_model.", "."): v for k, v in load_file(file).items()}
            scaled = {m.replace(".text_model.", "."): of["alpha"] for m, of in modules.items()}
            save_file({**tensors, **{f"{m}.alpha": a for m, a in scaled.items()}}, file)
    assert kind_of(file) == "adapter"
    before = {name: parameters[name].detach().clone() for name in expected}
    found = read_deltas(family, parameters, file)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert torch.allclose(found[name], delta, rtol=1e-5, atol=1e-5)
    with with_adapter(family, parameters, file):
        for name, delta in expected.items():
            assert torch.allclose(parameters[name], before[name] + delta, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(parameters[name], value) for name, value in before.items())


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("locon", {"rank": 2, "alpha": 3.0, "targets": "all", "tucker": True}),
    ("dora", {"rank": 2, "targets": "all"}),
    ("loha", {"rank": 2, "targets": "all", "tucker": True}),
    ("lokr", {"rank": 2, "factor": 4, "alpha": 3.0, "targets": "all"}),
    ("lokr", {"whole": True, "targets": "all"}),
    ("ia3", {}),
    ("oft", {"block_size": 4, "targets": "all", "rescaled": True}),
    ("boft", {"block_size": 8}),
]


@pytest.mark.parametrize(("name", "options"), KINDS, ids=[name for name, _ in KINDS])
def test_files_of_every_kind_are_read(
    places: dict, name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """The same weights as the independent reader makes of them, whose formulas are its own."""
    family, parameters = places["sdxl"]
    trained = copy(family)
    trained.parts = {part: deepcopy(network) for part, network in family.parts.items()}
    adapter = config_for("adapter", name)(**options).build()
    rules = [Rule("unet.**", lr=1.0), Rule("text_encoder*.**", lr=1.0)]
    plan = build_plan(trained, rules, adapter)
    with torch.no_grad():
        for path, parameter in plan.trained().items():
            parameter.add_(0.1 * noise_for(1, "shake", path, 0, parameter.shape))
    file = write_kohya(tmp_path / "adapter.safetensors", adapter.kohya_tensors(), family)
    found = read_deltas(family, parameters, file)
    assert found.keys() == {f"{path}.weight" for path in adapter.layers}
    other = copy(family)
    other.parts = {part: deepcopy(network) for part, network in family.parts.items()}
    assert merge_kohya(other, load_file(file)) == 0
    for path, value in other.named_parameters():
        mine = parameters[path] + found[path] if path in found else parameters[path]
        torch.testing.assert_close(mine, value, rtol=1e-5, atol=1e-6)


STEM, PATH = "lora_unet_mid_block_resnets_0_conv1", "unet.mid_block.resnets.0.conv1.weight"


def theirs(ends: dict[str, torch.Tensor], places: dict, folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "theirs.safetensors"
    save_file({f"{STEM}.{end}": tensor.contiguous() for end, tensor in ends.items()}, file)
    return read_deltas(*places["sd15"], file)


def test_what_only_others_write_is_read_too(places: dict, tmp_path: Path) -> None:
    base = places["sd15"][1][PATH].detach()
    torch.manual_seed(0)
    count = len(base)
    down, up = torch.randn(2, *base.shape[1:]), torch.randn(count, 2, 1, 1)
    plain = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    moved = base + 0.5 * torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    # LyCORIS's older DoRA: lengths of inputs. Its file's first side is 1.
    scale = torch.rand(1, base.shape[1], 1, 1) + 0.5
    found = theirs({**plain, "dora_scale": scale}, places, tmp_path)
    lengths = moved.square().sum((0, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(base + found[PATH], moved * scale / lengths, rtol=1e-4, atol=1e-5)
    # The same file with lengths of outputs.
    scale = torch.rand(count, 1, 1, 1) + 0.5
    found = theirs({**plain, "dora_scale": scale}, places, tmp_path)
    lengths = moved.square().sum((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(base + found[PATH], moved * scale / lengths, rtol=1e-4, atol=1e-5)
    # kohya's OFT: alpha bounds the norm of all blocks together.
    blocks = torch.randn(count // 4, 4, 4)
    found = theirs({"oft_blocks": blocks, "alpha": torch.tensor(0.01)}, places, tmp_path)
    skew = blocks - blocks.mT
    skew *= 0.01 * count / skew.square().sum().sqrt()
    turn = torch.block_diag(*((torch.eye(4) + q) @ (torch.eye(4) - q).inverse() for q in skew))
    new = torch.einsum("po,pikl->oikl", turn, base)
    torch.testing.assert_close(base + found[PATH], new, rtol=1e-4, atol=1e-5)
    # Whole differences, of the bias too, and of a norm beside it.
    bias = torch.randn(count)
    found = theirs({"diff": up[:, :1] * down[:1], "diff_b": bias}, places, tmp_path)
    torch.testing.assert_close(found[PATH], up[:, :1] * down[:1])
    assert torch.equal(found[PATH.replace("weight", "bias")], bias)
    file = tmp_path / "norm.safetensors"
    save_file({"lora_unet_mid_block_resnets_0_norm2.w_norm": bias}, file)
    (delta,) = read_deltas(*places["sd15"], file).values()
    torch.testing.assert_close(delta, bias)


def test_alpha_of_single_layers_stands_in_the_metadata(places: dict, tmp_path: Path) -> None:
    """As diffusers writes it for ranks that differ, and for rank-stabilized ones."""
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    shape = places["sd15"][1][f"unet.{name}.weight"].shape
    pair = {"lora_A": torch.ones(4, shape[1]), "lora_B": torch.ones(shape[0], 4)}
    tensors = {f"unet.{name}.{end}.weight": tensor for end, tensor in pair.items()}
    for more, scale in (
        ({}, 2 / 4),
        ({"unet.alpha_pattern": {"attn1.to_q": 6}}, 6 / 4),
        ({"unet.alpha_pattern": {"attn2.to_q": 6}}, 2 / 4),
        ({"unet.use_rslora": True}, 2 / 2),
    ):
        about = json.dumps({"unet.lora_alpha": 2, **more})
        file = tmp_path / "theirs.safetensors"
        save_file(tensors, file, metadata={"lora_adapter_metadata": about})
        found = read_deltas(*places["sd15"], file)
        torch.testing.assert_close(found[f"unet.{name}.weight"], torch.full(shape, scale * 4))


def test_what_does_not_fit_is_refused_by_name(places: dict, tmp_path: Path) -> None:
    family, parameters = places["sd15"]
    file = tmp_path / "lora.safetensors"
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    up, down = torch.zeros(64, 2), torch.zeros(2, 64)
    for tensors, words in (
        ({"lora_unet_nowhere.lora_down.weight": down}, "no such layer"),
        ({f"{stem}.lora_down.weight": down}, r"lora_up\.weight is missing beside it"),
        (
            {f"{stem}.lora_down.weight": down[:, :3].contiguous(), f"{stem}.lora_up.weight": up},
            "the layer's weight is",
        ),
        ({f"{stem}.hada_w1_a": up}, "hada_w1_b is missing beside it"),
        ({f"{stem}.b1.weight": up}, r"to_q\.b1\.weight: only LoRA, LoCon.* can be read here"),
        ({f"{stem}.diff": up}, r"the layer's weight is .*: the adapter makes"),
        ({f"{stem}.diff_b": up[0]}, "the layer has no bias of"),
    ):
        save_file(tensors, file)
        with pytest.raises(DataError, match=words):
            read_deltas(family, parameters, file)
    file.write_bytes(b"torn")
    with pytest.raises(DataError, match="is damaged") as found:
        kind_of(file)
    assert "Download or copy it again" in found.value.hint
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    for path in (tmp_path / "notes.txt", tmp_path / "absent", tmp_path):
        with pytest.raises(DataError, match="is no checkpoint"):
            kind_of(path)


@pytest.mark.parametrize("name", ["dora", "ia3"])
def test_a_file_is_measured_without_the_recipes_own_adapter(
    name: str, train_recipe: Recipe, tmp_path: Path
) -> None:
    """DoRA would undo what a file does to lengths; a factor of (IA)³ is called like its weight."""
    recipe = load_train_recipe(train_recipe(), (*WITH_EVALUATION, f"adapter.type={name}"))
    setup: Setup = open_setup(recipe)
    with torch.no_grad():
        for path, parameter in setup.plan.trained().items():
            parameter.mul_(1.2).add_(0.1 * noise_for(3, "shake", path, 0, parameter.shape))
    file = setup.adapter.save(setup.family, tmp_path / "file")[-1]
    setup.adapter.merge(setup.family)
    setup.family.save(tmp_path / "merged")
    found = validate_checkpoints(recipe, [file, tmp_path / "merged"], tmp_path / "to")
    base, of_file, merged = (r["mean"] for r in found["evaluations"] if r["set"] == "validation")
    assert of_file == pytest.approx(merged, rel=1e-5)
    assert of_file != pytest.approx(base, rel=1e-4)


@pytest.mark.slow
def test_foreign_files_are_measured_on_the_recipes_probe(
    train_recipe: Recipe, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = load_train_recipe(train_recipe(), WITH_EVALUATION)
    setup: Setup = open_setup(recipe)
    parameters = {**setup.plan.frozen, **setup.plan.trained()}
    modules, expected = layers(parameters)
    lora = tmp_path / "their lora.safetensors"
    ends = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
    small = {"down": 0.05, "up": 1.0, "alpha": 1.0}
    write_kohya(
        lora,
        {m: {ends[e]: t * small[e] for e, t in of.items()} for m, of in modules.items()},
        setup.family,
    )
    with torch.no_grad():
        for name, delta in expected.items():
            parameters[name].add_(0.05 * delta)
    setup.family.save(tmp_path / "merged")
    single = tmp_path / "single.safetensors"
    export(tiny_model("sd15"), "single-file", single)
    found = validate_checkpoints(recipe, [lora, tmp_path / "merged", single], tmp_path / "to")
    means = {(row["checkpoint"], row["set"]): row["mean"] for row in found["evaluations"]}
    for name in ("validation", "train_probe"):
        base = means["base", name]
        assert means["single", name] == pytest.approx(base, rel=1e-6)
        assert means["merged", name] == pytest.approx(means["their lora", name], rel=1e-5)
        assert means["merged", name] != pytest.approx(base, rel=1e-4)
