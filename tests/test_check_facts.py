"""What `check` says of files, hashes, leaks, the cost of evaluation and the whole recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdtrain import check_facts
from sdtrain.check import describe
from sdtrain.check_text import check_text
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import open_setup
from sdtrain.stored_formats import model_files
from sdtrain.tensor_hashes import part_hashes
from tests.train_data import prepared_row, write_prepared


def facts(path: Path, *settings: str) -> tuple[dict[str, Any], str]:
    """What a recipe would do, as numbers and as text in one line."""
    setup = open_setup(load_train_recipe(path, settings))
    found = describe(setup)
    return found, " ".join(check_text(found, setup.plan.table()).split())


def test_files_are_named_with_their_sizes_and_each_network_with_its_hash(
    train_recipe: Callable[..., Path], tiny_model: Callable[[str], Path]
) -> None:
    found, said = facts(train_recipe())
    model = found["model"]
    for name, size in model["files"].items():
        assert (tiny_model("sd15") / name).stat().st_size == size
        assert name in said
    assert {name.split("/")[0] for name in model["files"]} == set(model["parameters"])
    assert set(model["hashes"]) == set(model["parameters"])
    assert len(set(model["hashes"].values())) == len(model["hashes"])
    assert f"unet {model['hashes']['unet'][:12]}" in said
    assert model_files("some/repository", ["unet"]) == {}


def test_a_hash_is_that_of_its_own_network_alone() -> None:
    before = {"unet.a": "1", "unet.b": "2", "vae.a": "1"}
    after = part_hashes({**before, "unet.b": "3"})
    assert after["vae"] == part_hashes(before)["vae"]
    assert after["unet"] != part_hashes(before)["unet"]


@pytest.mark.parametrize(("group", "shared"), [("group7", 0), ("group2", 1)])
def test_a_group_on_both_sides_is_a_leak(
    train_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    group: str,
    shared: int,
) -> None:
    train = [prepared_row(n) for n in range(6)]
    held_out = [prepared_row(7, group_id=group), prepared_row(8)]
    recipe = train_recipe(data=write_prepared(tmp_path / "set", train, held_out))
    found, said = facts(recipe)
    assert found["data"]["groups_in_both_splits"] == shared
    assert f"in both: {shared}" in said
    assert ("WARNING: images in both splits: 0" in said) == bool(shared)
    monkeypatch.setattr(check_facts, "MOST_GROUP_ROWS", 7)
    found, said = facts(recipe)
    assert found["data"]["groups_in_both_splits"] is None
    assert "near duplicates" not in said


def test_one_image_of_each_group_is_counted_as_it_is_evaluated(
    train_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [prepared_row(n, group_id=f"group{n // 3}") for n in range(18)]
    recipe = train_recipe(data=write_prepared(tmp_path / "set", rows[:9], rows[9:]))
    for wanted, train in ((64, 3), (2, 2)):
        settings = "validation.images=64", f"validation.train_probe_images={wanted}"
        found, _ = facts(recipe, *settings)
        assert found["evaluation"]["images"] == {"validation": 3, "train_probe": train}


def test_the_cost_of_evaluation_counts_every_set_and_both_weights(
    train_recipe: Callable[..., Path],
) -> None:
    recipe, sets = train_recipe(), ("validation.images=2", "validation.train_probe_images=3")
    plain, _ = facts(recipe, *sets)
    assert sum(plain["evaluation"]["images"].values()) > 0
    more, said = facts(
        recipe,
        *sets,
        "ema.half_life_samples=100",
        'validation.forgetting.prompts=["a car"]',
        "validation.forgetting.images=3",
    )
    outside = more["evaluation"]["timesteps_per_image"]["forgetting"] * 3
    forwards = 2 * (plain["evaluation"]["forwards_each_time"] + outside)
    assert more["evaluation"]["forwards_each_time"] == forwards
    assert "with the averaged weights as well" in said
    samples, times = more["length"]["samples"], more["evaluation"]["times"]
    share = 100 * times * forwards / (3 * samples)
    assert more["evaluation"]["percent_of_training"] == pytest.approx(share)


def test_the_whole_recipe_is_shown(train_recipe: Callable[..., Path]) -> None:
    setup = open_setup(load_train_recipe(train_recipe()))
    found = describe(setup)
    text = check_text(found, setup.plan.table())
    shown = " ".join(text[text.index("the recipe, defaults included") :].split())
    for section, values in found["recipe"].items():
        if isinstance(values, dict):
            for key, value in values.items():
                assert value is None or f"{key} = " in shown, (section, key)
    assert f"seed = {found['recipe']['seed']}" in shown


def test_the_largest_change_says_that_the_warm_up_is_not_in_it(
    train_recipe: Callable[..., Path],
) -> None:
    """At constant rate nothing changes after it; the second step of the warm-up is a leap."""
    for warmup, words in ((8, "the next after the warm-up: x1,"), (0, "the next: x1,")):
        settings = ("schedule.type=constant", f"schedule.warmup_samples={warmup}")
        _, said = facts(train_recipe(), *settings)
        assert words in said


def test_an_epoch_is_counted_with_its_repeats_and_without_its_prior(
    train_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [prepared_row(number, repeats=3 if number < 4 else 1) for number in range(8)]
    data = write_prepared(tmp_path / "own", rows)
    prior = write_prepared(tmp_path / "prior", [prepared_row(number) for number in range(30, 36)])
    whole = ("train.samples=", "train.epochs=2", "prompt.dropout_p=0")
    found, said = facts(train_recipe(data=data), *whole)
    assert (found["length"]["samples"], found["length"]["epochs"]) == (32, 2.0)
    assert found["chunks"]["looked_at"] == found["chunks"]["of"] == 16
    # Long are 0, three times, and 5.
    assert found["chunks"]["rows_by_chunks"] == {"1": 12, "3": 4}
    assert "first epoch, 16 samples: 1: 12 (75 %), 3: 4 (25 %)" in said
    shared = (f"prior.path={str(prior)!r}", "prior.fraction=0.25")
    found, _ = facts(train_recipe(data=data), *whole, *shared)
    samples = found["length"]["samples"]
    assert found["length"]["epochs"] == (samples - samples // 4) / 16  # every fourth is the prior's
    assert found["chunks"]["of"] == 21  # 16 are three quarters
