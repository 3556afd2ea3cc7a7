"""What `accelerate launch` was told besides how many processes: the recipe has the last word.

Accelerate leaves its options in the environment of the processes, for code that is built on it.
Ours is not, so nothing would come of them; what contradicts the recipe is refused, or said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdprep.console import warn
from sdprep.errors import UserError

ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": ("--use_deepspeed", "deepspeed"),
    "ACCELERATE_USE_FSDP": ("--use_fsdp", "fsdp2"),
    "ACCELERATE_USE_MEGATRON_LM": ("--use_megatron_lm", None),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("--use_parallelism_config", None),
}
"""Variable to the option that sets it, and our engine of that kind."""

NEVER = {
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "--deepspeed_config_file",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "--offload_optimizer_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "--offload_param_device",
    "FSDP_OFFLOAD_PARAMS": "--fsdp_offload_params",
}
"""Variable to an option that we have no counterpart of."""

STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
NOTHING = ("", "none", "no", "false", "0")


def require_agreement(recipe: Any, env: Mapping[str, str]) -> None:
    """Compare a recipe with what `accelerate launch` was told.

    Raises:
        UserError: it was told another engine than the recipe's, or what no engine does.
    """
    engine = recipe.distributed.engine
    for name, (option, ours) in ENGINES.items():
        if _is_asked(env, name) and ours != engine:
            raise UserError(
                f"accelerate launch was told {option}, but the recipe says "
                f"distributed.engine = {engine!r}",
                f"Leave out {option}"
                + (f', or set distributed.engine = "{ours}" (--set works, too).' if ours else "."),
            )
    for name, option in NEVER.items():
        if _is_asked(env, name):
            raise UserError(
                f"accelerate launch was told {option} {env[name]}, which nothing here reads",
                "Leave it out; [distributed] of the recipe says what an engine does.",
            )
    if engine == "deepspeed" and _is_asked(env, STAGE):
        stage = recipe.distributed.zero_stage
        if env[STAGE] != str(stage):
            raise UserError(
                f"accelerate launch was told --zero_stage {env[STAGE]}, but the recipe says "
                f"distributed.zero_stage = {stage}",
                "Let both say the same.",
            )
    _say_what_is_not_used(recipe, env)


def _say_what_is_not_used(recipe: Any, env: Mapping[str, str]) -> None:
    mixed = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("no", recipe.precision.mixed):
        warn(
            f"accelerate launch was told --mixed_precision {mixed}; the recipe's precision.mixed "
            f"= {recipe.precision.mixed} is used"
        )
    if env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", "auto"):
        warn(
            "accelerate launch was told --gradient_accumulation_steps "
            f"{env['ACCELERATE_GRADIENT_ACCUMULATION_STEPS']}; it follows from data.batch_size, "
            "data.micro_batch_size and the number of processes"
        )
    if env.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        warn("accelerate launch was told --dynamo_backend; the recipe's compile.mode is used")


def _is_asked(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").lower() not in NOTHING
