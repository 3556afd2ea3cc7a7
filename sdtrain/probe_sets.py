"""Which images a run is judged by: chosen, rendered and piloted once, at sample 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdprep.buckets import Bucket
from sdprep.console import warn
from sdprep.errors import DataError
from sdprep.prompts import PromptPolicy, validation_prompt
from sdprep.seeding import digest
from sdtrain.buckets import Assignment
from sdtrain.dataset import Rows
from sdtrain.family import Family
from sdtrain.forgetting import NAME, PromptOf, open_outside, open_path
from sdtrain.labels import labels_of
from sdtrain.lattice import FLAT, NUM_STRATA, PILOT_REPEATS, pilot_points, warp_from_pilot
from sdtrain.probe import PROBE_FILE, Probe, ProbeImage
from sdtrain.stable_eval import Point, ProbeSet
from sdtrain.tensor_hashes import tensor_hashes

if TYPE_CHECKING:
    from sdtrain.setup import Setup

_RECORDS_AT_ONCE = 256


def open_probes(
    setup: Setup,
    folder: Path,
    samples_seen: int = 0,
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> list[ProbeSet]:
    """The sets that a run is judged by, made at sample 0 and found again afterwards.

    Args:
        setup: the run; at sample 0 its model is what the pilot looks at.
        folder: `validation/` of the run.
        samples_seen: the clock.
        evaluations: validation lines so far; they name the probes that the run began with.

    Raises:
        DataError: the run has started and its probe is gone, or a set has no usable image.
    """
    begun = {str(line["set"]): str(line["probe_id"]) for line in evaluations}
    sets = []
    for rows, plain in _wanted(setup, folder, samples_seen, is_run=True):
        known = partial(_known, setup, folder, plain, begun.get(plain.name), samples_seen)
        probe = setup.world.on_main(known)
        found = _set(setup, rows, probe or _piloted(setup, rows, plain))
        found.folder = setup.world.on_main(partial(found.probe.save, folder))
        clocks = [line["samples_seen"] for line in evaluations if line["set"] == plain.name]
        found.history = setup.world.on_main(partial(found.read_history, clocks))
        sets.append(found)
    return sets


def _known(
    setup: Setup, folder: Path, plain: Probe, probe_id: str | None, samples_seen: int
) -> Probe | None:
    return _shared(setup, plain) or _begun(folder, plain, probe_id, samples_seen)


def find_probes(setup: Setup, folder: Path) -> list[ProbeSet]:
    """The sets of a recipe whose run may or may not have begun; nothing is written.

    Args:
        setup: its model is the base model.
        folder: `validation/` of the run; a probe there that fits the recipe is taken.
    """
    sets = []
    for rows, plain in _wanted(setup, folder, 0, is_run=False):
        there = [Probe.load(path) for path in sorted(folder.glob(f"*/{PROBE_FILE}"))]
        fitting = [probe for probe in there if replace(probe, warp=FLAT) == plain]
        probe = _shared(setup, plain) or (fitting[0] if fitting else _piloted(setup, rows, plain))
        sets.append(_set(setup, rows, probe))
    return sets


def _wanted(
    setup: Setup, folder: Path, samples_seen: int, *, is_run: bool
) -> Iterator[tuple[Rows, Probe]]:
    """Rows and unwarped probe of every set that the recipe asks for and the data set has."""
    wanted = setup.recipe.validation
    for name, rows, assignment, count in _splits(setup):
        if not count:
            continue
        if rows is None or assignment is None or not len(assignment.kept):
            warn(f"the data set has no {name} images, so nothing is evaluated on that set")
            continue
        yield rows, _plain(name, setup, rows, assignment, count)
    if wanted.forgetting is not None:
        out = open_outside(setup, folder, samples_seen, is_run=is_run)
        count = wanted.forgetting.images
        yield out.rows, _plain(NAME, setup, out.rows, out.assignment, count, out.prompt_of)


def _splits(setup: Setup) -> tuple[tuple[str, Rows | None, Assignment | None, int], ...]:
    """Name, rows, usable rows and wanted images of the sets that a data set's splits give."""
    wanted = setup.recipe.validation
    return (
        ("validation", setup.data.validation, setup.validation, wanted.images),
        ("train_probe", setup.data.train, setup.train, wanted.train_probe_images),
    )


