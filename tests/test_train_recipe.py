"""The training recipe: every mistake at once, and what is written down reads back the same."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdprep.errors import RecipeError
from sdtrain.recipe import load_train_recipe
from sdtrain.toml_text import toml_text

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = [path for path in sorted((ROOT / "recipes").rglob("*.toml")) if path.stem[:2] == "sd"]


def test_shipped_recipes_are_all_there() -> None:
    assert len(SHIPPED) >= 6


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_recipe_is_valid_and_its_resolved_form_reads_back(
    path: Path, tmp_path: Path
) -> None:
    recipe = load_train_recipe(path)
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(f"# {word}:" in header for word in ("What", "Needs", "Command", "Expected result"))
    written = tmp_path / "recipe.toml"
    written.write_text(toml_text(recipe.resolved()), encoding="utf-8")
    assert load_train_recipe(written) == recipe


def failing(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_train_recipe(path, overrides)
    return caught.value.message


def test_every_mistake_is_named_at_once_with_the_nearest_key(
    train_recipe: Callable[..., Path],
) -> None:
    path = train_recipe()
    message = failing(path, "data.batch_sise=4", "model.pth=x", "weighting.gama=2.0", "seed=1.5")
    assert str(path) in message
    assert "data.batch_sise = 4" in message
    assert "did you mean data.batch_size?" in message
    assert "did you mean model.path?" in message
    assert "did you mean weighting.gamma?" in message
    assert "seed = 1.5" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs=2", "either samples or epochs"),
        ("train.samples=0", "must be > 0"),
        ("train.rules=[]", "nothing would train"),
        ('train.rules=[{match = "unet.**"}]', "either lr = NUMBER or freeze = true"),
        ('train.rules=[{match = "a", lr = 1.0, freeze = true}]', "either lr = NUMBER"),
        ('train.rules=[{match = "unet.**", lr = 1e39}]', "must be <= 1000000"),
        ("train.lr=1e39", "must be <= 1000000"),
        ("data.micro_batch_size=9", "must not exceed batch_size 4"),
        ("model.family=sdxxl", "did you mean sdxl?"),
        ("validation.timesteps_per_image=0", 'must be "auto" or a whole number'),
        ("prompt.dropout=0.5", "unknown key; did you mean prompt.dropout_p?"),
        ("prompt.dropout_p=1.5", "must be <= 1"),
        ("output=/", "must name a folder"),
        ("schedule.type=cosin", "did you mean cosine?"),
        ("data.max_upscale=nan", "must be > 0"),
        ("train.expect_percent={unet = nan}", "train.expect_percent.unet = NaN"),
        ("train.expect_percent={unet = 101}", "must be <= 100"),
    ],
)
def test_what_does_not_fit_is_refused(
    override: str, words: str, train_recipe: Callable[..., Path]
) -> None:
    assert words in failing(train_recipe(), override)


@pytest.mark.parametrize(("batch", "micro"), [(1, 1), (3, 3), (4, 4), (16, 4)])
def test_a_small_batch_needs_no_second_key(
    tmp_path: Path, train_recipe: Callable[..., Path], batch: int, micro: int
) -> None:
    lines = train_recipe().read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(("micro_batch_size", "batch_size"))]
    path = tmp_path / "small.toml"
    path.write_text("\n".join(kept).replace("[data]", f"[data]\nbatch_size = {batch}"), "utf-8")
    assert load_train_recipe(path).data.micro_batch_size == micro
    assert load_train_recipe(path).resolved()["data"]["micro_batch_size"] == micro
    assert "must not exceed" in failing(path, f"data.micro_batch_size={batch + 1}")


def test_a_missing_recipe_and_broken_toml_are_user_errors(tmp_path: Path) -> None:
    assert "there is no recipe" in failing(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("seed = = 1", encoding="utf-8")
    assert "not valid TOML" in failing(tmp_path / "broken.toml")


def test_the_prompt_table_keeps_only_what_was_set(train_recipe: Callable[..., Path]) -> None:
    recipe = load_train_recipe(train_recipe(), ["prompt.length.mean=8.0"])
    assert recipe.resolved()["prompt"] == {"length": {"mean": 8.0}}


PLAIN = st.one_of(
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False),
    st.text(st.characters(blacklist_categories=("Cs",))),
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(blacklist_categories=("Cs",))), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.text(st.characters(blacklist_categories=("Cs",))), VALUES, max_size=4))
def test_toml_reads_back_what_was_written(data: dict[str, Any]) -> None:
    assert tomllib.loads(toml_text(data)) == data


def test_toml_leaves_out_none_and_refuses_what_it_cannot_hold() -> None:
    assert tomllib.loads(toml_text({"a": None, "b": {"c": None, "d": 1}})) == {"b": {"d": 1}}
    with pytest.raises(TypeError, match="object"):
        toml_text({"a": object()})


def test_a_table_without_a_type_is_that_of_the_default(train_recipe: Callable[..., Path]) -> None:
    path = train_recipe()
    text = path.read_text(encoding="utf-8").replace('type = "cosine"\n', "")
    tables = "\n[optimizer]\nbetas = [0.8, 0.9]\n[loss]\n[adapter]\n"
    path.write_text(text.replace('type = "min_snr"\n', "") + tables, encoding="utf-8")
    recipe = load_train_recipe(path)
    assert (recipe.optimizer.type, recipe.optimizer.betas) == ("adamw", (0.8, 0.9))
    assert (recipe.schedule.type, recipe.schedule.warmup_samples) == ("constant", 4)
    assert (recipe.weighting.type, recipe.loss.type, recipe.adapter.type) == ("none", "mse", "full")
    message = failing(path, "optimizer.beta=1.0", "adapter.rank=4", "schedule.half_cycle_samples=3")
    assert "optimizer.beta = 1.0" in message
    assert "did you mean optimizer.betas?" in message
    assert "adapter.type = full has no such key, though another type has" in message
    assert "schedule.type = constant has no such key" in message


def test_rates_grow_with_the_root_of_the_batch_on_request(
    train_recipe: Callable[..., Path],
) -> None:
    from sdtrain.check import check

    plain = check(load_train_recipe(train_recipe()))
    scaled = check(load_train_recipe(train_recipe(), ["train.lr_scaling=sqrt"]))
    assert plain["learning_rate"]["lr"]["unet.**"][0] == pytest.approx(1e-3 / 5)
    assert scaled["learning_rate"]["lr"]["unet.**"][0] == pytest.approx(2e-3 / 5)
    assert scaled["learning_rate"]["scaled_by"] == 2
    assert scaled["learning_rate"]["per_sample_root"]["unet.**"] == pytest.approx(1e-3)
    assert [row["lr"] for row in scaled["freeze"]["rows"] if row["part"] == "unet"] == [2e-3]
    assert "multiplied by 2" in scaled["freeze"]["notes"][0]
    ours = plain["memory"]
    assert ours["optimizer"] == 2 * ours["gradients"]
