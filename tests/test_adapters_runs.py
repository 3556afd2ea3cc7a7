"""Adapters in whole runs: resume, micro-batches, evaluation, pictures and exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdprep.errors import UserError
from sdprep.plugins import config_for
from sdtrain.export import export
from sdtrain.recipe import load_train_recipe
from sdtrain.trackers.jsonl import read_metrics
from sdtrain.trainer import steps
from sdtrain.update import take_step
from sdtrain.validate import validate_checkpoints
from tests.adapter_reader import merge_kohya
from tests.test_adapters import predict
from tests.test_resume import assert_same_end, run
from tests.test_resume import stop_after as stop_after  # a fixture
from tests.test_trainer import distance, fresh, trained
from tests.tiny import load_tiny

Recipe = Callable[..., Path]
FEW = 'train.rules=[{ match = "unet.mid_block.**", lr = 1e-2 }]'
DYLORA = (
    FEW,
    "adapter.type=dylora",
    "adapter.rank=6",
    "adapter.unit=2",
    "adapter.alpha=6",
    "train.samples=12",
)


@pytest.mark.slow
def test_dylora_goes_on_in_the_same_bytes_and_ignores_micro_batches(
    train_recipe: Recipe, stop_after: Callable[[int], None]
) -> None:
    whole, parts = train_recipe(output="whole"), train_recipe(output="parts")
    assert run(whole, *DYLORA).is_finished
    stop_after(2)
    assert not run(parts, *DYLORA).is_finished
    stop_after(0)
    assert run(parts, *DYLORA, "data.micro_batch_size=2").is_finished
    assert_same_end(whole.parent / "whole", parts.parent / "parts")
    single = trained(train_recipe(output="single"), *DYLORA, "data.micro_batch_size=1")
    ends = load_file(next((whole.parent / "whole").glob("checkpoints/12/trained.safetensors")))
    assert 0 < distance(ends, single) < 1e-4  # Adam magnifies rounding, on some CPUs to 3e-5


def test_only_the_block_of_the_step_moves(train_recipe: Recipe) -> None:
    training = fresh(train_recipe(), *DYLORA)
    layer = next(iter(training.setup.adapter.layers.values()))
    up = layer.adapter["up"]
    moved, gradients = [], []
    up.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.clone()))
    for _, parts in zip(range(4), steps(training), strict=False):
        before = up.detach().clone()
        take_step(training, parts)
        columns = gradients[-1].abs().sum(0).nonzero().flatten() // 2
        assert set(columns.tolist()) == {layer.block}
        assert not torch.equal(up, before)
        moved.append(layer.block)
    assert len(set(moved)) > 1


@pytest.mark.slow
def test_a_run_is_evaluated_drawn_validated_and_exported(
    train_recipe: Recipe,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    recipe = load_train_recipe(
        train_recipe(),
        [
            *(
                FEW,
                "adapter.type=oft",
                "adapter.block_size=4",
                "train.samples=8",
                "weighting.type=none",
            ),
            *("validation.images=2", "validation.train_probe_images=0"),
            *("validation.timesteps_per_image=2", "validation.every_samples=100"),
            *('sampling.prompts=["a cat"]', "sampling.num_inference_steps=2"),
        ],
    )
    from sdtrain.trainer import train

    outcome = train(recipe)
    folder = tmp_path / "run"
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "bins" in line]
    assert lines[0]["mean"] != lines[-1]["mean"]
    assert (folder / "samples" / "8" / "all.png").is_file()
    found = validate_checkpoints(recipe, [Path(str(outcome.checkpoint))], tmp_path / "to")
    means = [row["mean"] for row in found["evaluations"]]
    assert means == pytest.approx([lines[0]["mean"], lines[-1]["mean"]], rel=1e-6)

    export(folder, "single-file", tmp_path / "merged.safetensors")
    export(folder, "lora-kohya", tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match="no spelling for what adapter oft"):
        export(folder, "lora-diffusers", tmp_path / "alone")
    model = tiny_model("sd15")
    merged = config_for("family", "sd15")(config=str(model)).build(
        str(tmp_path / "merged.safetensors")
    )
    base, reread = load_tiny(model), load_tiny(model)
    assert merge_kohya(reread, load_file(str(tmp_path / "alone.safetensors"))) == 0
    torch.testing.assert_close(predict(reread), predict(merged), rtol=1e-5, atol=1e-5)
    assert (predict(merged) - predict(base)).abs().max() > 1e-5
