"""Every kind of adapter: start, merge, files, what trains, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from sdprep.errors import UserError
from sdprep.plugins import config_for
from sdtrain.adapters._layers import run
from sdtrain.formats.spelling import canonical_entries, pieces
from sdtrain.freezing import Rule, build_plan
from sdtrain.noise import noise_for
from tests.adapter_reader import merge_kohya
from tests.test_families import load_pipeline
from tests.tiny import load_tiny, tiny_batch

# Names, options and family; between them every option, on linear layers and convolutions.
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("locon", {"rank": 2, "alpha": 3.0}, "sd15"),
    ("locon", {"rank": 2, "tucker": True, "targets": "all"}, "sdxl"),
    ("dora", {"rank": 2, "targets": "all"}, "sd15"),
    ("loha", {"rank": 2, "targets": "all"}, "sdxl"),
    ("loha", {"rank": 2, "alpha": 2.0, "tucker": True, "targets": "all"}, "sd15"),
    ("lokr", {"rank": 2, "factor": 4, "alpha": 3.0, "targets": "all"}, "sd15"),
    ("lokr", {"rank": 2, "factor": 4, "tucker": True, "targets": "all"}, "sd15"),
    ("lokr", {"whole": True, "factor": -1, "targets": "all"}, "sd15"),
    ("lokr", {"rank": 1, "factor": 8, "decompose_both": True}, "sdxl"),
    ("dylora", {"rank": 4, "unit": 2, "targets": "all"}, "sd15"),
    ("ia3", {}, "sdxl"),
    ("oft", {"block_size": 4, "targets": "all"}, "sd15"),
    ("boft", {"block_size": 8, "targets": "attention+ff+resnets", "rescaled": True}, "sd15"),
    ("oft", {"block_size": 8, "targets": "attention", "rescaled": True}, "sdxl"),
]
IDS = [f"{name}-{'-'.join(map(str, options.values()))}" for name, options, _ in CASES]


# All of the encoders and the way down of the UNet; what trains beside it stays still.
RULES = [
    Rule("unet.**", lr=1e-3),
    Rule("text_encoder*.**", lr=5e-4),
    Rule("unet.up_blocks.**", freeze=True),
]
KEYS = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
HALF = {torch.float16: 5e-5, torch.bfloat16: 5e-4}


loaded = lru_cache(load_tiny)


def model(folder: Path) -> Any:
    """The networks are the test's own; reading the files takes longer than copying them."""
    family = copy(loaded(folder))
    family.parts = {part: deepcopy(network) for part, network in family.parts.items()}
    return family


def predict(family: Any) -> torch.Tensor:
    """What the model makes of one sample, with gradients."""
    batch = tiny_batch(family, 1)
    conditioning = family.encode_prompts(["a photo of a red car"])
    return family.predict(batch.noise, batch.u, conditioning, batch.micro)