def num_images(setup: Setup) -> dict[str, int]:
    """How many images each set would have, before anything is measured.

    Raises:
        DataError: what is to be seen of forgetting cannot be opened.
    """
    found = {
        name: _num_chosen(rows, assignment, count) if rows and assignment else 0
        for name, rows, assignment, count in _splits(setup)
    }
    forgetting = setup.recipe.validation.forgetting
    if forgetting is not None and forgetting.path is None:
        found[NAME] = forgetting.images  # to be drawn
    elif forgetting is not None:
        outside = open_path(setup, forgetting)
        found[NAME] = _num_chosen(outside.rows, outside.assignment, forgetting.images)
    return found


def _num_chosen(rows: Rows, assignment: Assignment, most: int) -> int:
    """How many `_choose` finds: whatever the order, one of each group until there are enough."""
    seen: set[str] = set()
    for _, part in _in_parts(rows, assignment, np.arange(len(assignment.kept))):
        seen.update(part)
        if len(seen) >= most:
            return most
    return len(seen)


def _set(setup: Setup, rows: Rows, probe: Probe) -> ProbeSet:
    micro_batch = setup.recipe.data.micro_batch_size
    return ProbeSet(setup.family, rows, probe, micro_batch, setup.device, setup.world)


def _piloted(setup: Setup, rows: Rows, plain: Probe) -> Probe:
    return with_pilot(ProbeSet(setup.family, rows, plain, 1, setup.device, setup.world))


def _plain(
    name: str,
    setup: Setup,
    rows: Rows,
    assignment: Assignment,
    count: int,
    prompt_of: PromptOf | None = None,
) -> Probe:
    """What the recipe asks for, before the pilot."""
    levels = setup.recipe.validation.timesteps_per_image
    return plain_probe(
        name,
        setup.family,
        rows,
        assignment,
        setup.data.policy,
        seed=setup.evaluation_seed,
        num_images=count,
        num_levels=None if levels == "auto" else int(levels),
        prompt_of=prompt_of,
    )


def _shared(setup: Setup, plain: Probe) -> Probe | None:
    """The probe that the recipe names, if it is one of this set."""
    path = setup.recipe.validation.probe
    shared = None if path is None else Probe.load(Path(path))
    if shared is None or shared.name != plain.name:
        return None
    _must_fit(shared, plain, f"validation.probe = {path!r}")
    return shared


def _begun(folder: Path, plain: Probe, probe_id: str | None, samples_seen: int) -> Probe | None:
    """The probe that this run began with; None if it is about to begin.

    An accepted change of data or recipe does not move it: its images, prompts and levels stay, so
    that the curve goes on.
    """
    if samples_seen == 0:
        return None
    if probe_id is None:
        raise DataError(
            f"this run was not evaluated on the set {plain.name} from its start",
            "Its change since sample 0 is unknown; leave the set out, or start the run afresh.",
        )
    path = folder / probe_id / PROBE_FILE
    if not path.is_file():
        raise DataError(
            f"{path} is gone",
            "It is made at sample 0 and needed to go on; put it back, or start the run afresh.",
        )
    probe = Probe.load(path)
    _must_fit(probe, plain, str(path))
    if replace(probe, warp=FLAT) != plain:
        warn(f"the set {plain.name} stays as it was at sample 0, so that the curve goes on")
    return probe


def _must_fit(shared: Probe, plain: Probe, where: str) -> None:
    """A probe of another run must look through the same networks."""
    for key in ("family", "prediction_type", "precision", "vae_hash"):
        found, expected = getattr(shared, key), getattr(plain, key)
        if found != expected:
            raise DataError(
                f"{where}: made with {key} {found}, this run has {expected}",
                "Numbers of the two could not be compared.",
            )


