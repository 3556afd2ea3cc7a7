"""What `accelerate launch` was told is either what the recipe says, or an error, or said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sdprep.errors import UserError
from sdtrain.accelerate_env import require_agreement
from sdtrain.recipe import load_train_recipe

HERE = Path(__file__).resolve().parent
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


@pytest.mark.parametrize(
    ("settings", "env", "words"),
    [
        ([], DEEPSPEED, r'told --use_deepspeed.*"deepspeed"'),
        (["distributed.engine=fsdp2"], DEEPSPEED, "told --use_deepspeed"),
        ([], {"ACCELERATE_USE_FSDP": "true"}, r'told --use_fsdp.*"fsdp2"'),
        ([], {"ACCELERATE_USE_MEGATRON_LM": "true"}, "told --use_megatron_lm"),
        (
            ["distributed.engine=deepspeed", "distributed.zero_stage=1"],
            DEEPSPEED,
            "told --zero_stage 2.*zero_stage = 1",
        ),
        (
            ["distributed.engine=deepspeed"],
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"},
            "told --deepspeed_config_file ds.json",
        ),
        (
            ["distributed.engine=deepspeed"],
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "told --offload_optimizer_device cpu",
        ),
    ],
)
def test_what_contradicts_the_recipe_is_refused(
    train_recipe: Any, settings: list[str], env: dict[str, str], words: str
) -> None:
    recipe = load_train_recipe(train_recipe(), settings)
    with pytest.raises(UserError) as caught:
        require_agreement(recipe, env)
    message = f"{caught.value.message} {caught.value.hint}"
    assert re.search(words, message, re.DOTALL), message


def test_what_agrees_passes_in_silence(train_recipe: Any, capsys: Any) -> None:
    plain = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    require_agreement(load_train_recipe(train_recipe(), []), plain)
    asked = {
        **plain,
        **DEEPSPEED,
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    }
    require_agreement(load_train_recipe(train_recipe(), ["distributed.engine=deepspeed"]), asked)
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "false"}
    require_agreement(load_train_recipe(train_recipe(), ["distributed.engine=fsdp2"]), fsdp)
    assert not capsys.readouterr().err


def test_what_the_recipe_overrules_is_said(train_recipe: Any, capsys: Any) -> None:
    env = {
        "ACCELERATE_MIXED_PRECISION": "fp16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    }
    require_agreement(load_train_recipe(train_recipe(), []), env)
    said = capsys.readouterr().err
    for option in ("--mixed_precision fp16", "--gradient_accumulation_steps 4", "--dynamo_backend"):
        assert option in said


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--use_deepspeed", "--use_fsdp"])
def test_the_real_launcher_leaves_these_variables(
    train_recipe: Any, tmp_path: Path, option: str
) -> None:
    if option == "--use_deepspeed" and find_spec("deepspeed") is None:
        pytest.skip("accelerate does not take --use_deepspeed where deepspeed is not installed")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", option),
            *("--num_processes", "2", "-m", "sdtrain.cli", "run", str(train_recipe())),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode != 0
    assert f"accelerate launch was told {option}, but the recipe says" in done.stderr, done.stderr
