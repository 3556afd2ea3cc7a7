"""Find learning-rate bounds: a short run whose rate grows by the same factor every step.

Both probes are looked at every few steps. The run goes on where it stopped if it is interrupted;
its weights are thrown away at the end.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdprep.console import say, warn
from sdprep.errors import UserError
from sdprep.recipe import validate
from sdprep.seeding import digest
from sdtrain import lr_bounds
from sdtrain.freeze_plan import ParameterGroup
from sdtrain.launch import require_one_process
from sdtrain.lr_bounds import Bounds, Ramp, too_few
from sdtrain.probe import LossMatrix
from sdtrain.probe_sets import num_images
from sdtrain.recipe import MOST_LR, TrainRecipe
from sdtrain.run_folder import RunFolder
from sdtrain.setup import Setup, open_setup
from sdtrain.stable_eval import DamagedModelError
from sdtrain.toml_text import toml_text
from sdtrain.trackers.jsonl import read_metrics
from sdtrain.update import DivergedError

RESULT = "lr-find.json"
LOOK_SHARE = 0.035
BELOW, ABOVE = 30.0, 100.0
"""The ramp's default ends: so many times below and above the recipe's own rate."""

HALF_CYCLE_EPOCHS = 4
LOWEST_OF_CYCLE = 0.25


@dataclass(frozen=True)
class Range:
    """What is tried.

    Args:
        start: rate of the first step, of the largest group of the denoiser.
        end: rate of the last step.
        steps: optimizer steps.
    """

    start: float
    end: float
    steps: int


@dataclass(frozen=True)
class Planned:
    """What the recipe itself would do.

    Args:
        group: name of the largest group of the denoiser.
        lr: its rate.
        num_steps: optimizer steps of the run.
        epoch_samples: samples of one epoch.
    """

    group: str
    lr: float
    num_steps: int
    epoch_samples: int


def find_lr(
    recipe: TrainRecipe, *, start: float | None, end: float | None, steps: int, to: Path | None
) -> dict[str, Any]:
    """Run the ramp, read it, draw it and write recipes with the advised rates.

    Args:
        recipe: a training recipe; all its rates are scaled together.
        start: lowest rate of the largest group of the denoiser; default: a 30th of the recipe's.
        end: highest; default: 100 times the recipe's.
        steps: optimizer steps of the ramp.
        to: run folder of the ramp; default: the recipe's output with `-lr-find` behind it.

    Returns:
        what `--json` prints.

    Raises:
        UserError: the images do not fix a rate; says why. The plot and the record are written,
            but where there are too few images, which is said before anything is trained.
    """
    require_one_process("lr-find", "Start it without one; its ramp is short.")
    _require_rates(recipe.optimizer)
    if recipe.train.phases:
        warn("the ramp has no [[train.phases]]: all that the rules train does so together")
    planned = _planned(open_setup(recipe))  # the networks are let go again
    wanted = Range(
        planned.lr / BELOW if start is None else start,
        planned.lr * ABOVE if end is None else end,
        steps,
    )
    folder = RunFolder(to or recipe.output.with_name(f"{recipe.output.name}-lr-find"))
    trial = ramp_recipe(recipe, wanted, planned.lr, folder.path)
    plan = {"rate_of": planned.group, **asdict(wanted)}
    key = digest("lr find", json.dumps(trial.resolved(), sort_keys=True, default=str))
    broke_at = _known(folder.path / RESULT, key)
    if broke_at is None:
        broke_at = {"lr": _train(trial, folder, wanted)}
    ramp = read_ramp(folder, wanted, recipe.data.batch_size, broke_at["lr"])
    bounds = lr_bounds.find_bounds(ramp, recipe.seed)
    reasons = lr_bounds.refusals(bounds, ramp.validation.shape[1], ramp.train.shape[1])
    found = {
        "path": str(folder.path),
        "plan": plan,
        "bounds": bounds.to_json(),
        "refused": reasons,
        "advice": None if reasons else _advise(recipe, planned, bounds, folder.path),
        "first_look": float(ramp.lr[0]),
        "broke_at": broke_at["lr"],
        "key": key,
    }
    from sdtrain.lr_figure import draw

    draw(ramp, bounds, folder.path / "lr-find.png")
    (folder.path / RESULT).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    if reasons:
        raise UserError(
            "no learning rate can be advised: " + "; ".join(reasons),
            f"The curves are in {folder.path / 'lr-find.png'}, the numbers in {RESULT} beside it.",
        )
    return found


def _require_rates(optimizer: Any) -> None:
    """Refuse optimizers of which a ramp tells nothing, before anything is opened."""
    name = f"optimizer.type = {optimizer.type!r}"
    if getattr(optimizer, "finds_its_rates", False):
        raise UserError(
            f"{name} finds its learning rates itself",
            "Leave its rates at 1; lr-find is for the other optimizers.",
        )
    if "ramp" not in getattr(optimizer, "only_schedules", ("ramp",)):
        raise UserError(
            f"{name} cannot go with a rate that grows: an average over all rates would be measured",
            "Find the rates with another optimizer, such as --set optimizer.type=adamw, and try "
            "them and larger ones with sdtrain sweep.",
        )


def _planned(setup: Setup) -> Planned:
    """The run that the rates are for; all its rates are scaled together with the main one."""
    counts = num_images(setup)
    few = too_few(counts["validation"], counts["train_probe"])
    if few and setup.recipe.validation.probe is None:
        raise UserError(
            f"no learning rate could be advised: {'; '.join(few)}",
            "Hold out more images with sdprep split, and leave validation.images and "
            "validation.train_probe_images at that or above.",
        )
    denoiser = f"{setup.family.trainable_parts[0]}."

    def size(group: ParameterGroup) -> tuple[bool, int]:
        is_denoiser = any(path.startswith(denoiser) for path in group.parameters)
        return is_denoiser, sum(p.numel() for p in group.parameters.values())

    main = max(setup.plan.groups, key=size)
    return Planned(main.name, main.lr, setup.num_steps, setup.order.epoch_samples)


def ramp_recipe(recipe: TrainRecipe, wanted: Range, main_lr: float, output: Path) -> TrainRecipe:
    """The recipe of the ramp: as it was, but for length, schedule and what is kept.

    Raises:
        UserError: the ramp has no room.
    """
    if not 0 < wanted.start < wanted.end <= MOST_LR or wanted.end / wanted.start < 10:
        raise UserError(
            f"the ramp goes from {wanted.start:g} to {wanted.end:g}",
            "Give --from and --upto, at least a factor of 10 apart; 1,000 to 10,000 is usual. "
            f"No rate is above {MOST_LR:,.0f}.",
        )
    batch = recipe.data.batch_size
    every = max(2, round(LOOK_SHARE * wanted.steps)) * batch
    data = recipe.resolved()
    data["output"] = str(output)
    # The ramp has its own length, in which the turn of a part may never come.
    lengths = ("epochs", "schedule_samples", "phases", "repeat_phases")
    train = {key: value for key, value in data["train"].items() if key not in lengths}
    data["train"] = {**train, "samples": wanted.steps * batch}
    data["schedule"] = {
        "type": "ramp",
        "start_factor": wanted.start / main_lr,
        "end_factor": wanted.end / main_lr,
    }
    data["validation"] |= {"every_samples": every, "stop": None}  # it is to go on until it breaks
    data["sampling"]["prompts"] = []
    data["checkpoint"] = {
        **data["checkpoint"],
        "every_samples": max(1, wanted.steps // 4) * batch,
        "keep": 1,
    }
    return validate(data, TrainRecipe, "the recipe of the ramp")


def _train(trial: TrainRecipe, folder: RunFolder, wanted: Range) -> float | None:
    """Run the ramp; the rate at which a number was none any more, or None.

    Raises:
        UserError: it was interrupted.
    """
    from sdtrain.trainer import train

    try:
        outcome = train(trial, keeps_model=False)
    except (DivergedError, DamagedModelError) as error:
        last = _lines(folder, "train")
        if not last:
            raise
        warn(f"the ramp ends here: {error.message}")
        return rate_after(wanted, last[-1]["samples_seen"], trial.data.batch_size)
    if not outcome.is_finished:
        raise UserError("the ramp was stopped", "Run the same command again to go on.")
    return None


def _known(path: Path, key: str) -> dict[str, float | None] | None:
    """Where an earlier ramp of the very same recipe broke; None if there was none."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if earlier.get("key") != key:
        return None
    say(f"{path} is of this very recipe: its losses are read again")
    return {"lr": earlier["broke_at"]}


