"""Models of several checkpoints in turn: networks are loaded once, only what trained is swapped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdprep.errors import DataError, UserError
from sdprep.recipe import validate
from sdprep.seeding import digest
from sdtrain import checkpoint
from sdtrain.family import Family
from sdtrain.freeze_plan import FreezePlan
from sdtrain.recipe import TrainRecipe
from sdtrain.run import load_trained
from sdtrain.sampling import checkpoint_folder
from sdtrain.setup import open_model, pick_device
from sdtrain.validate import BASE, MODEL_INDEX


@dataclass(frozen=True)
class Candidate:
    """A model that can be put in place.

    Args:
        label: what people call it.
        recipe: the run's, or that of the checkpoint beside which it is shown.
        path: checkpoint or diffusers folder; None is the recipe's base model.
        is_folder: whether the path is a diffusers folder.
        samples_seen: the clock of a checkpoint.
        base: fingerprint of the model that a checkpoint was trained from.
        is_average: whether the averaged weights of a checkpoint are meant.
    """

    label: str
    recipe: TrainRecipe
    path: Path | None = None
    is_folder: bool = False
    samples_seen: int | None = None
    base: str | None = None
    is_average: bool = False


def candidates(paths: Sequence[Path], *, ema: bool = False) -> list[Candidate]:
    """Checkpoints, runs (their newest checkpoint), diffusers folders and the word `base`.

    Args:
        paths: what people named.
        ema: whether the averaged weights of checkpoints are meant.

    Raises:
        UserError: one of them is none of that, or none is a checkpoint that says how to draw.
    """
    found: list[Candidate | Path] = [
        path if _is_base(path) or (path / MODEL_INDEX).is_file() else of_checkpoint(path, ema=ema)
        for path in paths
    ]
    recipe = next((each.recipe for each in found if isinstance(each, Candidate)), None)
    if recipe is None:
        raise UserError(
            "there is no checkpoint of a run among them, which would say how to draw",
            "Give at least one RUN or RUN/checkpoints/SAMPLES beside base models.",
        )
    rows = [each if isinstance(each, Candidate) else _other(each, recipe) for each in found]
    labels = [row.label for row in rows]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(f"{twice[0]} is given twice", "Each row is drawn once.")
    return rows


def _is_base(path: Path) -> bool:
    return str(path) == BASE and not path.exists()


def _other(path: Path, recipe: TrainRecipe) -> Candidate:
    if _is_base(path):
        return Candidate(BASE, recipe)
    full = path.resolve()
    label = f"{full.parent.name}/{full.name}" if full.name == "model" else full.name
    return Candidate(label, recipe, path, is_folder=True)


def of_checkpoint(path: Path, *, ema: bool = False) -> Candidate:
    """A checkpoint of a run, or a run's newest.

    Raises:
        DataError: it is neither, is damaged or gone, or holds no average that was asked for.
    """
    found = checkpoint_folder(path)
    if ema:
        checkpoint.must_hold_average(found)
    state = checkpoint.read_state(found)
    full, clock = found.resolve(), int(state["samples_seen"])
    return Candidate(
        label=f"{full.parent.parent.name} @ {clock:,}{' average' if ema else ''}",
        recipe=validate(state["recipe"], TrainRecipe, str(found / checkpoint.STATE)),
        path=found,
        samples_seen=clock,
        base=state["conditions"].get("model_fingerprint"),
        is_average=ema,
    )


class InTurn:
    """Holds one set of networks, and puts one model after the other into it.

    Args:
        device: where; None is what each recipe says.
    """

    def __init__(self, device: str | None = None) -> None:
        self.device = device
        self._key = ""
        self._family: Family | None = None
        self._plan: FreezePlan | None = None
        self._base = ""
        self._home: dict[str, torch.Tensor] = {}  # the base model's tensors under what was swapped

    def family(self, row: Candidate) -> Family:
        """The networks with the tensors of a row; what was returned before is that row from now on.

        Raises:
            DataError: a file is missing or damaged, or the base model has changed since.
        """
        if row.is_folder:
            return self._open_folder(row)
        # Read before anything is touched: a file may be gone.
        tensors = {}
        if row.path is not None:
            tensors = checkpoint.read_weights(row.path, ema=row.is_average)
        self._open(row.recipe)
        assert self._plan is not None
        assert self._family is not None
        if row.base not in (None, self._base):
            raise DataError(
                f"{row.path} was trained from another model than {row.recipe.model.path} is now",
                "Put back the base model that the run was made with.",
            )
        places = {**self._plan.frozen, **self._plan.trained()}
        for key in tensors.keys() - self._home.keys() & places.keys():
            self._home[key] = places[key].detach().to("cpu", copy=True)
        back = {key: value for key, value in self._home.items() if key not in tensors}
        load_trained(self._plan, {**back, **tensors})
        return self._family

    def _open(self, recipe: TrainRecipe) -> None:
        key = _what_is_loaded(recipe)
        if key == self._key:
            return
        self._forget()
        family, _, hashes, plan = open_model(recipe, self._device(recipe))
        self._family, self._plan, self._key = family, plan, key
        self._base = digest("model", *sorted(hashes.items()))

    def _open_folder(self, row: Candidate) -> Family:
        self._forget()
        recipe = row.recipe
        self._family = recipe.model.build(
            str(row.path),
            precision=recipe.precision.mixed,
            device=str(self._device(recipe)),
        )
        return self._family

    def _device(self, recipe: TrainRecipe) -> torch.device:
        return pick_device(self.device or recipe.precision.device)

    def _forget(self) -> None:
        """Let go of the networks before others are loaded: two sets may not fit."""
        self._family, self._plan, self._key, self._home = None, None, "", {}


def _what_is_loaded(recipe: TrainRecipe) -> str:
    """All of a recipe that decides which networks there are and which tensors may be swapped."""
    train = recipe.train
    rules = [(rule.match, rule.freeze or not rule.lr) for rule in train.rules]
    known: dict[str, Any] = {
        "model": recipe.model.model_dump(mode="json"),
        "adapter": recipe.adapter.model_dump(mode="json"),
        "rules": [rules, bool(train.lr), train.preset],
        "precision": recipe.precision.model_dump(mode="json"),
    }
    return json.dumps(known, sort_keys=True)
