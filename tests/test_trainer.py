"""The loop: one whole step against plain torch, and what may not change the result."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdtrain import checkpoint
from sdtrain.debias import LossFit
from sdtrain.family import Family
from sdtrain.noise import noise_for
from sdtrain.planned import num_due
from sdtrain.recipe import load_train_recipe
from sdtrain.run import Run
from sdtrain.run_folder import RunFolder
from sdtrain.setup import Setup, open_setup, pick_device
from sdtrain.step import denoising_loss
from sdtrain.trackers.jsonl import read_metrics
from sdtrain.trainer import is_due, steps, train
from sdtrain.update import DivergedError, take_step
from tests.tiny import as_trained

torch.set_num_threads(1)

Recipe = Callable[..., Path]


def trained(path: Path, *overrides: str) -> dict[str, Tensor]:
    """Train a recipe to its end; the trained tensors of its last checkpoint."""
    outcome = train(load_train_recipe(path, overrides))
    assert outcome.is_finished
    assert outcome.checkpoint is not None
    return checkpoint.read_trained(Path(outcome.checkpoint))


def fresh(path: Path, *overrides: str) -> Run:
    recipe = load_train_recipe(path, overrides)
    return Run(open_setup(recipe), RunFolder(recipe.output))


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative difference of all parameters together."""
    assert a.keys() == b.keys()
    apart = sum(float((a[key] - b[key]).double().square().sum()) for key in a)
    return math.sqrt(apart / sum(float(a[key].double().square().sum()) for key in a))


