"""Numbers of trained parameters on the full-size UNets, against published counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdprep.plugins import config_for
from sdtrain.adapters._layers import put
from tests.full_size import sd15_unet, sdxl_unet

ATTENTION, BOTH, RESNETS = (
    {"targets": "attention"},
    {"targets": "attention+ff"},
    {"targets": "resnets"},
)


def count(unet: Any, name: str, options: dict[str, Any]) -> tuple[int, int]:
    """Layers and trained parameters; the UNet is as before afterwards."""
    adapter = config_for("adapter", name)(**options).build()
    modules = {path: m for path, m in unet.named_modules() if adapter.wanted(path, m)}
    with torch.device("meta"):
        adapter.kind.wrap(unet, {path: f"unet.{path}" for path in modules})
    layers = [unet.get_submodule(path) for path in modules]
    parameters = [p for layer in layers for p in adapter.kind.parameters(layer).values()]
    for path, module in modules.items():
        put(unet, path, module)
    return len(layers), sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize(
    ("name", "options", "layers", "parameters"),
    [
        ("lora", {"rank": 8, **ATTENTION}, 560, 11_612_160),
        ("lora", {"rank": 16, **ATTENTION}, 560, 23_224_320),
        ("lora", {"rank": 128, **ATTENTION}, 560, 185_794_560),
        ("lora", {"rank": 8, **BOTH}, 700, 20_930_560),
        ("lora", {"rank": 128, **BOTH}, 700, 334_888_960),
        ("locon", {"rank": 1, **BOTH}, 700, 2_616_320),
        ("locon", {"rank": 8, **RESNETS}, 34, 2_616_320),
        ("locon", {"rank": 8, "tucker": True, **RESNETS}, 34, 505_984),
        ("dora", {"rank": 8, **ATTENTION}, 560, 11_612_160 + 665_600),
        ("dylora", {"rank": 8, **ATTENTION}, 560, 11_612_160),
        ("loha", {"rank": 8, **ATTENTION}, 560, 23_224_320),
        ("lokr", {"whole": True, "factor": -1, **ATTENTION}, 560, 1_513_920),
        ("lokr", {"whole": True, "factor": 16, **ATTENTION}, 560, 3_874_560),
        ("lokr", {"whole": True, "factor": 8, **ATTENTION}, 560, 14_960_640),
        ("lokr", {"rank": 8, "factor": 8, **ATTENTION}, 560, 1_487_360),
        ("lokr", {"whole": True, "factor": 8, **BOTH}, 700, 34_169_600),
        ("oft", {"block_size": 8, **ATTENTION}, 560, 2_329_600),
        ("oft", {"block_size": 16, **ATTENTION}, 560, 4_992_000),
        ("ia3", BOTH, 350, 665_600),
        # 640 = 10 · 2^6 has 7 stages and 1280 has 8, each of 4.5 numbers an output.
        ("boft", {"block_size": 10, **ATTENTION}, 560, 23_731_200),
    ],
)
def test_counts_of_sdxl(name: str, options: dict[str, Any], layers: int, parameters: int) -> None:
    assert count(sdxl_unet(), name, options) == (layers, parameters)


def test_counts_of_sd15() -> None:
    assert count(sd15_unet(), "lora", {"rank": 128, **ATTENTION}) == (128, 25_509_888)
