"""Training once more on everything, and on a part of the images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sdprep.errors import DataError, UserError
from sdtrain.dataset import open_data
from sdtrain.final import best_length, final_recipe
from sdtrain.recipe import TrainRecipe, load_train_recipe
from sdtrain.setup import open_setup
from sdtrain.trackers.jsonl import read_metrics
from sdtrain.trainer import train

WITH_EVALUATION = (
    *("validation.images=3", "validation.timesteps_per_image=2", "validation.every_samples=8"),
    *("train.samples=16", "checkpoint.every_samples=8", "checkpoint.keep=9"),
)


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("final")


@pytest.fixture(scope="module")
def found(
    module_path: Path, prepared_folder: Path, tiny_model: Callable[[str], Path]
) -> tuple[TrainRecipe, Path]:
    """A recipe and its finished run."""
    from tests.train_data import write_recipe

    path = write_recipe(
        module_path / "recipe.toml",
        model=tiny_model("sd15"),
        data=prepared_folder,
        output=module_path / "run",
        family="sd15",
    )
    recipe = load_train_recipe(path, WITH_EVALUATION)
    train(recipe, keeps_model=False)
    return recipe, module_path / "run"


@pytest.mark.slow
def test_trains_on_both_splits_for_the_length_that_was_best(
    found: tuple[TrainRecipe, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = found
    length = best_length(run)
    assert length in (8, 16)
    final = final_recipe(recipe, run)
    assert "nothing is left that could tell" in capsys.readouterr().err
    assert final.output == recipe.output.with_name("run-final")
    assert (final.train.samples, final.train.schedule_samples) == (length, 16)
    setup, before = open_setup(final), open_setup(recipe)
    assert before.data.validation is not None
    held_out = set(before.data.validation.ids)
    assert set(setup.data.train.ids) == set(before.data.train.ids) | held_out
    assert setup.validation is None
    # The rates are those of the run at the same moment.
    clocks = range(0, length, 4)
    assert [setup.schedule()(k) for k in clocks] == [before.schedule()(k) for k in clocks]
    outcome = train(final, keeps_model=False)
    assert outcome.is_finished
    assert outcome.samples_seen == length
    lines = read_metrics(final.output / "metrics.jsonl")
    assert not [x for x in lines if x["kind"] == "validation" and x["set"] == "validation"]


def test_another_recipe_or_a_run_that_found_nothing_is_refused(
    found: tuple[TrainRecipe, Path], tmp_path: Path
) -> None:
    recipe, run = found
    other = recipe.model_copy(update={"seed": recipe.seed + 1})
    with pytest.raises(UserError, match="trained with another seed"):
        final_recipe(other, run)
    with pytest.raises(DataError, match="no best evaluation"):
        final_recipe(recipe, tmp_path)


def test_joined_rows_answer_like_the_splits(found: tuple[TrainRecipe, Path]) -> None:
    recipe, _ = found
    apart = open_data(recipe.data, recipe.prompt)
    joined = open_data(recipe.data.model_copy(update={"splits": "all"}), recipe.prompt)
    assert apart.validation is not None
    assert joined.validation is None
    assert joined.fingerprint == apart.fingerprint
    n = len(apart.train)
    rows, both = joined.train, [*apart.train.ids, *apart.validation.ids]
    assert list(rows.ids) == both
    mixed = [n + 1, 0, n, 2]
    expected = [*apart.validation.records([1]), *apart.train.records([0])]
    expected += [*apart.validation.records([0]), *apart.train.records([2])]
    assert rows.records(mixed) == expected
    assert len(rows.sources(mixed)) == 4
    for row in (0, n - 1, n, len(rows) - 1):
        split, own = (apart.train, row) if row < n else (apart.validation, row - n)
        assert np.array_equal(np.asarray(rows.image(row)), np.asarray(split.image(own)))
        assert tuple(rows.sizes_hw[row]) == tuple(split.sizes_hw[own])


def test_a_limit_keeps_some_and_a_smaller_one_some_of_those(
    train_recipe: Callable[..., Path],
) -> None:
    kept = {}
    for limit in (3, 6, 999):
        setup = open_setup(load_train_recipe(train_recipe(), [f"data.limit={limit}"]))
        kept[limit] = set(setup.data.train.ids.at(setup.train.kept))
    assert [len(kept[limit]) for limit in kept] == [3, 6, 14]
    assert kept[3] < kept[6] < kept[999]
