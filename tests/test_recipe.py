"""Every mistake in a recipe is reported at once, with its place and the nearest valid key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from sdprep.errors import RecipeError
from sdprep.recipe import Section, load_recipe, options, validate


class MinSnr(Section):
    type: Literal["min_snr"] = "min_snr"
    snr_gamma: float = Field(5.0, gt=0)


class Plain(Section):
    type: Literal["plain"] = "plain"
    scale: int = 1


class Inner(Section):
    share: float = Field(0.5, ge=0, lt=1)
    names: tuple[str, ...] = ()


class Root(Section):
    output: Path
    seed: int = 0
    inner: Inner = Inner()
    loss: Annotated[MinSnr | Plain, Field(discriminator="type")] = MinSnr()
    steps: list[Annotated[MinSnr | Plain, Field(discriminator="type")]] = []


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        output = "runs/a"
        seed = "7"
        sede = 7
        snr_gamma = 3.0
        [inner]
        share = 1.5
        names = ["a", "b"]
        [loss]
        type = "min_snr"
        snr_gama = 5
        [[steps]]
        type = "plain"
        scale = "big"
        [[steps]]
        type = "min_snrr"
        """,
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, Root)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[0] == f"recipe error in {path}"
    found = dict(line.split("  ", 1) for line in lines[1:])
    found = {left.strip(): right.strip() for left, right in found.items()}
    assert found["loss.snr_gama = 5"] == "unknown key; did you mean loss.snr_gamma?"
    assert found["sede = 7"] == "unknown key; did you mean seed?"
    assert found["snr_gamma = 3.0"] == "unknown key here; there is loss.snr_gamma"
    assert found["inner.share = 1.5"] == "must be < 1.0"
    assert "valid integer" in found['seed = "7"']
    assert "valid integer" in found['steps[0].scale = "big"']
    assert "did you mean min_snr?" in found['steps[1].type = "min_snrr"']
    assert len(found) == 7


def test_a_good_recipe_keeps_types_and_is_frozen(tmp_path: Path) -> None:
    path = write(tmp_path, 'output = "runs/ä b"\n[inner]\nnames = ["x"]\nshare = 0\n')
    recipe = load_recipe(path, Root)
    assert recipe.output == Path("runs/ä b")
    assert recipe.inner.names == ("x",)
    assert recipe.inner.share == 0.0
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


def test_settings_from_the_command_line_are_checked_like_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, 'output = "a"\n[[steps]]\ntype = "plain"\n')
    changed = ["inner.share=0.25", "output=b c", "steps.plain.scale=3", "loss={type='plain'}"]
    recipe = load_recipe(path, Root, changed)
    assert recipe.inner.share == 0.25
    assert recipe.output == Path("b c")
    assert recipe.steps[0] == Plain(scale=3)
    assert recipe.loss == Plain()
    for wrong, message in (
        ("inner.shar=0.1", "did you mean inner.share"),
        ("inner.share", "expected key=value"),
        ("seed.x=1", "seed"),
        ("steps.5.scale=1", "none of the 1 entries"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(path, Root, [wrong])
    whole = load_recipe(path, Root, ["steps.plain={type='min_snr'}"])  # an entry by its name
    assert whole.steps == [MinSnr()]


def test_a_setting_without_a_value_takes_a_key_out(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'output = "a"\nseed = 3\n[inner]\nshare = 0.2\nnames = ["x"]\n[[steps]]\ntype="plain"',
    )
    recipe = load_recipe(path, Root, ["seed=", "inner.share="])
    assert (recipe.seed, recipe.inner) == (0, Inner(names=("x",)))
    assert load_recipe(path, Root, ["inner="]).inner == Inner()
    assert load_recipe(path, Root, ["steps.plain="]).steps == []
    assert load_recipe(path, Root, ["seed=", "seed=4"]).seed == 4
    assert load_recipe(path, Root, ['output=""']).output == Path()  # an empty text is a value
    for wrong, message in (
        ("output=", "output +missing"),
        ("inner.shares=", "no shares there\n.*share"),
        ("loss.type=", "no loss there"),
        ("steps.0.scale=", "no scale there"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, Root, [wrong])
        assert re.search(message, f"{caught.value.message}\n{caught.value.hint}"), caught.value


def test_what_is_no_table_is_told_so(tmp_path: Path) -> None:
    path = write(tmp_path, 'inner = false\noutput = "a"\nloss = "plain"\nsteps = [3, "plane"]')
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, Root)
    said = [" ".join(line.split()) for line in str(caught.value).splitlines()[1:]]
    table = "must be a table, with keys of its own"
    assert said == [
        f"inner = false {table}",
        f'loss = "plain" {table}, such as loss.type = "plain"',
        f"steps[0] = 3 {table}",
        f'steps[1] = "plane" {table}',
    ]


def test_missing_files_bad_toml_and_missing_keys(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(tmp_path / "none.toml", Root)
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(write(tmp_path, "a = = 1"), Root)
    with pytest.raises(RecipeError, match="output +missing"):
        validate({}, Root, "x")
    assert options(Inner, ["share=0.75"], names=["q"]) == Inner(share=0.75, names=("q",))
