"""What lycoris-lora makes of our files: the weights it rebuilds, where it is right itself.

Not installed with the project; `pip install lycoris-lora` in an environment of its own to run it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sdprep.plugins import config_for
from sdtrain.noise import noise_for

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("locon", {"rank": 3, "alpha": 2.0}, "locon.LoConModule"),
    ("locon", {"rank": 3, "tucker": True}, "locon.LoConModule"),
    ("dora", {"rank": 3, "targets": "all"}, "locon.LoConModule"),
    ("loha", {"rank": 3, "targets": "all"}, "loha.LohaModule"),
    ("loha", {"rank": 3, "tucker": True, "targets": "all"}, "loha.LohaModule"),
    ("lokr", {"rank": 2, "factor": 4, "targets": "all"}, "lokr.LokrModule"),
    ("lokr", {"whole": True, "factor": 4, "targets": "all"}, "lokr.LokrModule"),
    ("oft", {"block_size": 4, "rescaled": True, "targets": "all"}, "diag_oft.DiagOFTModule"),
    ("boft", {"block_size": 4, "targets": "all"}, "boft.ButterflyOFTModule"),
    ("ia3", {}, "ia3.IA3Module"),
]


@pytest.mark.parametrize("is_conv", [False, True])
@pytest.mark.parametrize(("name", "options", "theirs"), CASES)
def test_lycoris_rebuilds_the_same_weight(
    name: str, options: dict[str, Any], theirs: str, is_conv: bool
) -> None:
    lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    if is_conv and name == "ia3":
        pytest.skip("(IA)³ is for linear layers")
    base = nn.Conv2d(16, 32, 3, padding=1) if is_conv else nn.Linear(16, 32)
    network = nn.Module()
    network.to_k = base
    adapter = config_for("adapter", name)(**options).build()
    adapter.kind.wrap(network, {"to_k": "unet.to_k"})
    layer = network.to_k
    with torch.no_grad():
        base.weight.copy_(noise_for(1, "base", name, 0, base.weight.shape))
        adapter.kind.draw("unet.to_k", layer)
        for end, parameter in adapter.kind.parameters(layer).items():
            parameter.add_(0.1 * noise_for(1, "shake", end, 0, parameter.shape))
        tensors = {end: tensor.detach() for end, tensor in adapter.kind.kohya(layer).items()}
        module, _, kind = theirs.partition(".")
        maker = getattr(getattr(lycoris.modules, module), kind)
        wanted = [tensors.pop(end, None) for end in maker.weight_list]
        assert not tensors, f"lycoris does not know {sorted(tensors)}"
        if name == "ia3":  # it forgets the flag, and its own is the right one here
            wanted = wanted[:1]
        plain = nn.Conv2d(16, 32, 3, padding=1) if is_conv else nn.Linear(16, 32)
        plain.load_state_dict(base.state_dict())
        rebuilt = maker.make_module_from_state_dict("x", plain, *wanted)
        if name in ("loha", "lokr"):  # its merge scales twice; this is what its forward takes
            weight = plain.weight + rebuilt.get_weight(plain.weight.shape)
        else:
            weight, _ = rebuilt.get_merged_weight()
        expected = adapter.kind.merged_weight(layer)
    torch.testing.assert_close(weight.view_as(expected), expected, rtol=1e-5, atol=1e-5)
