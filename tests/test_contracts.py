"""Promises that hold for the whole project: plugins, recipes, imports, start-up."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdprep import console, plugins
from sdprep.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("sdprep", "sdtrain")
SHARED_WITH_TRAINER = {
    *("schema", "images", "prompts", "tags", "seeding", "recipe", "plugins", "errors", "console"),
    *(
        "private_paths",
        "buckets",
        "bucket_table",
        "clip_tokens",
        "lock",
        "prompt_policy",
        "prompt_record",
        "prompt_explained",
    ),
    *("masks", "hub_access", "card_text", "lance_folder"),
    *("contrastive", "model_files"),  # CLIP and SigLIP: both programs look at pictures with them
}
HEAVY = ("torch", "datasets", "lance", "transformers", "diffusers", "matplotlib", "scipy")
NO_HELP_NEEDS = (*HEAVY, "numpy", "pyarrow", "pydantic")


def modules(program: str) -> list[Path]:
    return sorted((ROOT / program).rglob("*.py"))


def imports_of(path: Path, *, top_level_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def test_every_plugin_has_a_test_of_its_own_name_or_kind() -> None:
    tests = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    count = 0
    for kind in (*plugins.PREP_KINDS, *plugins.TRAIN_KINDS):
        for name, config in plugins.configs(kind).items():
            assert config.model_fields["type"].default == name
            assert re.search(rf"\b{name}\b", tests), f"{kind} {name} is in no test"
            assert (config.__doc__ or "").strip(), f"{kind} {name} says nothing of itself"
            for key, field in config.model_fields.items():
                assert key == "type" or field.description, f"{kind} {name}: {key} is not described"
            count += 1
    assert count >= 12


def test_every_shipped_recipe_validates_and_has_its_header() -> None:
    from sdprep.prep_recipe import PrepRecipe

    train = importlib.import_module("sdtrain.recipe")
    count = 0
    for path in sorted((ROOT / "recipes").rglob("*.toml")):
        text = path.read_text(encoding="utf-8")
        for word in ("# What:", "# Needs:", "# Command:", "# Expected result:"):
            assert word in text, f"{path.name} lacks {word}"
        if "[model]" in text:
            train.load_train_recipe(path)
        else:
            load_recipe(path, PrepRecipe)
        count += 1
    assert count >= 4


def test_imports_point_one_way() -> None:
    count = 0
    for path in modules("sdprep"):
        for name in imports_of(path):
            assert not name.startswith("sdtrain"), f"{path} imports {name}"
            count += 1
    for path in modules("sdtrain"):
        is_lazy_place = path.name in ("table_data.py", "hub_data.py")
        for name in imports_of(path):
            if name.startswith("sdprep.") and not is_lazy_place:
                assert name.split(".")[1] in SHARED_WITH_TRAINER, f"{path} imports {name}"
                count += 1
    assert count > 100


def test_plugins_import_the_core_and_never_each_other() -> None:
    count = 0
    for kind in (*plugins.PREP_KINDS, *plugins.TRAIN_KINDS):
        folder = Path(importlib.import_module(plugins._PACKAGES[kind]).__path__[0])
        for path in folder.glob("[!_]*.py"):
            for name in imports_of(path):
                inside = name.startswith(f"{folder.parent.name}.{folder.name}.")
                assert not inside or name.rsplit(".", 1)[1].startswith("_"), f"{path}: {name}"
                count += 1
    assert count > 20


def test_nothing_heavy_is_imported_at_the_top_of_sdprep() -> None:
    for path in modules("sdprep"):
        for name in imports_of(path, top_level_only=True):
            assert name.split(".")[0] not in HEAVY, f"{path} imports {name} at the top"


def test_init_files_hold_a_docstring_and_nothing_more() -> None:
    found = [path for program in PROGRAMS for path in modules(program) if path.stem == "__init__"]
    assert len(found) > 8
    for path in found:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, path
        assert isinstance(body[0], ast.Expr), path


def test_families_are_named_nowhere_else() -> None:
    names = re.compile("|".join(plugins.configs("family")), re.IGNORECASE)
    for path in modules("sdtrain"):
        if not {"families", "formats"} & set(path.parts):
            assert not names.search(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_quick_and_imports_nothing_heavy(program: str) -> None:
    script = (
        f"import sys; sys.argv = ['{program}', '--help']\n"
        f"from {program}.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"loaded = [name for name in {NO_HELP_NEEDS!r} if name in sys.modules]\n"
        "print('heavy:', loaded, file=sys.stderr)"
    )
    environment = {**os.environ, "TERM": "dumb"}
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    after = os.times()
    assert "heavy: []" in done.stderr, done.stderr
    assert "Usage" in done.stdout
    # Half a second is the promise; a busy machine must not fail the test for it.
    print(f"{program} --help: {sum(after[2:4]) - sum(before[2:4]):.2f} s of the processor")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_has_help_with_an_example(program: str) -> None:
    cli = importlib.import_module(f"{program}.cli")
    commands = [command for command in cli.app.registered_commands]
    assert len(commands) >= 6
    for command in commands:
        assert "Example" in (command.epilog or ""), command.name
        assert command.callback is not None
        assert (command.callback.__doc__ or "").strip(), command.name


def test_the_plain_import_of_the_trainer_needs_no_lance() -> None:
    script = (
        "import sys; sys.modules['lance'] = None\n"
        "import pkgutil, importlib, sdtrain\n"
        "names = [m.name for m in pkgutil.walk_packages(sdtrain.__path__, 'sdtrain.')]\n"
        "[importlib.import_module(name) for name in names]\n"
        "print(len(names))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_is_a_module_as_well(program: str) -> None:
    command = [sys.executable, "-m", program, "plugins", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)


@pytest.mark.parametrize(
    "typed", ["/usr/bin/sdprep", "Scripts/sdprep.exe", "x/sdprep/__main__.py", "x/sdprep/cli.py"]
)
def test_the_history_names_the_program(monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    monkeypatch.setattr(sys, "argv", [typed, "tag", "my photos.lance"])
    assert console.command_line() == "sdprep tag 'my photos.lance'"