def attached(folder: Path, name: str, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    family = model(folder)
    adapter = config_for("adapter", name)(**options).build()
    return family, adapter, build_plan(family, RULES, adapter)


def shake(plan: Any, size: float = 0.1) -> None:
    """Stand in for training: move every trained tensor."""
    with torch.no_grad():
        for path, parameter in plan.trained().items():
            parameter.add_(size * noise_for(3, "shake", path, 0, parameter.shape))


@pytest.mark.parametrize(("name", "options", "base"), CASES, ids=IDS)
def test_start_gradients_merge_and_file(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    base: str,
) -> None:
    reloaded = model(tiny_model(base))
    start = predict(reloaded).detach()
    family, adapter, plan = attached(tiny_model(base), name, options)
    assert torch.equal(predict(family), start)

    shake(plan)
    expected = predict(family)
    assert (expected - start).abs().max() > 1e-3
    only_these_train(family, plan, expected)
    half_precision(adapter)
    file = adapter.save(family, tmp_path)[-1]
    assert file.name == "lora-kohya.safetensors"
    assert merge_kohya(reloaded, load_file(str(file))) == 0
    torch.testing.assert_close(predict(reloaded), expected, rtol=1e-5, atol=1e-5)

    adapter.merge(family)
    torch.testing.assert_close(predict(family), expected, rtol=0, atol=5e-6)
    merged, read = dict(family.named_parameters()), dict(reloaded.named_parameters())
    assert list(merged) == list(read)
    for path, parameter in merged.items():
        torch.testing.assert_close(parameter.data, read[path].data, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["ia3", "dora", "lora"])
def test_every_base_weight_below_an_adapter_is_watched(
    tiny_model: Callable[[str], Path], name: str
) -> None:
    family, _, plan = attached(tiny_model("sd15"), name, {})
    start = plan.frozen_hashes()
    assert set(start) == {path for path, _ in family.named_parameters()}
    plan.assert_frozen(start)
    with torch.no_grad():
        dict(family.named_parameters())[KEYS].add_(1)
    with pytest.raises(AssertionError, match=f"frozen tensors changed: {KEYS}"):
        plan.assert_frozen(start)


def by_canonical_path(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As `sdtrain diff` sees a file: sides of length 1 count for nothing."""
    return {
        path: piece.detach().squeeze()
        for entry in canonical_entries(tensors)
        for path, piece in zip(entry.sources, pieces(tensors[entry.key], entry), strict=True)
    }


@pytest.mark.parametrize(("name", "options", "base"), [*CASES, ("lora", {}, "sdxl")])
def test_a_checkpoint_has_the_tensors_of_its_files_under_the_same_paths(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    base: str,
) -> None:
    family, adapter, plan = attached(tiny_model(base), name, options)
    shake(plan)
    trained = by_canonical_path(plan.trained())
    for file in adapter.save(family, tmp_path):
        found = by_canonical_path(load_file(str(file)))
        assert {p for p in found if not p.endswith((".alpha", ".on_input"))} == set(trained)
        for path, tensor in trained.items():
            assert torch.equal(found[path], tensor), path


def only_these_train(family: Any, plan: Any, out: torch.Tensor) -> None:
    """Every tensor of the adapter gets a gradient, no tensor of the base does."""
    out.square().mean().backward()
    for path, parameter in plan.trained().items():
        assert parameter.grad is not None, path
        assert parameter.grad.abs().max() > 0, path
    assert all(parameter.grad is None for _, parameter in family.named_parameters())
    assert {path.split(".")[0] for path in plan.trained()} == set(family.trainable_parts)


def half_precision(adapter: Any) -> None:
    """Merged equals forward: mean square difference layer by layer, as LyCORIS measures it."""
    for (path, layer), dtype in product(list(adapter.layers.items())[::9], HALF):
        weight = layer.base_layer.weight
        x = noise_for(0, "input", path, 0, (2, weight.shape[1], *[8] * (weight.dim() - 2)))
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            merged = run(layer.base_layer, x, adapter.kind.merged_weight(layer), layer.bias)
            assert (merged - layer(x)).float().square().mean() < HALF[dtype], path


@pytest.mark.parametrize(
    ("name", "options", "file"),
    [
        ("locon", {"targets": "all"}, "lora-kohya.safetensors"),
        ("dora", {"targets": "attention+ff+resnets"}, "pytorch_lora_weights.safetensors"),
    ],
)
def test_what_diffusers_reads_it_reads_rightly(
    tiny_model: Callable[[str], Path],
    name: str,
    options: dict[str, Any],
    file: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also a check of the original names of the UNet's blocks by other people's code."""
    folder = tiny_model("sdxl")
    family, adapter, plan = attached(folder, name, {"rank": 4, **options})
    shake(plan, 0.05)
    expected = predict(family).detach()
    adapter.save(family, tmp_path)
    pipeline = load_pipeline(folder)
    pipeline.load_lora_weights(str(tmp_path), weight_name=file)
    assert not [record for record in caplog.records if "not" in record.message.lower()]
    reloaded = model(folder)
    for part in family.trainable_parts:
        reloaded.parts[part] = getattr(pipeline, part)
    torch.testing.assert_close(predict(reloaded), expected, rtol=1e-5, atol=1e-5)


def test_a_module_that_does_not_fit_is_refused_with_rule_and_reason(
    tiny_model: Callable[[str], Path],
) -> None:
    rules = [Rule("unet.**", lr=1e-4)]
    for name, options, reason in (
        ("oft", {"block_size": 8, "targets": "all"}, "conv_out, .*4 outputs do not divide"),
        ("boft", {"block_size": 10}, "32 outputs are not 10 times a power of two"),
    ):
        adapter = config_for("adapter", name)(**options).build()
        with pytest.raises(UserError, match=rf"'unet\.\*\*' chooses unet\..*{reason}"):
            build_plan(model(tiny_model("sd15")), rules, adapter)
    adapter = config_for("adapter", "ia3")().build()
    rules.append(Rule("unet.conv_in", lr=1e-4))
    with pytest.raises(UserError, match="ia3 can train, only such as unet.conv_in.weight") as error:
        build_plan(model(tiny_model("sd15")), rules, adapter)
    assert "key, value and last feed-forward layers" in str(error.value.hint)


@pytest.mark.parametrize("name", ["locon", "loha", "lokr", "ia3", "oft", "boft"])
def test_what_diffusers_cannot_read_is_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    first = {case[0]: case for case in reversed(CASES)}
    options = {"tucker": True, "rank": 2} if name == "locon" else first[name][1]
    family = model(tiny_model("sd15"))
    adapter = config_for("adapter", name)(**options).build()
    build_plan(family, [Rule("unet.mid_block.**", lr=1e-4)], adapter)
    with pytest.raises(UserError, match=f"no spelling for what adapter {name}"):
        adapter.diffusers_tensors()
    assert [path.name for path in adapter.save(family, tmp_path)] == ["lora-kohya.safetensors"]


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("loha", {"rank": 33}, "less than or equal to 32"),
        ("dylora", {"rank": 6, "unit": 4}, "unit 4 does not divide rank 6"),
        ("lokr", {"whole": True, "rank": 4}, "rank has no effect"),
        ("lokr", {"factor": 0}, "factor must be"),
        ("locon", {"tucker": True, "targets": "attention"}, "tucker has no effect"),
        ("boft", {"block_size": 5}, "even"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    name: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        config_for("adapter", name)(**options)


def test_dora_starts_as_the_base_under_bfloat16_and_with_dead_rows(
    tiny_model: Callable[[str], Path],
) -> None:
    family = model(tiny_model("sd15"))
    with torch.no_grad():
        family.parts["unet"].mid_block.attentions[0].proj_in.weight[3] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        start = predict(family).detach()
        adapter = config_for("adapter", "dora")(rank=2, targets="all").build()
        plan = build_plan(family, RULES, adapter)
        assert torch.equal(predict(family), start)
    shake(plan, 0.01)
    assert predict(family).isfinite().all()


def test_dylora_trains_one_block_and_is_cut_down_exactly(
    tiny_model: Callable[[str], Path],
) -> None:
    folder = tiny_model("sd15")
    family, adapter, plan = attached(folder, "dylora", {"rank": 6, "unit": 2, "alpha": 3.0})
    shake(plan)
    layer = next(iter(adapter.layers.values()))
    blocks = []
    for samples_seen in range(0, 40, 4):
        adapter.begin_step(11, samples_seen)
        blocks.append(layer.block)
        assert {each.block for each in adapter.layers.values()} == {layer.block}
    assert set(blocks) == {0, 1, 2}
    adapter.begin_step(11, 8)
    assert layer.block == blocks[2]

    x = noise_for(0, "x", "", 0, (2, layer.base_layer.in_features))
    last = 2 * layer.block + 2
    down, up = layer.adapter["down"], layer.adapter["up"]
    expected = layer.base_layer(x) + 3.0 / last * (x @ down[:last].T @ up[:, :last].T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    layer(x).square().sum().backward()
    moved = set(down.grad.abs().sum(1).nonzero().flatten().tolist())
    assert moved == {last - 2, last - 1} == set(up.grad.abs().sum(0).nonzero().flatten().tolist())
    layer.eval()
    torch.testing.assert_close(
        layer(x), layer.base_layer(x) + 0.5 * (x @ down.T @ up.T), rtol=1e-5, atol=1e-6
    )