def plain_step(setup: Setup, num_steps: int) -> None:
    """The same training in twenty lines of plain torch: no micro-batches, no plan, no clock."""
    parameters = [p for p in setup.family.parts["unet"].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    noise: Any = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - noise, 0)
    seen = 0
    for step in list(setup.order.steps(0, 22, 4))[:num_steps]:
        parts = [part for part in setup.micro_batches(seen) if part.step.samples_seen == seen]
        total = torch.zeros(())
        for part in parts:
            for slot, u in zip(part.slots, part.u, strict=True):
                batch = setup.reader().batch([slot], [u])
                with torch.no_grad():
                    latents, text = as_trained(setup.family, batch)
                t = int(1000 * u)
                alpha = alphas[t].float()
                noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * batch.noise
                output = setup.family.predict(noisy, batch.u, text, batch.micro)
                snr = float(alphas[t] / (1 - alphas[t]))
                total = total + min(1.0, 5.0 / snr) * (output - batch.noise).square().mean()
        (total / len(step.slots)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        factor = (seen + 1) / 5 if seen < 4 else (1 + math.cos(math.pi * (seen - 4) / 18)) / 2
        optimizer.param_groups[0]["lr"] = 1e-3 * factor
        optimizer.step()
        optimizer.zero_grad()
        seen += len(step.slots)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_steps_equal_plain_torch(train_recipe: Recipe, family: str) -> None:
    run = fresh(train_recipe(family))
    before = {path: p.detach().clone() for path, p in run.trained.items()}
    for _, parts in zip(range(2), steps(run), strict=False):
        take_step(run, parts)
    other = open_setup(load_train_recipe(train_recipe(family)))
    plain_step(other, 2)
    ours = {path: p.detach() for path, p in run.trained.items()}
    theirs = {path: p.detach() for path, p in other.plan.trained().items()}
    moved = distance(ours, before)
    assert moved > 1e-4
    assert distance(ours, theirs) < 0.001 * moved


def test_micro_batch_and_workers_do_not_change_the_result(train_recipe: Recipe) -> None:
    whole = trained(train_recipe(output="a"), "data.micro_batch_size=4")
    single = trained(train_recipe(output="b"), "data.micro_batch_size=1")
    assert 0 < distance(whole, single) < 1e-5
    loaded_ahead = trained(train_recipe(output="c"), "data.micro_batch_size=4", "data.workers=2")
    assert all(torch.equal(whole[path], loaded_ahead[path]) for path in whole)


def test_a_run_folder_holds_what_was_promised(train_recipe: Recipe) -> None:
    path = train_recipe()
    trained(path)
    folder = RunFolder(path.parent / "run")
    assert load_train_recipe(folder.recipe) == load_train_recipe(path)
    facts = json.loads(folder.environment.read_text(encoding="utf-8"))
    assert facts["versions"]["torch"]
    assert facts["total_samples"] == 22
    assert (folder.model / "model_index.json").is_file()
    assert list(folder.tensorboard.glob("events*"))
    assert [c.name for c in checkpoint.checkpoints(folder.checkpoints)] == ["8", "16", "22"]
    lines = read_metrics(folder.metrics)
    assert [line["samples_seen"] for line in lines] == [4, 8, 12, 16, 20, 22]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert list(line) == [
            *("kind", "samples_seen", "step", "loss", "loss_debiased", "grad_norm", "lr")
        ]
        assert line["kind"] == "train"
        assert list(line["lr"]) == ["unet.**"]
    assert lines[0]["lr"]["unet.**"] == pytest.approx(1e-3 / 5)


RULES = (
    'train.rules=[{ match = "unet.**", lr = 1e-3 }, { match = "unet.mid_block.**", freeze = true },'
    ' { match = "text_encoder.**", lr = 1e-4 }]'
)


@pytest.mark.parametrize(
    "overrides", [(RULES,), ("adapter.type=lora", "adapter.rank=4")], ids=["rules", "lora"]
)
def test_frozen_tensors_stay_and_trained_ones_move(
    train_recipe: Recipe, overrides: Sequence[str]
) -> None:
    decay = ("optimizer.type=adamw", "optimizer.weight_decay=0.5")
    run = fresh(train_recipe(), *overrides, *decay)
    every = dict(run.setup.family.named_parameters())
    before = {path: p.detach().clone() for path, p in every.items()}
    start = {path: p.detach().clone() for path, p in run.trained.items()}
    for _, parts in zip(range(3), steps(run), strict=False):
        take_step(run, parts)
    run.check_what_moved()
    owned = {id(p) for p in run.optimizer.state}
    assert owned == {id(p) for p in run.trained.values()}
    for path, parameter in every.items():
        if path in run.trained:
            continue
        assert torch.equal(parameter, before[path]), path
        assert parameter.grad is None
        assert id(parameter) not in owned
    assert sum(not torch.equal(p, start[path]) for path, p in run.trained.items()) > 10
    with torch.no_grad():
        next(iter(run.setup.plan.frozen.values())).add_(1e-3)
    with pytest.raises(AssertionError, match="frozen tensors changed"):
        run.check_what_moved()


def test_text_encoders_train_only_when_a_rule_says_so(train_recipe: Recipe) -> None:
    run = fresh(train_recipe(), RULES)
    for _, parts in zip(range(2), steps(run), strict=False):
        take_step(run, parts)
    layer = "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight"
    assert run.setup.start_hashes[layer] != run.part_hashes()["text_encoder"]
    assert layer in run.trained
    assert run.part_hashes()["text_encoder"] != run.trained_start["text_encoder"]


def test_a_loss_that_is_no_number_stops_and_names_the_images(train_recipe: Recipe) -> None:
    run = fresh(train_recipe())
    with torch.no_grad():
        run.trained["unet.conv_in.weight"][0, 0, 0, 0] = float("nan")
    step = next(run.setup.order.steps(0, 22, 4))
    with pytest.raises(DivergedError) as caught:
        take_step(run, next(steps(run)))
    for slot in step.slots:
        assert slot.sample_id in caught.value.message
    assert run.step == 0


def test_a_gradient_that_is_no_number_stops_before_the_update(train_recipe: Recipe) -> None:
    run = fresh(train_recipe())
    bias = run.trained["unet.conv_out.bias"]
    bias.register_hook(lambda gradient: gradient * float("inf"))
    before = bias.detach().clone()
    with pytest.raises(DivergedError, match="gradient is no number"):
        take_step(run, next(steps(run)))
    assert torch.equal(bias, before)


@pytest.mark.parametrize("mixed", ["bf16", "fp16"])
def test_mixed_precision_trains_float32_parameters(train_recipe: Recipe, mixed: str) -> None:
    run = fresh(train_recipe(), f"precision.mixed={mixed}")
    start = run.part_hashes()
    losses = [take_step(run, parts)["loss"] for _, parts in zip(range(2), steps(run), strict=False)]
    assert all(math.isfinite(loss) for loss in losses)
    assert {p.dtype for p in run.trained.values()} == {torch.float32}
    assert run.part_hashes() != start
    assert run.scaler.is_enabled() == (mixed == "fp16")


def test_a_step_that_float16_cannot_hold_is_left_out(train_recipe: Recipe) -> None:
    """The clock goes on; weights, optimizer and effort wait, and the scale is halved."""
    run = fresh(train_recipe(), "precision.mixed=fp16", "ema.half_life_samples=4")
    start, parts = run.part_hashes(), steps(run)
    bias = run.trained["unet.conv_out.bias"]
    handle = bias.register_hook(lambda gradient: gradient * float("inf"))
    assert not math.isfinite(take_step(run, next(parts))["grad_norm"])
    assert (run.samples_seen, run.skipped_in_a_row) == (4, 1)
    assert run.part_hashes() == start
    assert not run.optimizer.state
    assert sum(run.effort.values()) == 0
    assert run.scaler.get_scale() == 2.0**15
    assert all(torch.equal(run.trained[path], run.ema.values[path]) for path in run.trained)
    handle.remove()
    take_step(run, next(parts))
    assert (run.samples_seen, run.skipped_in_a_row) == (8, 0)
    assert run.part_hashes() != start
    assert float(run.optimizer.state[bias]["step"]) == 1
    assert sum(run.effort.values()) == pytest.approx(2 * run.schedule(4) * 1e-3)


@pytest.mark.slow
def test_looking_never_changes_what_is_trained(train_recipe: Recipe) -> None:
    """Previews, of several seeds too, evaluations and saves: on, off, and at any cadence."""
    looks = (
        ("sampling.every_samples=4", "sampling.seeds=2", "validation.images=0"),
        ("sampling.every_samples=12", "validation.images=2", "validation.every_samples=4"),
        ("sampling.prompts=[]", "validation.images=3", "checkpoint.every_samples=100"),
    )
    common = ("train.samples=16", "sampling.num_inference_steps=1", "ema.half_life_samples=8")
    plain = trained(train_recipe(output="plain"), *common, "sampling.prompts=[]")
    for number, look in enumerate(looks):
        prompts = 'sampling.prompts=["a cat", ""]'
        path = train_recipe(output=f"look-{number}")
        found = trained(path, *common, prompts, "validation.timesteps_per_image=1", *look)
        assert all(torch.equal(found[key], plain[key]) for key in plain)
        drawn = path.parent / f"look-{number}" / "samples"
        assert drawn.exists() == (number < 2)


def test_a_part_that_does_not_move_is_said_aloud(train_recipe: Recipe) -> None:
    from sdprep.errors import UserError

    path = train_recipe()
    with pytest.raises(UserError, match="nothing in unet has changed"):
        train(load_train_recipe(path, ['train.rules=[{ match = "unet.**", lr = 1e-60 }]']))


def test_cadences_are_due_at_both_ends_and_once_per_multiple(train_recipe: Recipe) -> None:
    run = fresh(train_recipe())
    due, before = [], 0
    for now in (0, 4, 8, 12, 16, 20, 22):
        run.samples_seen = now
        if is_due(run, 10, before):
            due.append(now)
        before = now
    assert due == [0, 12, 20, 22]


@pytest.mark.parametrize("every", [1, 3, 4, 5, 8, 10, 11, 21, 22, 30])
@pytest.mark.parametrize("total", [2, 20, 22])
def test_looks_are_promised_as_they_come(every: int, total: int) -> None:
    """Two multiples in one step are one look, and one in the last step is the look at the end."""
    clocks = [0, *range(4, total, 4), total]
    run = SimpleNamespace(samples_seen=0, setup=SimpleNamespace(total_samples=total))
    done, before = 0, 0
    for now in clocks:
        run.samples_seen = now
        done += is_due(run, every, before)  # type: ignore[arg-type]
        assert num_due(every, 4, total, now) == done
        before = now


def test_a_validated_run_trains_the_same_and_logs_both_sets(train_recipe: Recipe) -> None:
    plain = trained(train_recipe(output="plain"), "train.samples=10")
    wanted = (
        *("validation.images=2", "validation.train_probe_images=1", "validation.every_samples=7"),
        *("validation.timesteps_per_image=2", "train.samples=10"),
    )
    path = train_recipe(output="judged")
    judged = trained(path, *wanted)
    assert all(torch.equal(plain[name], judged[name]) for name in plain)
    lines = [
        line
        for line in read_metrics(path.parent / "judged" / "metrics.jsonl")
        if line["kind"] == "validation"
    ]
    assert [(line["samples_seen"], line["set"]) for line in lines] == [
        (seen, name) for seen in (0, 8, 10) for name in ("validation", "train_probe")
    ]


def test_the_debiased_curve_settles_at_one_whatever_is_drawn() -> None:
    fit = LossFit()
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(200):
        s = (torch.rand(4, generator=generator) * 12 - 6).double()
        losses = torch.exp(-1.5 + 0.4 * s - 0.03 * s * s)
        ratios.append(fit.debiased(losses.tolist(), s.tolist()))
    assert ratios[-1] == pytest.approx(1.0, abs=0.02)
    again = LossFit()
    again.restore(json.loads(json.dumps(fit.state())))
    assert again.debiased([0.1], [1.0]) == fit.debiased([0.1], [1.0])
    assert LossFit().debiased([0.1], [math.inf]) is None


def test_an_unusable_device_is_refused() -> None:
    from sdprep.errors import UserError

    with pytest.raises(UserError, match="gpu9"):
        pick_device("gpu9")
    assert pick_device("cpu").type == "cpu"


def test_every_loss_goes_through_the_one_forward(train_recipe: Recipe) -> None:
    run = fresh(train_recipe())
    family: Family = run.setup.family
    micro, batch = next(next(steps(run)))
    loss = denoising_loss(family, batch, run.loss)
    assert tuple(loss.shape) == (len(micro.positions),)
    assert loss.dtype == torch.float32


def test_a_sample_gets_other_noise_and_text_at_its_next_visit(train_recipe: Recipe) -> None:
    setup = open_setup(load_train_recipe(train_recipe(), ["prompt.dropout_p=0.0"]))
    slots = [slot for _, slot in zip(range(28), setup.order.slots(), strict=False)]
    first = slots[0]
    second = next(slot for slot in slots[14:] if slot.sample_id == first.sample_id)
    assert (first.visit, second.visit) == (0, 1)
    for slot in (first, second):
        noise = setup.reader().batch([slot], [0.5]).noise[0]
        assert noise.equal(noise_for(7, "noise", slot.sample_id, slot.visit, noise.shape))
    assert first.text.prompt != second.text.prompt  # its score tags are drawn anew
