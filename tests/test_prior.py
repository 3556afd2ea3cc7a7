"""Prior preservation: class images in the stream, a function of the clock, and in no evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from sdprep.errors import DataError, RecipeError, UserError
from sdtrain.cache.census import census
from sdtrain.cache.fill import fill
from sdtrain.cache.store import EntryStore
from sdtrain.cache.verify import verify
from sdtrain.check import describe
from sdtrain.check_text import check_text
from sdtrain.conditions import changes
from sdtrain.losses.mse import mse
from sdtrain.prior import PREFIX
from sdtrain.probe_sets import find_probes
from sdtrain.recipe import load_train_recipe
from sdtrain.run import Run
from sdtrain.run_folder import RunFolder
from sdtrain.setup import Setup, open_setup
from sdtrain.step import denoising_loss
from sdtrain.trainer import steps
from sdtrain.update import take_step
from tests.train_data import prepared_row, small_jpeg, write_prepared

Recipe = Callable[..., Path]


@pytest.fixture(scope="module")
def class_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of the class, one of them among those held out for validation."""
    rows = [prepared_row(number) for number in (40, 41, 42, 43)]
    folder = tmp_path_factory.mktemp("class") / "class images"
    return write_prepared(folder, [*rows, prepared_row(17)])


def opened(path: Path, prior: Path, *settings: str) -> Setup:
    return open_setup(load_train_recipe(path, [f"prior.path={str(prior)!r}", *settings]))


def clock_of(slots: list[str]) -> list[int]:
    return [at for at, id_ in enumerate(slots) if id_.startswith(PREFIX)]


def test_which_slots_are_of_the_prior_depends_on_the_clock_alone(
    train_recipe: Recipe, class_images: Path
) -> None:
    setup = opened(train_recipe(), class_images, "prior.fraction=0.3")
    stream = [slot.sample_id for slot in islice(setup.order.slots(), 60)]
    prior = clock_of(stream)
    for seen in range(61):
        assert sum(at < seen for at in prior) == seen * 3 // 10
    for start in (1, 3, 7, 29):
        again = [slot.sample_id for slot in islice(setup.order.slots(start), 20)]
        assert again == stream[start : start + 20]
    plain = open_setup(load_train_recipe(train_recipe()))
    own = [id_ for id_ in stream if not id_.startswith(PREFIX)]
    assert own == [slot.sample_id for slot in islice(plain.order.slots(), len(own))]
    cut = [[slot.sample_id for slot in step.slots] for step in setup.order.steps(0, 22, 4)]
    assert [len(step) for step in cut] == [4, 4, 4, 4, 4, 2]
    assert sum(cut, []) == stream[:22]
    for epoch in range(3):  # each prior image comes once before any comes again
        four = [stream[at] for at in prior][4 * epoch : 4 * epoch + 4]
        assert len(set(four)) == len(four) == 4


def test_a_prior_sample_counts_its_weight_and_loads_its_own_picture(
    train_recipe: Recipe, class_images: Path
) -> None:
    settings = ("prior.weight=0.25", 'prior.caption="a dög"', "prompt.dropout_p=0.0")
    setup = opened(train_recipe(), class_images, *settings)
    run = Run(setup, RunFolder(setup.recipe.output))
    total, number = 0.0, 0
    for micro in setup.micro_batches():
        batch = setup.reader().batch(micro.slots, micro.u)
        with torch.no_grad():
            losses = denoising_loss(setup.family, batch, mse)
        weights = (5 / setup.family.logsnr(batch.u).exp()).clamp(max=1)
        for at, slot in enumerate(micro.slots):
            is_prior = slot.sample_id.startswith(PREFIX)
            number += is_prior
            total += float(losses[at] * weights[at]) * (0.25 if is_prior else 1)
            if is_prior:
                assert slot.text.prompt in ("a dög", "")  # its own set's policy may drop it
                row = setup.prior.data.train.ids  # type: ignore[union-attr]
                assert slot.sample_id.removeprefix(PREFIX) in list(row)
        if micro.is_last:
            break
    assert number == 2
    line = take_step(run, next(steps(run)))
    assert line["loss"] == pytest.approx(total / 4, rel=1e-5)


def test_it_is_never_held_out_and_held_out_images_are_never_in_it(
    train_recipe: Recipe, class_images: Path
) -> None:
    probes = ("validation.images=4", "validation.train_probe_images=14")
    setup = opened(train_recipe(), class_images, *probes, "validation.timesteps_per_image=1")
    assert setup.prior is not None
    assert setup.prior.assignment.reasons() == {"held_out": 1}
    evaluated = {
        image.id for probe in find_probes(setup, Path("none")) for image in probe.probe.images
    }
    assert not evaluated & {prepared_row(number)["id"] for number in (40, 41, 42, 43)}
    found = describe(setup)
    assert found["data"]["prior"]["kept"] == 4
    assert "prior: 0.5 of all samples" in check_text(found, "")
    assert "prompts of the prior: mode caption" in check_text(found, "")
    assert found["length"]["epochs"] == pytest.approx(22 / 28)  # 14 of 28 samples are its own


