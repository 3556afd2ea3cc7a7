"""The policy of the last recipe is kept in the table, and everything that renders finds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdprep.cli import app
from sdprep.errors import RecipeError
from sdprep.prompt_policy import PromptPolicy
from sdprep.table import PhotoTable
from sdprep.table_policy import KEY, policy_of, remember_policy
from tests.train_data import small_jpeg

RECIPE = """
table = {table!r}
[[source]]
type = "folder"
path = {photos!r}
[policy]
mode = "caption"
dropout_p = 0.0
triggers = ["zwx"]
"""


def call(*arguments: str | Path) -> dict[str, object]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_a_recipe_leaves_its_policy_for_preview_and_publishing(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        (photos / f"{number}.jpg").write_bytes(small_jpeg(number, (96, 96)))
        (photos / f"{number}.txt").write_text(f"a photo {number}", encoding="utf-8")
    recipe, path = tmp_path / "photos.toml", tmp_path / "photos.lance"
    names = {"table": str(path), "photos": str(photos)}
    recipe.write_text(RECIPE.format(**names), encoding="utf-8")
    call("run", recipe)
    table = PhotoTable.open(path)
    expected = PromptPolicy(mode="caption", dropout_p=0.0, triggers=("zwx",))
    assert policy_of(table) == expected
    version = table.version
    call("run", recipe)
    assert PhotoTable.open(path).version == version  # nothing new, nothing written
    prompts = call("prompts", path)["prompts"]
    assert isinstance(prompts, list)
    assert len(prompts) == 2
    assert all(prompt["text"].startswith("zwx, ") for prompt in prompts)
    call("publish", path, "--to", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "sdprep.json").read_text(encoding="utf-8"))
    assert manifest["policy"]["triggers"] == ["zwx"]
    (tmp_path / "other.toml").write_text('triggers = ["abc"]\nmode = "caption"\n', "utf-8")
    shown = call("prompts", path, "--policy", tmp_path / "other.toml", "--seed", "3")["prompts"]
    assert isinstance(shown, list)
    assert all(prompt["text"].startswith("abc") or prompt["dropped"] for prompt in shown)


def test_what_is_kept_survives_writing_and_a_damaged_policy_is_told(tmp_path: Path) -> None:
    table = PhotoTable.open(tmp_path / "t.lance", create=True)
    assert policy_of(table) is None
    remember_policy(table, PromptPolicy(mode="pick"))
    with table.writer():
        table.write_fold([], {}, stage="none")
    remember_policy(table, PromptPolicy())  # all defaults again
    assert policy_of(PhotoTable.open(table.path)) == PromptPolicy()
    with table.writer():
        table.dataset.update_schema_metadata({KEY: '{"mood": 1}'})
        table.refresh()
    with pytest.raises(RecipeError, match="mood"):
        policy_of(table)
