"""Only the model may move the number: not batches, workers, order, process or resuming."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sdprep.errors import DataError
from sdtrain import checkpoint
from sdtrain.lattice import FLAT
from sdtrain.noise import noise_for
from sdtrain.pixels import evaluation_view
from sdtrain.probe import LossMatrix, Probe
from sdtrain.probe_sets import find_probes, open_probes, plain_probe
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import Setup, open_setup
from sdtrain.stable_eval import ProbeSet, evaluation_mode, verdict
from sdtrain.trackers.jsonl import read_metrics
from sdtrain.trainer import train
from tests.evaluated import WITH_EVALUATION
from tests.train_data import prepared_row, write_prepared

torch.set_num_threads(1)

Recipe = Callable[..., Path]


def opened(path: Path, *overrides: str) -> Setup:
    return open_setup(load_train_recipe(path, (*WITH_EVALUATION, *overrides)))


def numbers(run: Path) -> list[tuple[int, str, float]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [(x["samples_seen"], x["set"], x["mean"]) for x in lines if x["kind"] == "validation"]


def plain(setup: Setup, name: str, images: int, levels: int | None = None) -> Probe:
    """The probe of one set before its pilot."""
    is_held_out = name == "validation"
    rows = setup.data.validation if is_held_out else setup.data.train
    assignment = setup.validation if is_held_out else setup.train
    assert rows is not None
    assert assignment is not None
    policy = setup.data.policy
    return plain_probe(
        *(name, setup.family, rows, assignment, policy),
        seed=1,
        num_images=images,
        num_levels=levels,
    )


def probe_folder(run: Path, name: str) -> Path:
    return next(p for p in (run / "validation").iterdir() if Probe.load(p).name == name)


@pytest.fixture(scope="module")
def finished(evaluated_run: Path) -> Path:
    """Three evaluations with micro-batch 2, in this process."""
    return evaluated_run


@pytest.fixture(scope="module")
def base(finished: Path) -> Setup:
    """The same recipe opened once more, at the base model; never train it."""
    return open_setup(load_train_recipe(finished / "recipe.toml"))


def test_the_number_ignores_the_micro_batch(finished: Path, base: Setup) -> None:
    expected = {name: mean for clock, name, mean in numbers(finished) if clock == 0}
    probes = find_probes(base, finished / "validation")
    assert {each.probe.name for each in probes} == {"validation", "train_probe"} == set(expected)
    for probe_set in probes:
        for size in (1, 2, 5):
            probe_set.micro_batch = size
            found = probe_set.evaluate().mean
            assert found == pytest.approx(expected[probe_set.probe.name], rel=1e-6)


def test_the_pilot_finds_the_same_probe_in_another_process(
    finished: Path, base: Setup, tmp_path: Path
) -> None:
    found = {each.probe.probe_id for each in open_probes(base, tmp_path)}
    assert found == {folder.name for folder in (finished / "validation").iterdir()}


@pytest.mark.slow
def test_a_run_reads_the_same_with_workers_hash_seed_and_micro_batch(
    finished: Path, train_recipe: Recipe
) -> None:
    path = train_recipe()
    changed = ("data.workers=2", "data.micro_batch_size=4")
    settings = [f"--set={setting}" for setting in (*WITH_EVALUATION, *changed)]
    subprocess.run(
        [sys.executable, "-m", "sdtrain.cli", "run", str(path), *settings],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"},
    )
    found, expected = numbers(path.with_suffix("")), numbers(finished)
    assert [x[:2] for x in found] == [x[:2] for x in expected]
    assert [x[2] for x in found] == pytest.approx([x[2] for x in expected], rel=1e-6)


def test_row_order_and_added_training_rows_leave_the_validation_number_alone(
    finished: Path, train_recipe: Recipe, tmp_path: Path
) -> None:
    rows = [prepared_row(number) for number in range(21)]
    other = write_prepared(tmp_path / "other", rows[18:] + rows[13::-1], rows[17:13:-1])
    assert pq.read_table(other / "data" / "train-00000.parquet").num_rows == 17
    setup = opened(train_recipe(data=other), "validation.train_probe_images=0")
    (found,) = find_probes(setup, finished / "validation")
    expected = {name: mean for clock, name, mean in numbers(finished) if clock == 0}
    assert (finished / "validation" / found.probe.probe_id).is_dir()
    assert found.evaluate().mean == pytest.approx(expected["validation"], rel=1e-6)


def test_the_number_is_twenty_lines_of_plain_torch(train_recipe: Recipe, tmp_path: Path) -> None:
    setup = opened(train_recipe("sdxl"), "validation.train_probe_images=0")
    (probe_set,) = open_probes(setup, tmp_path)
    probe, family = probe_set.probe, setup.family
    u, density = probe.u(), probe.density()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    total = 0.0
    for i, image in enumerate(probe.images):
        picture = probe_set.rows.image(probe_set.rows.ids.index(image.id))
        height, width = image.bucket_hw
        bucket = next(b for b in setup.validation.buckets if b.size_hw == (height, width))
        pixels, micro = evaluation_view(picture, bucket)
        latents = family.encode_images(pixels[None])
        for j in range(probe.num_levels):
            noise = noise_for(probe.seed, "noise", image.id, j, latents.shape[1:])[None]
            alpha = alphas[int(1000 * u[i, j])].float()
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
            with torch.no_grad():
                text = family.encode_prompts([image.prompt])
                output = family.predict(noisy, torch.tensor([u[i, j]]), text, [micro])
            total += float((output - noise).square().mean()) / density[i, j]
    plain = total / (len(probe.images) * probe.num_levels)
    assert probe_set.evaluate().mean == pytest.approx(plain, rel=1e-6)


def test_training_with_evaluation_equals_training_without(
    finished: Path, train_recipe: Recipe
) -> None:
    path = train_recipe()
    off = ("validation.images=0", "validation.train_probe_images=0")
    outcome = train(load_train_recipe(path, (*WITH_EVALUATION, *off)))
    assert outcome.checkpoint is not None
    without = checkpoint.read_trained(Path(outcome.checkpoint))
    with_it = checkpoint.read_trained(finished / "checkpoints" / "12")
    assert without.keys() == with_it.keys()
    assert all(torch.equal(without[key], with_it[key]) for key in without)


def test_a_resumed_run_uses_its_probe_and_reads_the_same(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "12")
    shutil.rmtree(run / "model")
    probes = {p.name: (p / "probe.json").read_bytes() for p in (run / "validation").iterdir()}
    for matrix in (run / "validation").glob("*/12.npz"):
        matrix.unlink()
    train(load_train_recipe(run / "recipe.toml", (f"output={json.dumps(str(run))}",)))
    assert numbers(run) == numbers(finished)
    found = {p.name: (p / "probe.json").read_bytes() for p in (run / "validation").iterdir()}
    assert found == probes
    for file in sorted((finished / "validation").glob("*/*.npz")):
        again = LossMatrix.load(run / "validation" / file.parent.name / file.name)
        assert np.array_equal(again.loss, LossMatrix.load(file).loss)


def test_stored_matrix_equals_recomputation(finished: Path, train_recipe: Recipe) -> None:
    from sdtrain.run import load_trained

    setup = opened(train_recipe())
    load_trained(setup.plan, checkpoint.read_trained(finished / "checkpoints" / "12"))
    for probe_set in find_probes(setup, finished / "validation"):
        place = finished / "validation" / probe_set.probe.probe_id
        stored = LossMatrix.load(place / "12.npz")
        assert np.array_equal(probe_set.evaluate().loss, stored.loss)
        line = next(
            line
            for line in read_metrics(finished / "metrics.jsonl")
            if line["samples_seen"] == 12 and line.get("set") == probe_set.probe.name
        )
        assert line["mean"] == stored.mean
        start = LossMatrix.load(place / "0.npz")
        assert line["change_percent"] == pytest.approx(100 * (stored.mean / start.mean - 1))
        with np.load(place / "12.npz") as file:
            assert file["ids"].tolist() == [image.id for image in probe_set.probe.images]


def test_modes_gradients_and_the_ambient_generator_are_left_alone(
    finished: Path, base: Setup
) -> None:
    probe_set = find_probes(base, finished / "validation")[0]
    parts = base.family.parts
    parts["unet"].train()
    parts["unet"].mid_block.eval()
    modes = {id(m): m.training for part in parts.values() for m in part.modules()}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    probe_set.evaluate()
    assert torch.equal(torch.get_rng_state(), before)
    assert {id(m): m.training for part in parts.values() for m in part.modules()} == modes
    assert all(p.grad is None for p in parts["unet"].parameters())
    with contextlib.suppress(ZeroDivisionError), evaluation_mode(base.family):
        assert not parts["unet"].training
        raise ZeroDivisionError
    assert {id(m): m.training for part in parts.values() for m in part.modules()} == modes


# --- which images, which prompts -----------------------------------------------------------------


def test_one_image_of_each_group_and_no_image_of_train(
    train_recipe: Recipe, tmp_path: Path
) -> None:
    rows = [prepared_row(n, group_id=f"group{n // 3}") for n in range(18)]
    data = write_prepared(tmp_path / "data", rows[:9], rows[9:])
    setup = opened(train_recipe(data=data))
    chosen = plain(setup, "validation", 64).images
    held_out = setup.data.validation
    assert held_out is not None
    records = held_out.records([held_out.ids.index(image.id) for image in chosen])
    assert sorted(record["group_id"] for record in records) == ["group3", "group4", "group5"]
    assert not {image.id for image in chosen} & set(setup.data.train.ids)
    seen = {image.id for image in plain(setup, "train_probe", 64).images}
    assert len(seen) == 3
    assert seen <= set(setup.data.train.ids)


def test_prompts_are_rendered_once_and_never_dropped(
    base: Setup, train_recipe: Recipe, tmp_path: Path
) -> None:
    setup = opened(train_recipe(), "prompt.dropout_p=1.0")
    probe = plain(setup, "validation", 3)
    assert setup.data.policy.dropout_p == 1
    assert all("photo number" in image.prompt for image in probe.images)
    assert probe.images == plain(base, "validation", 3).images
    assert Probe.load(probe.save(tmp_path)) == probe


def test_fewer_than_sixteen_images_get_sixteen_levels(base: Setup) -> None:
    assert plain(base, "validation", 64).shape == (4, 16)
    assert plain(base, "train_probe", 3, 5).shape == (3, 5)


def test_a_probe_of_another_model_or_an_edited_one_is_refused(
    finished: Path, train_recipe: Recipe, tmp_path: Path
) -> None:
    place = probe_folder(finished, "validation")
    named = (f"validation.probe={json.dumps(str(place))}", "validation.train_probe_images=0")
    (shared,) = open_probes(opened(train_recipe(), *named, "seed=99"), tmp_path / "a")
    assert shared.probe.probe_id == place.name
    with pytest.raises(DataError, match="made with family sd15, this run has sdxl"):
        open_probes(opened(train_recipe("sdxl"), *named), tmp_path / "b")
    with pytest.raises(DataError, match="made with precision no, this run has bf16"):
        open_probes(opened(train_recipe(), *named, "precision.mixed=bf16"), tmp_path / "b")
    edited = tmp_path / place.name
    edited.mkdir()
    text = (place / "probe.json").read_text(encoding="utf-8")
    (edited / "probe.json").write_text(text.replace("photo number", "picture"), encoding="utf-8")
    with pytest.raises(DataError, match="was edited"):
        Probe.load(edited)
    (edited / "probe.json").write_text('{"version": 1}', encoding="utf-8")
    with pytest.raises(DataError, match="is no probe"):
        Probe.load(edited)


def test_a_run_that_goes_on_without_its_probe_says_what_is_missing(
    finished: Path, base: Setup, tmp_path: Path
) -> None:
    lines = [x for x in read_metrics(finished / "metrics.jsonl") if x["kind"] == "validation"]
    with pytest.raises(DataError, match="is gone"):
        open_probes(base, tmp_path, 8, lines)
    with pytest.raises(DataError, match="not evaluated on the set validation from its start"):
        open_probes(base, finished / "validation", 8, [])


def test_an_accepted_change_of_the_data_keeps_the_probe(
    finished: Path, train_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [x for x in read_metrics(finished / "metrics.jsonl") if x["kind"] == "validation"]
    setup = opened(train_recipe(), "validation.images=2")
    found = open_probes(setup, finished / "validation", 8, lines)
    assert {p.probe.probe_id for p in found} == {line["probe_id"] for line in lines}
    assert "stays as it was at sample 0" in capsys.readouterr().err


def test_a_loss_that_is_no_number_names_the_image(finished: Path, train_recipe: Recipe) -> None:
    setup = opened(train_recipe())
    probe_set = find_probes(setup, finished / "validation")[0]
    with torch.no_grad():
        setup.family.parts["unet"].conv_out.bias.fill_(float("nan"))
    with pytest.raises(DataError, match=probe_set.probe.images[0].id):
        probe_set.evaluate()


# --- the small arithmetic ------------------------------------------------------------------------


def test_bins_hold_the_mean_loss_of_their_levels() -> None:
    u = np.array([[0.05, 0.15], [0.02, 0.95]])
    density = np.array([[2.0, 1.0], [1.0, 0.5]])
    loss = np.array([[4.0, 3.0], [1.0, 5.0]], np.float32)
    bins = LossMatrix(loss, u, density).bins()
    assert bins[0] == pytest.approx((4 / 2 + 1) / (1 / 2 + 1))
    assert bins[1] == 3
    assert bins[9] == 5
    assert bins[2:9] == [None] * 7


@pytest.mark.parametrize(
    ("held_out", "seen", "word"),
    [
        ((-2, -1), (-2, -1), "learning"),
        ((-2, -1), (1, 2), "learning"),
        ((1, 2), (-2, -1), "memorising"),
        ((1, 2), (1, 2), "diverging"),
        ((-1, 1), (-2, -1), "flat"),
        (None, (-2, -1), "cannot tell: no interval"),
    ],
)
def test_the_verdict(held_out: Any, seen: Any, word: str) -> None:
    lines = [
        {"set": "validation", "ci95_percent": held_out},
        {"set": "train_probe", "ci95_percent": seen},
    ]
    assert verdict(lines) == word
    assert "cannot tell" in verdict(lines[1:])


def test_a_damaged_matrix_is_refused_by_name(tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04 torn", b"text"):
        (tmp_path / "3.npz").write_bytes(content)
        with pytest.raises(DataError, match="3.npz is no loss matrix"):
            LossMatrix.load(tmp_path / "3.npz")


def test_the_pilot_is_part_of_the_probe(finished: Path) -> None:
    probe = Probe.load(probe_folder(finished, "validation"))
    assert probe.warp != FLAT
    assert replace(probe, warp=FLAT).probe_id != probe.probe_id


def test_a_probe_whose_images_are_gone_is_refused(finished: Path, base: Setup) -> None:
    probe = Probe.load(probe_folder(finished, "validation"))
    with pytest.raises(DataError, match="which the data set lacks"):
        ProbeSet(base.family, base.data.train, probe, 2, base.device)
