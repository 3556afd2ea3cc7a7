"""StableEval of any checkpoints on one probe, and each of them against the base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sdprep.console import say
from sdprep.errors import DataError
from sdtrain import checkpoint
from sdtrain.compare import Pair, compare_measured, text
from sdtrain.conditions import changes
from sdtrain.course import meant
from sdtrain.family import Family
from sdtrain.foreign import MODEL_INDEX, kind_of, read_deltas, with_adapter
from sdtrain.formats.tensor_files import is_single_file
from sdtrain.matrices import Measured
from sdtrain.outputs import require_folder
from sdtrain.probe import LossMatrix, Probe
from sdtrain.probe_sets import find_probes
from sdtrain.run import load_trained
from sdtrain.setup import Setup, open_setup
from sdtrain.stable_eval import DamagedModelError, ProbeSet

BASE = "base"
AVERAGE = "-ema"
"""What the name of a checkpoint ends with where its averaged weights are meant."""
SAME_LATENTS = 0.02
"""Latents of a picture that are no further apart, as a share: a tiny VAE rounded to fp16 moves its
own by 0.0004, to bf16 by 0.003, and an encoder 5 % stronger by 0.2."""
MAY_DIFFER = ("model.path", "model.revision", "model.gradient_checkpointing")
"""The fingerprint says whether it is the same model; the rest does not touch a forward."""


def validate_checkpoints(
    recipe: Any, paths: Sequence[Path], to: Path | None, *, ema: bool = False
) -> dict[str, Any]:
    """Measure the base model and some checkpoints on the recipe's probe.

    Args:
        recipe: a training recipe; its data and base model are used.
        paths: checkpoints of this recipe's model (`RUN/checkpoints/N`, or RUN for its newest),
            diffusers folders, single files, or LoRAs, which are put on the recipe's model.
        to: folder for `<probe_id>/<checkpoint>.npz`; default: the recipe's output with
            `-validate` behind it, so that a run's own record stays as it is.
        ema: also measure the average that each checkpoint holds, as `<checkpoint>-ema`.

    Returns:
        path, the table of means, and the comparisons with the base model.

    Raises:
        DataError: a checkpoint belongs to another model or holds no average that was asked for, or
            there is nothing to evaluate on.
    """
    folder = require_folder(to or recipe.output.with_name(f"{recipe.output.name}-validate"))
    paths = [_newest_of_run(meant(path)) for path in paths]
    labels, kinds = _labels(paths), [kind_of(path) for path in paths]
    states = [
        checked_state(p) if k == "checkpoint" else None for p, k in zip(paths, kinds, strict=True)
    ]
    if ema:
        _must_hold_averages(paths, kinds)
    setup = open_setup(recipe)
    for path, state in zip(paths, states, strict=True):
        if state is not None:
            must_fit(path, state, setup)
    probes = find_probes(setup, recipe.output / "validation")
    if not probes:
        raise DataError(
            "there is nothing to evaluate on",
            "validation.images and validation.train_probe_images are 0, or the data set is empty.",
        )
    for path, kind in zip(paths, kinds, strict=True):  # before an hour is spent on the others
        _must_be_measurable(setup, path, kind, probes)
    for probe_set in probes:
        probe_set.folder = probe_set.probe.save(folder)
    rows = _measure(BASE, probes)
    for label, path, kind in zip(labels, paths, kinds, strict=True):
        if kind == "model":
            rows += _measure(label, _other_model(setup, path, probes)[0])
            continue
        with loaded(setup, path) if kind == "checkpoint" else _adapted(setup, path):
            rows += _measure(label, probes)
        if ema:
            with loaded(setup, path, ema=True):
                rows += _measure(label + AVERAGE, probes)
    if ema:
        labels = [name for label in labels for name in (label, label + AVERAGE)]
    pairs = compare_measured(_with_base(probes, labels))
    return {"path": str(folder), "evaluations": rows, "comparisons": pairs}


def _measure(label: str, probes: Sequence[ProbeSet]) -> list[dict[str, Any]]:
    """Evaluate the model as it is; one row for each set."""
    rows = []
    for probe_set in probes:
        probe, folder = probe_set.probe, probe_set.folder
        assert folder is not None, "set above"
        matrix = _evaluated(label, probe_set)
        file = folder / f"{label}.npz"
        matrix.save(file, [image.id for image in probe.images])
        say(f"{label}: {probe.name} {matrix.mean:.6f}")
        rows.append(
            {
                "checkpoint": label,
                "set": probe.name,
                "probe_id": probe.probe_id,
                "mean": matrix.mean,
                "bins": matrix.bins(),
                "matrix": str(file),
            }
        )
    return rows


def _evaluated(label: str, probe_set: ProbeSet) -> LossMatrix:
    try:
        return probe_set.evaluate()
    except DamagedModelError as error:
        raise DataError(f"{label}: {error.message}", error.hint) from None


def _with_base(
    probes: Sequence[ProbeSet], labels: Sequence[str]
) -> list[tuple[Measured, Measured]]:
    return [
        (
            Measured(probe_set.folder / f"{BASE}.npz", probe_set.probe),
            Measured(probe_set.folder / f"{label}.npz", probe_set.probe),
        )
        for label in labels
        for probe_set in probes
        if probe_set.folder is not None
    ]


# --- checkpoints ---------------------------------------------------------------------------------


def _newest_of_run(path: Path) -> Path:
    """The newest checkpoint of a run folder; any other path as it is."""
    if (path / checkpoint.STATE).is_file() or (path / MODEL_INDEX).is_file():
        return path
    return (checkpoint.checkpoints(path / "checkpoints") or [path])[-1]


def _labels(paths: Sequence[Path]) -> list[str]:
    """A name for each: the run and the clock, or the folder; numbered where two are alike."""
    labels: list[str] = []
    for path in paths:
        full = path.resolve()
        name = full.name
        if full.is_file():
            name = full.stem
        if full.parent.name == "checkpoints":
            name = f"{full.parent.parent.name}-{full.name}"
        elif name == "model":  # what a run hands over at its end
            name = f"{full.parent.name}-model"
        number, label = 2, name
        while label in (*labels, BASE):
            number, label = number + 1, f"{name}-{number}"
        labels.append(label)
    return labels


def checked_state(path: Path) -> dict[str, Any] | None:
    """The state of a checkpoint; None of a diffusers folder.

    Raises:
        DataError: it is neither.
    """
    if (path / checkpoint.STATE).is_file():
        return checkpoint.read_state(path)
    if (path / MODEL_INDEX).is_file():
        return None
    raise DataError(
        f"{path} is no checkpoint: it has neither {checkpoint.STATE} nor {MODEL_INDEX}",
        "Give RUN/checkpoints/SAMPLES, or a diffusers folder such as RUN/model.",
    )


def _must_hold_averages(paths: Sequence[Path], kinds: Sequence[str]) -> None:
    """Before anything is measured: each path is a checkpoint that holds an average."""
    for path, kind in zip(paths, kinds, strict=True):
        if kind != "checkpoint":
            raise DataError(
                f"--ema: {path} is no checkpoint of a run, and only those hold averages",
                "Measure it without --ema.",
            )
        checkpoint.must_hold_average(path)


def must_fit(path: Path, state: dict[str, Any], setup: Setup) -> None:
    """The checkpoint's tensors must mean the same in this recipe's model."""
    saved, current = state["conditions"], setup.conditions()
    keys = ("model", "adapter", "model_fingerprint")
    differing = changes({k: saved[k] for k in keys}, {k: current[k] for k in keys})
    for key in MAY_DIFFER:
        differing.pop(key, None)
    if differing:
        lines = [f"  {key}: {old!r} there, {new!r} here" for key, (old, new) in differing.items()]
        raise DataError(
            f"{path} was made from another model than this recipe's:\n" + "\n".join(lines),
            "Use the recipe of that run.",
        )


@contextmanager
def loaded(setup: Setup, path: Path, *, ema: bool = False) -> Iterator[None]:
    """The checkpoint's tensors in the model; the base model's are put back afterwards."""
    saved = checkpoint.read_weights(path, ema=ema)
    places = {**setup.plan.frozen, **setup.plan.trained()}
    before = {key: places[key].detach().clone() for key in saved if key in places}
    try:
        load_trained(setup.plan, saved)
        yield
    finally:
        with torch.no_grad():
            for key, value in before.items():
                places[key].copy_(value)


@contextmanager
def _adapted(setup: Setup, path: Path) -> Iterator[None]:
    """A LoRA of anyone's in the base model, for a while.

    The recipe's own adapter is out of the way: DoRA would give the rows their old lengths back.
    """
    with (
        setup.adapter.taken_out(),
        with_adapter(setup.family, dict(setup.family.named_parameters()), path),
    ):
        yield


def _must_be_measurable(setup: Setup, path: Path, kind: str, probes: Sequence[ProbeSet]) -> None:
    """Open what others made, and let it go again; a checkpoint was looked at before."""
    if kind == "adapter":
        read_deltas(setup.family, dict(setup.family.named_parameters()), path)
    elif kind == "model":
        _, apart = _other_model(setup, path, probes)
        if apart:
            say(f"{path}: its VAE's latents are {100 * apart:.2g} % apart; the base model's serve")


def _other_model(
    setup: Setup, path: Path, probes: Sequence[ProbeSet]
) -> tuple[list[ProbeSet], float]:
    """The same probes, looking at another model, and how far its VAE's latents are apart."""
    model = setup.recipe.model
    if is_single_file(str(path)) and model.config is None and Path(model.path).is_dir():
        model = model.model_copy(update={"config": model.path})  # its sizes must be the same
    precision = setup.recipe.precision.mixed
    family = model.build(str(path), precision=precision, device=str(setup.device))
    sets, apart = [], 0.0
    for each in probes:
        other = ProbeSet(family, each.rows, each.probe, each.micro_batch, each.device)
        apart = max(apart, other.share_latents(each))
        _must_mean_the_same(path, family, setup, each.probe, apart)
        other.folder = each.folder
        sets.append(other)
    return sets, apart