def test_a_run_may_go_on_only_with_the_same_prior(
    train_recipe: Recipe, class_images: Path, tmp_path: Path
) -> None:
    setup = opened(train_recipe(), class_images)
    moved = tmp_path / "moved"
    shutil.copytree(class_images, moved)
    assert opened(train_recipe(), moved).conditions() == setup.conditions()
    other = opened(train_recipe(), write_prepared(tmp_path / "other", [prepared_row(40)]))
    found = changes(setup.conditions(), other.conditions())
    assert list(found) == ["prior.data_fingerprint"]
    plain = open_setup(load_train_recipe(train_recipe()))
    assert "prior" not in plain.conditions()


def test_a_prior_that_is_nowhere_is_an_error(train_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        opened(train_recipe(), tmp_path / "nothing here")


def test_a_prior_is_read_from_the_cache_as_well(train_recipe: Recipe, class_images: Path) -> None:
    settings = ("cache.latents=true", "data.crop='centre'")
    setup = opened(train_recipe(), class_images, *settings)
    run = Run(setup, RunFolder(setup.recipe.output))
    line = take_step(run, next(steps(run)))
    plain = opened(train_recipe(output="plain"), class_images, "data.crop='centre'")
    alone = Run(plain, RunFolder(plain.recipe.output))
    assert line["loss"] == take_step(alone, next(steps(alone)))["loss"]


def test_the_cache_is_filled_for_the_prior_too(
    train_recipe: Recipe, class_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("cache.latents=true", "cache.text=true", "data.cached_crops=2", "train.samples=40")
    settings += ("data.flip_prob=0.5", "prior.fraction=0.3", "prior.caption='a dog'")
    settings += ("prompt.score.position=none",)
    setup = opened(train_recipe(), class_images, *settings)
    found = census(setup)
    assert found is not None
    assert found["rows"] == found["of"] == 14 + 4
    done = fill(setup)
    assert done["latents"]["encoded"] == found["latents"]["wanted"]
    found = census(setup)
    assert found is not None
    assert found["latents"]["found"] == done["latents"]["wanted"]
    labels = {each.label for each in EntryStore(Path(done["path"]) / "latents.lance").scan()}
    assert len(labels) == 18
    assert sum(label.startswith(PREFIX) for label in labels) == 4
    again = opened(train_recipe(), class_images, *settings)
    for method in ("posterior", "encode_prompts"):  # all that the run asks for is there
        monkeypatch.setattr(again.family, method, None)
    for micro in again.micro_batches():
        again.encoder.encoded(again.reader(stored=True).batch(micro.slots, micro.u))
    assert verify(setup)["latents"]["encoded_again"] == 16


def test_texts_of_the_prior_that_cannot_be_kept_are_told_from_ones_own(
    train_recipe: Recipe, class_images: Path
) -> None:
    settings = ("cache.text=true", "cache.latents=false", "prompt.score.position=none")
    with pytest.raises(UserError, match=r"policy of \[prior\], which prior\.caption would end"):
        opened(train_recipe(), class_images, *settings)
    opened(train_recipe(), class_images, *settings, "prior.caption='a dog'")


def test_bare_pictures_with_one_caption_will_do(
    train_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for number in range(3):
        (bare / f"{number}.jpg").write_bytes(small_jpeg(number + 60, (96, 96)))
    setup = opened(train_recipe(), bare, "prior.caption='a dog'", "prompt.dropout_p=0.0")
    slots = islice(setup.order.slots(), 22)
    texts = {slot.text.prompt for slot in slots if slot.sample_id.startswith(PREFIX)}
    assert "a dog" in texts
    assert texts <= {"a dog", ""}  # the prior's own policy drops some
    said = capsys.readouterr().err
    assert "prior: pictures are taken from column image" in said
    assert "no text" not in said
    with pytest.raises(DataError, match="cannot tell which column holds the text") as caught:
        opened(train_recipe(), bare)
    assert caught.value.hint.startswith("No column has strings")


def test_mistakes_in_the_prior_are_called_so(train_recipe: Recipe, class_images: Path) -> None:
    with pytest.raises(DataError, match=r"^prior\.path = '/nowhere/data\.path'"):
        opened(train_recipe(), Path("/nowhere/data.path"))
    with pytest.raises(RecipeError, match="keep one"):
        opened(train_recipe(), class_images, "prior.caption=a", "prior.caption_column=b")
