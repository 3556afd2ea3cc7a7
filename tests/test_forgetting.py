"""The set `forgetting` is made once, disturbs no other set, and is told apart by prompt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sdprep.errors import DataError, RecipeError
from sdtrain.check import describe
from sdtrain.checkpoint import checkpoints
from sdtrain.forgetting import DRAWN
from sdtrain.picture_rows import FolderRows, is_picture_folder, read_folder
from sdtrain.probe_sets import find_probes, open_probes
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import Setup, open_setup
from sdtrain.trackers.jsonl import read_metrics
from sdtrain.trainer import train
from tests.evaluated import WITH_EVALUATION
from tests.train_data import small_jpeg

Recipe = Callable[..., Path]
DRAWING = (
    'validation.forgetting.prompts=["a car", "a dog"]',
    *("validation.forgetting.images=4", "validation.forgetting.num_inference_steps=2"),
)


def opened(path: Path, *settings: str) -> Setup:
    return open_setup(load_train_recipe(path, (*WITH_EVALUATION, *settings)))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Three photos with texts, one of them in a subfolder, a broken one and one from train."""
    folder = tmp_path / "outside images"
    (folder / "autos").mkdir(parents=True)
    for number, name in ((40, "a.jpg"), (41, "b.jpg"), (42, "autos/c.jpg")):
        (folder / name).write_bytes(small_jpeg(number, (96, 96)))
    (folder / "a.txt").write_text("a râtelier, <b>", encoding="utf-8")
    (folder / "autos" / "c.caption").write_text("a car\n", encoding="utf-8")
    (folder / "again.jpg").write_bytes(small_jpeg(0, (96, 96)))
    return folder


def test_a_folder_of_photos_is_a_set(
    train_recipe: Recipe, outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = opened(train_recipe())
    before = {p.probe.name: p.probe for p in open_probes(plain, tmp_path / "plain")}
    named = f"validation.forgetting.path={json.dumps(str(outside))}"
    sets = {p.probe.name: p for p in open_probes(opened(train_recipe(), named), tmp_path / "with")}
    assert set(sets) == {"validation", "train_probe", "forgetting"}
    for name, probe in before.items():
        assert sets[name].probe == probe, "another set moved"
    probe = sets["forgetting"].probe
    assert sorted(image.prompt for image in probe.images) == ["", "a car", "a râtelier, <b>"]
    assert {label.source for label in probe.labels} == {None, "autos"}
    assert not {image.id for image in probe.images} & set(plain.data.train.ids)
    assert np.isfinite(sets["forgetting"].evaluate().loss).all()
    told = " ".join(capsys.readouterr().err.split())
    assert "1 images" in told
    assert "are also in the data set and are left out" in told
    assert "have no text beside them: empty prompt" in told


def test_check_opens_what_evaluations_will_look_at(
    train_recipe: Recipe, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = f"validation.forgetting.path={json.dumps(str(outside))}"
    found = describe(opened(train_recipe(), named))["evaluation"]
    assert (
        found["images"]["forgetting"] == 3
    )  # neither the 32 that are asked for, nor that of train
    assert "are not usable (in_data_set 1)" in " ".join(capsys.readouterr().err.split())
    assert describe(opened(train_recipe(), *DRAWING))["evaluation"]["images"]["forgetting"] == 4
    gone = f"validation.forgetting.path={json.dumps(str(outside / 'nowhere'))}"
    with pytest.raises(DataError, match=r"^validation\.forgetting\.path = "):
        describe(opened(train_recipe(), gone))


def test_a_folder_without_usable_images_is_refused(
    train_recipe: Recipe, outside: Path, tmp_path: Path
) -> None:
    for file in outside.rglob("*.jpg"):
        file.write_bytes(b"broken" + file.name.encode())
    named = f"validation.forgetting.path={json.dumps(str(outside))}"
    with pytest.raises(DataError, match="has no usable image"):
        open_probes(opened(train_recipe(), named), tmp_path)
    missing = f"validation.forgetting.path={json.dumps(str(tmp_path / 'nowhere'))}"
    with pytest.raises(DataError, match="nowhere"):
        open_probes(opened(train_recipe(), missing), tmp_path)


def test_a_data_set_serves_as_well(
    train_recipe: Recipe, prepared_folder: Path, tmp_path: Path
) -> None:
    from tests.train_data import prepared_row, write_prepared

    other = write_prepared(tmp_path / "other", [prepared_row(n) for n in range(30, 34)])
    named = f"validation.forgetting.path={json.dumps(str(other))}"
    (found,) = (
        p for p in open_probes(opened(train_recipe(), named), tmp_path) if p.probe.name[0] == "f"
    )
    assert found.probe.shape == (4, 3)
    assert all("photo number 3" in image.prompt for image in found.probe.images)


@pytest.mark.slow
def test_drawn_images_are_drawn_once_and_kept(train_recipe: Recipe, tmp_path: Path) -> None:
    recipe = load_train_recipe(train_recipe(), (*WITH_EVALUATION, *DRAWING))
    train(recipe)
    run = recipe.output
    (listing,) = (run / "validation" / DRAWN).glob("*/images.json")
    entries = json.loads(listing.read_text(encoding="utf-8"))
    assert [entry["prompt"] for entry in entries] == ["a car", "a dog"] * 2
    pictures = [(listing.parent / entry["file"]).read_bytes() for entry in entries]
    assert len(set(pictures)) == 4
    lines = [x for x in read_metrics(run / "metrics.jsonl") if x["kind"] == "validation"]
    assert [x["set"] for x in lines if x["samples_seen"] == 12][-1] == "forgetting"
    setup = open_setup(recipe)
    here = {p.probe.probe_id for p in find_probes(setup, run / "validation")}
    # Drawn afresh by the same base model: the same pictures, so the same probe; nothing written.
    assert {p.probe.probe_id for p in find_probes(setup, tmp_path / "nothing")} == here
    assert not (tmp_path / "nothing").exists()
    verdict = read_metrics(run / "metrics.jsonl")[-1]
    assert verdict["kind"] == "verdict"
    assert verdict["forgets"] in (True, False)

    last = checkpoints(run / "checkpoints")[-1]
    shutil.rmtree(last)
    shutil.rmtree(listing.parent)
    with pytest.raises(DataError, match="drawn by the model at sample 0"):
        train(recipe)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("validation.forgetting.images=3",), "needs either path or prompts"),
        ((*DRAWING, 'validation.forgetting.path="x"'), "needs either path or prompts"),
        (
            ('validation.forgetting.path="x"', "validation.forgetting.guidance_scale=2.0"),
            "guidance_scale has no effect with path",
        ),
        ((*DRAWING, 'validation.forgetting.revision="x"'), "revision has no effect with prompts"),
    ],
)
def test_options_without_effect_are_refused(
    train_recipe: Recipe, settings: tuple[str, ...], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        load_train_recipe(train_recipe(), settings)


def test_what_counts_as_a_folder_of_pictures(outside: Path, tmp_path: Path) -> None:
    assert is_picture_folder(outside)
    assert not is_picture_folder(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert not is_picture_folder(tmp_path / "empty")
    (outside / "copy.jpg").write_bytes((outside / "a.jpg").read_bytes())
    rows = read_folder(outside)
    assert len(set(rows.ids)) == len(rows) == 5
    assert [reason.split(":")[0] for reason in rows.refused.values()] == ["same_bytes"]
    assert isinstance(rows, FolderRows)
    (outside / "metadata.jsonl").write_text("{}", encoding="utf-8")
    assert not is_picture_folder(outside)