def usual_levels(num_images: int) -> int:
    """Noise levels per image where the recipe leaves it open."""
    return 16 if num_images < 16 else 4


def plain_probe(
    name: str,
    family: Family,
    rows: Rows,
    assignment: Assignment,
    policy: PromptPolicy,
    *,
    seed: int,
    num_images: int,
    num_levels: int | None,
    prompt_of: PromptOf | None = None,
) -> Probe:
    """Choose images and render their prompts; the levels are not warped yet.

    Images are those of the lowest keyed rank, one of each group of near duplicates, so that images
    added elsewhere leave a probe alone and row order does not matter.

    Args:
        name: the set.
        family: the model.
        rows: the split.
        assignment: buckets of its usable rows.
        policy: prompts are rendered once, without noise.
        seed: of the evaluation.
        num_images: at most; fewer if the split has fewer.
        num_levels: noise levels per image; None: 4, or 16 with fewer than 16 images.
        prompt_of: how prompts are made instead of by the policy.
    """
    chosen = _choose(name, rows, assignment, seed, num_images)
    numbers = [row for row, _ in chosen]
    records = rows.records(numbers)
    images = tuple(
        ProbeImage(
            rows.ids[row],
            prompt_of(record) if prompt_of else validation_prompt(record, policy, seed),
            bucket.size_hw,
        )
        for (row, bucket), record in zip(chosen, records, strict=True)
    )
    return Probe(
        name=name,
        seed=seed,
        images=images,
        num_levels=num_levels or usual_levels(len(images)),
        warp=FLAT,
        family=family.name,
        prediction_type=family.prediction_type,
        precision=family.precision,
        vae_hash=vae_hash(family),
        labels=labels_of(rows, numbers),
    )


def vae_hash(family: Family) -> str:
    """Hash of the tensors that make latents of pictures."""
    tensors = sorted(family.parts["vae"].state_dict().items())
    return digest("vae", *tensor_hashes(tensors).values())


def with_pilot(plain: ProbeSet) -> Probe:
    """Find out where the loss is, with 64 forwards one by one, and warp the levels to it.

    One by one, so that the warp is the same for every micro-batch.
    """
    probe = plain.probe
    which, levels = pilot_points(probe.seed, probe.name, len(probe.images))
    points = [
        Point(int(image), float(u), "pilot noise", k)
        for k, (image, u) in enumerate(zip(which, levels, strict=True))
    ]
    means = plain.losses(points, 1).reshape(NUM_STRATA, PILOT_REPEATS).mean(1)
    return replace(probe, warp=warp_from_pilot(means))


def _choose(
    name: str, rows: Rows, assignment: Assignment, seed: int, num_images: int
) -> list[tuple[int, Bucket]]:
    """(row, bucket) of the images with the lowest keyed rank, one of each group."""
    ranks = rows.ids.ranks(seed, "probe", name)[assignment.kept]
    by_rank = np.argsort(ranks, kind="stable")
    seen: set[str] = set()
    chosen: list[tuple[int, Bucket]] = []
    for places, groups in _in_parts(rows, assignment, by_rank):
        for place, group in zip(places, groups, strict=True):
            if group not in seen and len(chosen) < num_images:
                seen.add(group)
                bucket = assignment.buckets[assignment.bucket_of[place]]
                chosen.append((int(assignment.kept[place]), bucket))
        if len(chosen) == num_images:
            break
    return chosen


def _in_parts(
    rows: Rows, assignment: Assignment, order: np.ndarray
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Some places of usable rows at a time, and the group of near duplicates of each."""
    for start in range(0, len(order), _RECORDS_AT_ONCE):
        places = order[start : start + _RECORDS_AT_ONCE]
        kept = assignment.kept[places].tolist()
        records = rows.records(kept)
        ids = rows.ids.at(kept)
        yield places, [each.get("group_id") or id_ for each, id_ in zip(records, ids, strict=True)]
