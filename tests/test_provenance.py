"""What models say of their making: show, diff and push, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import sdprep.hub_access
from sdprep.errors import DataError, UserError
from sdtrain.cli import app
from sdtrain.export import export
from sdtrain.recipe import load_train_recipe
from sdtrain.trainer import train
from tests.hub_server import TOKEN, HubServer

REPO = "user/a-model"


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answered(*arguments: str | Path) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.exception
    return dict(json.loads(result.stdout))


# --- show -----------------------------------------------------------------------------------------


def test_a_run_its_checkpoint_and_its_model_folder_say_how_they_were_made(
    evaluated_run: Path,
) -> None:
    run = answered("show", evaluated_run)
    assert Path(run["path"]) == evaluated_run / "checkpoints" / "12"
    assert (run["samples_seen"], run["recipe"]["seed"]) == (12, 7)
    assert "unet.**" in run["freeze_table"]
    assert {line["samples_seen"] for line in run["evaluations"]} == {0, 8, 12}
    assert run["versions"]["torch"]
    folder = answered("show", evaluated_run / "model")
    assert folder["kind"] == "model folder"
    assert folder["recipe"] == run["recipe"]
    said = call("show", evaluated_run).stdout
    for words in ("12 samples", "unet.**", "fingerprint", "% since sample 0", "[optimizer]"):
        assert words in said


def test_an_exported_file_still_says_it(evaluated_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "a model.safetensors"
    export(evaluated_run, "single-file", file, title="Dogs")
    found = answered("show", file)
    assert (found["samples_seen"], found["about"]["title"]) == (12, "Dogs")
    assert found["recipe"]["train"] == answered("show", evaluated_run)["recipe"]["train"]


def test_an_exported_folder_still_says_it(evaluated_run: Path, tmp_path: Path) -> None:
    wanted = answered("show", evaluated_run)
    for source, to in ((evaluated_run, "a"), (tmp_path / "a", "b"), (evaluated_run / "model", "c")):
        export(source, "diffusers", tmp_path / to)
        found = answered("show", tmp_path / to)
        assert (found["samples_seen"], found["recipe"]["seed"]) == (12, 7)
        assert found["freeze_table"] == wanted["freeze_table"]
        assert str(tmp_path) not in json.dumps(found["recipe"])
    export(tmp_path / "a", "single-file", tmp_path / "d.safetensors")
    assert answered("show", tmp_path / "d.safetensors")["samples_seen"] == 12
    (tmp_path / "a" / "training.json").write_text("{", encoding="utf-8")
    assert "training.json is damaged" in str(call("show", tmp_path / "a").exception)


def test_a_run_did_nothing_differently_from_its_export(evaluated_run: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "a.safetensors", tmp_path / "a"
    export(evaluated_run, "single-file", file)
    export(evaluated_run, "diffusers", folder)
    for one, two in ((evaluated_run, file), (folder, evaluated_run), (file, folder)):
        assert answered("diff", one, two)["keys"] == {}


def test_what_knows_nothing_says_so(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    assert "no record of its training" in call("show", tiny_model("sd15")).stdout
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nothing"):
        assert isinstance(call("show", path).exception, DataError)
    (tmp_path / "text.safetensors").write_text("hello", encoding="utf-8")
    assert isinstance(call("show", tmp_path / "text.safetensors").exception, DataError)


def test_best_stands_for_the_checkpoint_that_it_names(evaluated_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated_run / "checkpoints", run / "checkpoints")
    best = run / "checkpoints" / "best"
    named = best.with_name(json.loads(best.read_text("utf-8"))["checkpoint"])
    assert Path(answered("show", best)["path"]) == named
    assert answered("diff", best, named)["keys"] == {}
    made = answered("export", best, "--format", "single-file", "--to", tmp_path / "x.safetensors")
    assert made["samples_seen"] == int(named.name)
    best.write_text('{"checkpoint": "99"}', encoding="utf-8")
    for command in (("show",), ("diff", run), ("export", "--format", "diffusers", "--to", "x")):
        error = call(*command, best).exception
        assert isinstance(error, DataError)
        assert "names 99, which is not there" in str(error)


def test_damaged_files_are_named_and_are_no_bug(
    evaluated_run: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated_run / "checkpoints", run / "checkpoints")
    weights = run / "checkpoints" / "12" / "trained.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    error = call("diff", evaluated_run, run).exception
    assert isinstance(error, DataError)
    assert "trained.safetensors is no whole .safetensors file" in str(error)
    model = tmp_path / "model"
    shutil.copytree(tiny_model("sd15"), model)
    for text in ("{", "[]"):
        (model / "model_index.json").write_text(text, encoding="utf-8")
        error = call("export", model, "--format", "diffusers", "--to", tmp_path / "y").exception
        assert isinstance(error, DataError)
        assert "model_index.json" in str(error)


# --- diff -----------------------------------------------------------------------------------------


def test_two_runs_differ_in_what_was_changed(
    train_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = train_recipe()
    both = ("train.samples=8", "train.lr=1e-3", "train.rules=[]")
    first = train(load_train_recipe(recipe, both))
    changed = (*both[:2], 'train.rules=[{ match = "text_encoder.**", lr = 1e-3 }]', "seed=8")
    other = f"output={str(tmp_path / 'other')!r}"
    second = train(load_train_recipe(recipe, (*changed, other)))
    found = answered("diff", first.output, second.output)
    assert found["keys"]["recipe.seed"] == [7, 8]
    assert "recipe.train.rules" in found["keys"]
    assert "recipe.train.lr" not in found["keys"]
    parts = {part["part"]: part for part in found["parts"]}
    assert parts["unet"]["changed"] > 0
    assert 0 < parts["unet"]["percent"] < 100
    assert parts["text_encoder"]["only_b"] > 0
    assert parts["text_encoder"]["only_a"] == parts["text_encoder"]["changed"] == 0
    said = call("diff", first.output, second.output).stdout
    assert "recipe.seed" in said
    same = answered("diff", first.output, first.output)
    assert same["keys"] == {}
    assert {part["changed"] for part in same["parts"]} == {0}
    assert {part["percent"] for part in same["parts"]} == {0.0}


def test_folders_are_compared_part_by_part(
    evaluated_run: Path, tiny_model: Callable[[str], Path]
) -> None:
    found = answered("diff", tiny_model("sd15"), evaluated_run / "model")
    parts = {part["part"]: part for part in found["parts"]}
    assert parts["unet"]["changed"] > 0
    assert parts["vae"]["changed"] == parts["text_encoder"]["changed"] == 0


def by_part(a: Path, b: Path) -> dict[str, dict[str, Any]]:
    return {part["part"]: part for part in answered("diff", a, b)["parts"]}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_single_file_is_compared_weight_by_weight(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, file = tiny_model(family), tmp_path / "one.safetensors"
    export(folder, "single-file", file)
    parts = by_part(folder, file)
    assert {"unet", "vae", "text_encoder"} <= set(parts)
    for part in parts.values():
        assert part["same"] > 30
        assert (part["changed"], part["only_a"], part["only_b"]) == (0, 0, 0)


def test_a_checkpoint_is_compared_with_the_file_made_of_it(
    evaluated_run: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    file, base = tmp_path / "one.safetensors", tmp_path / "base.safetensors"
    export(evaluated_run, "single-file", file)
    export(tiny_model("sd15"), "single-file", base)
    same = by_part(evaluated_run, file)["unet"]
    assert same["same"] > 200
    assert (same["changed"], same["only_a"], same["only_b"]) == (0, 0, 0)
    there, back = by_part(evaluated_run, base)["unet"], by_part(evaluated_run / "model", base)
    assert there["changed"] > 200
    assert there["percent"] == pytest.approx(back["unet"]["percent"])


def test_a_wider_number_format_is_no_change(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    narrow, wide = tmp_path / "narrow.safetensors", tmp_path / "wide.safetensors"
    export(tiny_model("sd15"), "single-file", narrow, dtype="bf16")
    save_file({name: tensor.float() for name, tensor in load_file(narrow).items()}, wide)
    for part in by_part(narrow, wide).values():
        assert part["same"] > 30
        assert (part["changed"], part["percent"]) == (0, 0)


def test_an_adapter_is_compared_in_either_spelling(
    train_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    short = ("train.samples=8", "adapter.type=lora", "adapter.rank=2")
    run = train(load_train_recipe(train_recipe("sdxl"), short), keeps_model=False).output
    kohya, peft = tmp_path / "kohya.safetensors", tmp_path / "peft.safetensors"
    export(Path(run), "lora-kohya", kohya)
    export(Path(run), "lora-diffusers", peft)
    for a, b, alphas in ((Path(run), kohya, 1), (kohya, peft, -1), (Path(run), peft, 0)):
        (unet,) = by_part(a, b).values()
        assert unet["same"] > 50
        assert unet["changed"] == 0
        alone = {-1: "only_a", 1: "only_b", 0: ""}[alphas]
        assert {k: unet[k] for k in ("only_a", "only_b") if unet[k]} == (
            {alone: unet["same"] // 2} if alone else {}
        )


def test_a_model_without_a_record_is_not_compared_key_by_key(
    evaluated_run: Path, tiny_model: Callable[[str], Path]
) -> None:
    said = call("diff", tiny_model("sd15"), evaluated_run).stdout
    assert "A holds no record of its training" in said
    assert "recipe." not in said
    assert "unet" in said


# --- push -----------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda s: None))
    monkeypatch.setattr(sdprep.hub_access, "WAITS_S", (0.0,) * 2)
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


def test_a_run_goes_to_the_hub_with_a_card(evaluated_run: Path, hub: HubServer) -> None:
    found = answered("push", evaluated_run, REPO, "--license", "openrail++")
    assert hub.repositories[REPO].private
    files = hub.files(REPO)
    assert {"README.md", "training.json", "model_index.json"} <= set(files)
    assert found["files"] == sorted(set(files) - {".gitattributes"})
    card = files["README.md"].decode()
    assert card.startswith("---\n")
    assert 'license: "openrail++"' in card
    assert "12 samples" in card
    assert json.loads(files["training.json"])["samples_seen"] == 12
    for text in (card, files["training.json"].decode()):
        assert str(evaluated_run.parent) not in text
    answered("push", evaluated_run / "model", REPO)  # again, from the folder: replaced


def test_public_is_not_made_private_and_bad_names_are_refused(
    evaluated_run: Path, hub: HubServer, tmp_path: Path
) -> None:
    answered("push", evaluated_run / "model", REPO, "--public")
    assert not hub.repositories[REPO].private
    refused = call("push", evaluated_run / "model", REPO)
    assert isinstance(refused.exception, UserError)
    assert "public" in str(refused.exception)
    assert isinstance(call("push", evaluated_run, "no-user").exception, UserError)
    assert isinstance(call("push", evaluated_run, REPO, "--license", "a\nb").exception, UserError)
    shutil.rmtree(tmp_path / "x", ignore_errors=True)
    assert isinstance(call("push", tmp_path / "x", REPO).exception, DataError)