def rate_after(wanted: Range, samples_seen: int, batch_size: int) -> float:
    """The rate of the last step before a moment of the ramp."""
    step = -(-samples_seen // batch_size) - 1
    return wanted.start * (wanted.end / wanted.start) ** (step / wanted.steps)


def read_ramp(folder: RunFolder, wanted: Range, batch_size: int, broke_at: float | None) -> Ramp:
    """The losses that the run left on disk.

    Raises:
        UserError: there are not two sets of images, or no look after sample 0.
    """
    losses: dict[str, list[np.ndarray]] = {}
    clocks: list[int] = []
    for line in _lines(folder, "validation"):
        if line["set"] not in ("validation", "train_probe"):
            continue
        file = folder.validation / line["probe_id"] / f"{line['samples_seen']}.npz"
        losses.setdefault(line["set"], []).append(LossMatrix.load(file).weighted.mean(1))
        clocks.append(line["samples_seen"])
    if len(losses) < 2:
        raise UserError(
            "a ramp needs held-out images and training images to look at, "
            f"this data set and recipe give only: {', '.join(losses) or 'none'}",
            "Publish a validation split; leave validation.images and train_probe_images above 0.",
        )
    looks = sorted(set(clocks))[1:]
    if not looks:
        raise UserError("the ramp broke before the first look", "Lower --from.")
    rates = [rate_after(wanted, clock, batch_size) for clock in looks]
    growth = (wanted.end / wanted.start) ** (1 / wanted.steps)
    steps = [clock // batch_size for clock in looks]
    sums = [wanted.start * (growth**count - 1) / (growth - 1) for count in steps]
    return Ramp(
        lr=np.array(rates),
        effort=np.array(sums) * math.sqrt(batch_size),
        validation=np.stack(losses["validation"]),
        train=np.stack(losses["train_probe"]),
        broke_at=broke_at,
    )


def _lines(folder: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder.metrics) if line["kind"] == kind]


# --- advice --------------------------------------------------------------------------------------


def _advise(recipe: TrainRecipe, planned: Planned, bounds: Bounds, folder: Path) -> dict[str, Any]:
    """Rates, and recipes that carry them."""
    batch = recipe.data.batch_size
    lr, most = lr_bounds.advised_lr(bounds, planned.num_steps, batch)
    half = max(1, round(HALF_CYCLE_EPOCHS * planned.epoch_samples / batch)) * batch
    schedules: dict[str, tuple[float, dict[str, Any]]] = {
        "constant": (lr, {"type": "constant"}),
        "cyclical": (
            most,
            {"type": "cyclical", "half_cycle_samples": half, "min_factor": LOWEST_OF_CYCLE},
        ),
    }
    written = {}
    for name, (rate, schedule) in schedules.items():
        data = with_rates(recipe, rate / planned.lr, schedule)
        path = folder / f"recipe-{name}.toml"
        path.write_text(toml_text(data), encoding="utf-8", newline="\n")
        written[name] = {"path": str(path), "lr": rate, "fragment": fragment(data)}
    return {"lr": lr, "largest_lr": most, "recipes": written}


def with_rates(recipe: TrainRecipe, factor: float, schedule: dict[str, Any]) -> dict[str, Any]:
    """The recipe with every rate scaled and another schedule."""
    data = recipe.resolved()
    train = data["train"]
    if train.get("lr") is not None:
        train["lr"] = _rounded(train["lr"] * factor)
    for rule in train["rules"]:
        if rule.get("lr"):
            rule["lr"] = _rounded(rule["lr"] * factor)
    data["schedule"] = schedule
    return data


def fragment(data: dict[str, Any]) -> str:
    """Rates and schedule alone, to paste into a recipe."""
    train = {key: data["train"].get(key) for key in ("lr", "rules")}
    kept = {key: value for key, value in train.items() if value}
    return toml_text({"train": kept, "schedule": data["schedule"]})


def _rounded(lr: float) -> float:
    return float(f"{lr:.3g}")


def report(found: dict[str, Any]) -> str:
    """What `sdtrain lr-find` prints."""
    bounds, advice = found["bounds"], found["advice"]
    names = {
        "start": "learning starts at",
        "best": "lowest held-out loss at",
        "rise": "held-out loss rises at",
        "divergence": "training breaks at",
        "effort": "useful effort (sum of lr·√batch)",
    }
    width = max(map(len, names.values()))
    lines = [f"rates of {found['plan']['rate_of']}, with 80 % intervals over images"]
    if bounds["start"] and bounds["start"]["value"] <= found["first_look"]:
        lines.append("  (a tenth was learnt before the first look: a lower --from would show when)")
    for key, words in names.items():
        lines.append(f"  {words:<{width}}  {_interval(bounds[key])}")
    ended = {
        "effort": "learning ended because the training images had no more to give, not by the rate",
        "rate": "learning ended because the rate was too high",
        None: "the held-out loss did not rise again before training broke",
    }
    lines += [f"  {ended[bounds['limit']]}", ""]
    for name, entry in advice["recipes"].items():
        lines += [f"{name}: {entry['path']}", *_indented(entry["fragment"]), ""]
    lines.append(f"curves: {Path(found['path']) / 'lr-find.png'}")
    return "\n".join(lines)


def _interval(bound: dict[str, float | None] | None) -> str:
    if bound is None:
        return "not seen"
    high = "open" if bound["high"] is None else f"{bound['high']:.2g}"
    return f"{bound['value']:.2g}  ({bound['low']:.2g} … {high})"


def _indented(text: str) -> Sequence[str]:
    return [f"    {line}" if line else "" for line in text.strip().splitlines()]
