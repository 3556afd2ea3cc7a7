"""Names of other files lead back to canonical paths: every tensor of the published models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdtrain.families import _full_size
from sdtrain.families._opening import _published
from sdtrain.families._sdxl import PARTS as SDXL_PARTS
from sdtrain.families.sd15 import PARTS as SD15_PARTS
from sdtrain.formats.lora_keys import kohya_stem
from sdtrain.formats.single_file_keys import Entry, entries
from sdtrain.formats.spelling import canonical_entries
from sdtrain.paths import canonical_path
from tests.tiny import load_tiny

FULL_SIZE: tuple[Any, ...] = ((SD15_PARTS, _full_size.SD15), (SDXL_PARTS, _full_size.SDXL))


def paths_of(networks: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    return {
        part: [
            canonical_path(part, network, name)
            for name in network.state_dict()
            if not name.endswith("position_ids")
        ]
        for part, network in networks.items()
    }


def file_of(networks: Mapping[str, Any]) -> list[Entry]:
    return [
        entry
        for part, paths in paths_of(networks).items()
        for entry in entries(
            *(part, [path.removeprefix(f"{part}.") for path in paths]),
            networks[part].config if part in ("unet", "vae") else {},
            two="text_encoder_2" in networks,
        )
    ]


def full_size(parts: Any, sizes: Any) -> dict[str, nn.Module]:
    blueprint = _published(parts, sizes)
    with torch.device("meta"):
        return {part: blueprint.build(part) for part in parts}


def must_come_back(networks: Mapping[str, Any]) -> None:
    made = file_of(networks)
    assert len(made) > 100
    for entry, found in zip(made, canonical_entries(e.key for e in made), strict=True):
        assert found.sources == entry.sources
        assert (found.layout == "rows") == (entry.layout == "rows")
        assert (found.layout == "transposed") == (entry.layout == "transposed")


def must_come_back_from_kohya(networks: Mapping[str, Any]) -> None:
    modules = sorted(
        path.removesuffix(".weight")
        for part, paths in paths_of(networks).items()
        for path in paths
        if part != "vae" and path.endswith(".weight")
    )
    assert len(modules) > 50
    two, config = "text_encoder_2" in networks, networks["unet"].config
    stems = [kohya_stem(module, has_two_encoders=two, unet_config=config) for module in modules]
    found = canonical_entries(f"{stem}.lora_down.weight" for stem in stems)
    assert [e.sources for e in found] == [(f"{module}.lora_down.weight",) for module in modules]


@pytest.mark.parametrize(("parts", "sizes"), FULL_SIZE)
def test_every_published_name_comes_back(parts: Any, sizes: Any) -> None:
    networks = full_size(parts, sizes)
    must_come_back(networks)
    must_come_back_from_kohya(networks)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_so_do_those_of_networks_of_other_depth(
    family: str, tiny_model: Callable[[str], Path]
) -> None:
    networks = load_tiny(tiny_model(family)).parts
    must_come_back(networks)
    must_come_back_from_kohya(networks)


def test_an_adapter_on_a_few_layers_says_enough() -> None:
    path = "unet.down_blocks.{}.attentions.1.transformer_blocks.0.attn2.to_k"
    stem = "lora_unet_input_blocks_{}_1_transformer_blocks_0_attn2_to_k"
    found = canonical_entries(f"{stem.format(n)}.alpha" for n in (5, 8))
    assert [e.sources for e in found] == [(f"{path.format(n)}.alpha",) for n in (1, 2)]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("unet.conv_in.weight", "unet.conv_in.weight"),
        ("text_encoder.embeddings.a", "text_encoder.text_model.embeddings.a"),
        ("text_encoder_2.text_projection.weight", "text_encoder_2.text_projection.weight"),
        (
            "vae.decoder.mid_block.attentions.0.proj_attn.bias",
            "vae.decoder.mid_block.attentions.0.to_out.0.bias",
        ),
        ("unet.mid_block.a.lora_A.weight", "unet.mid_block.a.lora_down.weight"),
        ("unet.mid_block.a.lora_magnitude_vector", "unet.mid_block.a.dora_scale"),
        ("v_pred", "v_pred"),
        ("model_ema.diffusion_modelout2bias", "model_ema.diffusion_modelout2bias"),
        ("model.diffusion_model.something.else", "unet.something.else"),
    ],
)
def test_other_spellings_and_names_that_nobody_knows(name: str, path: str) -> None:
    (entry,) = canonical_entries([name])
    assert entry == Entry(name, (path,), "same")
