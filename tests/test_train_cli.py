"""The sdtrain command: quick help, one JSON object, exit statuses, check and inspect."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from sdprep.clip_tokens import VOCABULARY
from sdprep.errors import UserError
from sdtrain.cli import app
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import open_setup
from sdtrain.wording import amount

Recipe = Callable[..., Path]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answered(*arguments: str | Path) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback]


def test_every_command_has_help_with_an_example() -> None:
    assert {"run", "check", "inspect", "tiny", "plugins"} <= set(COMMANDS)
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        result = call(name, "--help")
        assert result.exit_code == 0
        assert f"Example: sdtrain {name}" in " ".join(result.stdout.split())
        assert "--json" in result.stdout


def test_help_keeps_what_stands_in_brackets() -> None:
    for name in ("validate", "sample", "grid", "export"):
        assert "[ema]" in call(name, "--help").stdout, name


def test_training_imports_no_lance(prepared_folder: Path) -> None:
    code = (
        "import sys; from sdtrain.dataset import open_data\n"
        "from sdtrain.recipe import DataSection\n"
        "from sdprep.prompt_policy import PromptPolicy; import sdtrain.trainer\n"
        f"open_data(DataSection(path={str(prepared_folder)!r}), PromptPolicy())\n"
        "assert 'lance' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wrong_recipe_is_one_message_and_status_2(train_recipe: Recipe) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sdtrain.cli", "check", str(train_recipe()), "--set", "sead=1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean seed?" in done.stderr
    assert "Traceback" not in done.stderr
    assert call("run").exit_code == 2


def test_check_says_everything_and_trains_nothing(train_recipe: Recipe) -> None:
    path = train_recipe("sdxl")
    found = answered("check", path, "--set", "train.expect_percent.unet=100.0")
    assert not (path.parent / "run").exists()
    assert found["recipe"]["seed"] == 7
    assert found["data"]["splits"]["train"] == {
        "rows": 14,
        "kept": 14,
        "refused": {},
        "examples": [],
    }
    assert found["data"]["in_both_splits"] == 0
    assert sum(line["rows"] for line in found["buckets"]) == 14
    assert len(found["buckets"]) == 3
    assert sum(found["chunks"]["rows_by_chunks"].values()) == 14
    assert found["length"]["steps"] == 6
    assert found["length"]["last_step_samples"] == 2
    assert found["length"]["epochs"] == pytest.approx(22 / 14)
    assert found["learning_rate"]["samples_seen"][-1] == 20
    assert max(found["learning_rate"]["factor"]) == 1.0
    trained = {row["part"]: row["percent"] for row in found["freeze"]["rows"]}
    assert trained["unet"] == 100
    assert trained["text_encoder_2"] == 0
    assert len(found["prompts"]) == 3
    for prompt in found["prompts"]:
        height, width = prompt["time_ids"][:2]
        assert (width, height) in {(96, 96), (80, 112), (112, 80), (90, 100)}
    parameters = found["model"]["parameters"]["unet"]
    assert found["checkpoint_bytes"] == 3 * 4 * parameters


def test_check_counts_what_is_cut_off_prompts(train_recipe: Recipe) -> None:
    """Every fifth caption takes more than one chunk."""
    from transformers import CLIPTokenizer

    path = train_recipe()
    whole = answered("check", path)["chunks"]
    assert (whole["cut"], whole["tokens_cut"]) == (0, 0)
    found = answered("check", path, "--set", "model.max_chunks=1")["chunks"]
    tokenizer = CLIPTokenizer.from_pretrained(str(VOCABULARY))
    setup = open_setup(load_train_recipe(path))
    prompts = [slot.text.prompt for slot, _ in zip(setup.order.slots(), range(14), strict=False)]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in prompts]
    beyond = [length - 75 for length in lengths if length > 75]
    assert len(beyond) > 0
    assert (found["cut"], found["tokens_cut"]) == (len(beyond), sum(beyond))
    said = call("check", path, "--set", "model.max_chunks=1").stdout
    assert f"{amount(found['cut'], 'prompt')}, by {found['tokens_cut']:,} tokens" in said


def test_check_in_words_and_dry_run_are_the_same(train_recipe: Recipe) -> None:
    path = train_recipe()
    said = call("check", path).stdout
    assert said == call("run", path, "--dry-run").stdout
    for words in ("14 of 14 rows kept", "22 samples = 6 steps of 4", "unet.**"):
        assert words in said
    assert not (path.parent / "run").exists()


def test_sizes_are_shown_where_the_model_is_told_them(train_recipe: Recipe, tmp_path: Path) -> None:
    for family, is_told in (("sd15", False), ("sdxl", True)):
        recipe = train_recipe(family)
        assert ("time_ids" in call("check", recipe).stdout) == is_told
        shown = answered("check", recipe)["prompts"]
        assert {prompt["time_ids"] is not None for prompt in shown} == {is_told}
        to = tmp_path / family
        call("inspect", recipe, "-n", "1", "--to", to)
        page = (to / "index.html").read_text(encoding="utf-8")
        assert ("time_ids" in page) == is_told
        assert "original h, w" in page


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.expect_percent.unet=50.0", "train.expect_percent"),
        ('train.rules=[{ match = "unet.midblock.**", lr = 1e-4 }]', "matches no parameter"),
        ("schedule.warmup_samples=22", "leaves nothing"),
        ("data.resolution_px=512", "are refused"),
        ("model.path=nowhere", "nowhere"),
        ("train.preset=unet-9", "is no preset"),
    ],
)
def test_check_refuses_what_could_not_run(train_recipe: Recipe, override: str, words: str) -> None:
    result = call("check", train_recipe(), "--set", override)
    assert isinstance(result.exception, UserError)
    assert words in str(result.exception)


def test_inspect_shows_what_the_model_sees(train_recipe: Recipe, tmp_path: Path) -> None:
    to = tmp_path / "look here"
    recipe = train_recipe()
    found = answered("inspect", recipe, "-n", "2", "--to", to, "--set", "prompt.dropout_p=0.4")
    samples = found["samples"]
    assert len(samples) == 8
    assert {sample["step"] for sample in samples} == {1, 2}
    assert json.loads((to / "samples.json").read_text(encoding="utf-8")) == samples
    page = (to / "index.html").read_text(encoding="utf-8")
    assert {sample["dropped"] for sample in samples} == {True, False}
    for sample in samples:
        width, height = (int(side) for side in sample["bucket"].split("x"))
        assert Image.open(to / sample["picture"]).size == (width, height)
        assert Image.open(to / sample["through_vae"]).size == (width, height)
        assert sample["time_ids"][4:] == [height, width]
        assert (sample["prompt"] == "") == sample["dropped"]
        assert sample["timestep"] == int(1000 * sample["u"])
        assert sample["picture"] in page
    again = answered(
        "inspect",
        recipe,
        "-n",
        "2",
        "--to",
        tmp_path / "again",
        "--set",
        "prompt.dropout_p=0.4",
        "--set",
        "data.micro_batch_size=4",
    )
    by_slot = {(s["step"], s["slot"]): (s["id"], s["u"], s["prompt"]) for s in samples}
    assert by_slot == {
        (s["step"], s["slot"]): (s["id"], s["u"], s["prompt"]) for s in again["samples"]
    }


TO = {
    "validate": ("validate", "RECIPE", "--checkpoint", "x"),
    "sweep": ("sweep", "RECIPE", "--over", "seed=1,2"),
    "loss-curve": ("loss-curve", "RECIPE"),
    "inspect": ("inspect", "RECIPE"),
    "export": ("export", "RUN", "--format", "single-file"),
    "sample": ("sample", "RUN", "--prompts", "PROMPTS"),
    "grid": ("grid", "RUN", "--prompts", "PROMPTS"),
    "follow": ("grid", "--follow", "RUN", "--prompts", "PROMPTS"),
}
FILES = {"loss-curve": "x.png", "export": "x.safetensors", "grid": "x.png"}


@pytest.mark.parametrize("name", list(TO))
def test_a_file_where_a_folder_is_needed_is_said_at_once(
    train_recipe: Recipe, evaluated_run: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n", encoding="utf-8")
    places = {"RECIPE": train_recipe(), "RUN": evaluated_run, "PROMPTS": tmp_path / "prompts.txt"}
    (tmp_path / "taken").write_text("", encoding="utf-8")
    to = tmp_path / "taken" / FILES.get(name, "")
    error = call(*(places.get(word, word) for word in TO[name]), "--to", to).exception
    assert isinstance(error, UserError)
    assert "is a file, where a folder is needed" in str(error)


def test_a_curve_never_overwrites_its_own_numbers(train_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for to, words in (("x.json", "must end in"), ("x", "must end in"), ("folder.png", "a folder")):
        error = call("loss-curve", train_recipe(), "--to", tmp_path / to).exception
        assert isinstance(error, UserError)
        assert words in str(error)


def test_tiny_then_run(tmp_path: Path, train_recipe: Recipe) -> None:
    made = answered("tiny", "sd15", tmp_path / "model", "--seed", "3")
    assert made == {"path": str(tmp_path / "model"), "family": "sd15", "seed": 3}
    path = train_recipe()
    model = f"model.path='{tmp_path / 'model'}'"
    found = answered("run", path, "--set", model, "--set", "train.samples=6")
    assert found["is_finished"] is True
    assert found["samples_seen"] == 6
    assert Path(found["checkpoint"]).name == "6"
    assert (Path(found["model"]) / "unet").is_dir()
    again = call("run", path, "--set", model, "--set", "train.samples=7")
    assert "--accept-change train.samples" in str(again.exception)


def test_plugins_are_listed_with_their_options() -> None:
    found = answered("plugins")
    assert {"sd15", "sdxl"} <= set(found["family"])
    gamma = [o for o in found["weighting"]["min_snr"] if o["name"] == "gamma"]
    assert gamma[0]["default"] == 5.0
    assert all(o["description"] for kind in found.values() for p in kind.values() for o in p)
    assert "min_snr" in call("plugins").stdout


def test_check_sketches_the_schedule_and_folds_long_lines(
    train_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = call("check", train_recipe(), "--set", "precision.mixed=bf16").stdout.splitlines()
    assert any(set(line.strip()) <= set("▁▂▃▄▅▆▇█") and "█" in line for line in said)
    assert "precision.mixed = 'bf16' on the CPU" in " ".join(" ".join(said).split())
    assert all(len(line) <= 80 for line in said if "  " not in line.strip() and " " in line.strip())
    assert any("(78.57 %)" in line for line in said)
