"""Models and adapters that this program did not save are measured like its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdprep.errors import DataError
from sdtrain.export import export
from sdtrain.foreign import kind_of, read_deltas, with_adapter
from sdtrain.formats.lora_keys import write_diffusers, write_kohya
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import Setup, open_setup
from sdtrain.validate import validate_checkpoints
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


def test_what_does_not_fit_is_refused_by_name(places: dict, tmp_path: Path) -> None:
    family, parameters = places["sd15"]
    file = tmp_path / "lora.safetensors"
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    up, down = torch.zeros(64, 2), torch.zeros(2, 64)
    for tensors, words in (
        ({"lora_unet_nowhere.lora_down.weight": down}, "no such layer"),
        ({f"{stem}.lora_down.weight": down}, "no such layer"),
        (
            {f"{stem}.lora_down.weight": down[:, :3].contiguous(), f"{stem}.lora_up.weight": up},
            "the layer's weight is",
        ),
        ({f"{stem}.hada_w1_a": up}, "only plain LoRA"),
    ):
        save_file(tensors, file)
        with pytest.raises(DataError, match=words):
            read_deltas(family, parameters, file)
    file.write_bytes(b"torn")
    with pytest.raises(DataError, match="is damaged"):
        kind_of(file)
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    for path in (tmp_path / "notes.txt", tmp_path / "absent", tmp_path):
        with pytest.raises(DataError, match="is no checkpoint"):
            kind_of(path)


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