def _must_mean_the_same(
    path: Path, family: Family, setup: Setup, probe: Probe, apart: float
) -> None:
    """A loss in another space, of another target or at other noise levels is another quantity.

    A VAE that was rounded to half precision, or whose decoder alone was trained on, makes the same
    space; the latents are the base model's then.

    Args:
        path: of the model.
        family: the model.
        setup: has the base model.
        probe: what is measured on.
        apart: how far the latents of the two are apart, as a share.
    """
    levels = torch.linspace(0, 1, 257, dtype=torch.float64)[:-1]
    same_noise = torch.equal(family.logsnr(levels), setup.family.logsnr(levels))
    found = (
        (not apart < SAME_LATENTS, f"has another VAE, with latents {100 * apart:.2g} % apart"),
        (
            family.prediction_type != probe.prediction_type,
            f"predicts {family.prediction_type}, which is not {probe.prediction_type}",
        ),
        (not same_noise, "has another noise schedule"),
    )
    for differs, what in found:
        if differs:
            raise DataError(
                f"{path} cannot be measured on the probe {probe.name}: it {what}",
                "Its losses are of another kind and cannot be compared with the base model's.",
            )


def report(found: dict[str, Any]) -> str:
    """What `sdtrain validate` prints."""
    rows, pairs = found["evaluations"], found["comparisons"]
    width = max(len(row["checkpoint"]) for row in rows)
    lines = [f"{row['checkpoint']:<{width}}  {row['set']:<11}  {row['mean']:.6f}" for row in rows]
    return "\n".join([*lines, "", text(pairs)]) if pairs else "\n".join(lines)


def to_json(found: dict[str, Any]) -> dict[str, Any]:
    """What `--json` prints."""
    pairs: list[Pair] = found["comparisons"]
    return {**found, "comparisons": [pair.to_json() for pair in pairs]}
