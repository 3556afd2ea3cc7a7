"""StableEval: only the model may move the number.

The same images, prompts, noise and noise levels every time; always the unweighted mean squared
error over the whole picture, uniform in u, whatever loss and masks training uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdprep.buckets import Bucket
from sdprep.console import warn
from sdprep.errors import DataError
from sdtrain.ahead import expect
from sdtrain.batch import Batch, MicroConditioning
from sdtrain.dataset import Rows
from sdtrain.family import Family
from sdtrain.labels import extremes, groups
from sdtrain.losses.mse import mse
from sdtrain.noise import noise_for
from sdtrain.paired import compare, side
from sdtrain.pixels import evaluation_view
from sdtrain.probe import LossMatrix, Probe
from sdtrain.resolution import expected_from
from sdtrain.step import denoising_loss
from sdtrain.world import ALONE, World

FORWARDS_AHEAD = 16
"""Forwards whose pictures are announced, where these come over a network."""
MOST_GROUPS = 8
"""Tags that a validation line names at either end."""


NO_INTERVAL = "cannot tell: no interval"


class DamagedModelError(DataError):
    """A model whose loss on a probe is no number."""


@dataclass(frozen=True)
class Point:
    """One forward: an image at a noise level, with noise of its own key."""

    image: int
    u: float
    noise_purpose: str
    noise_index: int


class ProbeSet:
    """One set of images that is evaluated again and again.

    Args:
        family: the model; evaluated as it is at each call.
        rows: the split that the images come from.
        probe: what is evaluated.
        micro_batch: samples per forward; changes the speed only.
        device: of the networks.
        world: the processes that evaluate together; each takes a share of the images.
    """

    def __init__(
        self,
        family: Family,
        rows: Rows,
        probe: Probe,
        micro_batch: int,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        self.family, self.rows, self.probe = family, rows, probe
        self.micro_batch, self.device, self.world = micro_batch, device, world
        self.folder: Path | None = None  # where matrices go
        self.history: dict[int, np.ndarray] = {}  # clock to weighted losses of this run
        self._row_of = rows.ids.rows_of(image.id for image in probe.images)
        missing = [image.id for image in probe.images if image.id not in self._row_of]
        if missing:
            raise DataError(
                f"the probe {probe.name} needs image {missing[0]}, which the data set lacks",
                "A probe can be reused only on the data set that holds its images.",
            )
        self._latents: dict[int, Tensor] = {}  # the VAE never trains, so once is enough
        self._micro: dict[int, MicroConditioning] = {}

    def evaluate(self) -> LossMatrix:
        """Measure the loss of the model as it is now."""
        n, m = self.probe.shape
        u = self.probe.u()
        points = [Point(i, float(u[i, j]), "noise", j) for i in range(n) for j in range(m)]
        loss = self.losses(points, self.micro_batch).reshape(n, m)
        return LossMatrix(loss, u, self.probe.density())

    def share_latents(self, other: ProbeSet) -> float:
        """Look at the latents that another set of the same probe made, or will make.

        Returns:
            how far those that this set's own model makes of the first image are from them: the
            length of the difference over theirs; infinite if they are of another size.
        """
        mine, theirs = self._encoded(0), other._encoded(0)
        self._latents, self._micro = other._latents, other._micro
        if mine.shape != theirs.shape:
            return float("inf")
        return float((mine - theirs).norm() / theirs.norm())

    def read_history(self, clocks: Iterable[int]) -> dict[int, np.ndarray]:
        """The matrices of earlier evaluations; the verdict looks at all of them."""
        assert self.folder is not None, "open_probes says where matrices go"
        history: dict[int, np.ndarray] = {}
        for clock in clocks:
            path = self.folder / f"{clock}.npz"
            if path.is_file():
                history[clock] = LossMatrix.load(path).weighted
            else:
                warn(f"{path} is gone: the verdict goes without the evaluation at {clock:,}")
        return history

    def losses(self, points: Sequence[Point], micro_batch: int) -> np.ndarray:
        """(len(points),) float32 raw losses, in the order of the points.

        Every process runs equally many forwards; where one has fewer, it repeats one and lets go
        of the result.
        """
        shares = [
            list(self._groups(points, self.world.share(len(self.probe.images), rank), micro_batch))
            for rank in range(self.world.size)
        ]
        mine, most = shares[self.world.rank], max(map(len, shares))
        sums_and_counts = torch.zeros(2, len(points))
        with evaluation_mode(self.family), torch.no_grad():
            forwards = mine + [mine[0] if mine else [0]] * (most - len(mine))
            for turn, group in enumerate(forwards):
                self._expect(points, forwards[turn : turn + FORWARDS_AHEAD])
                batch, latents = self._batch([points[at] for at in group])
                losses = denoising_loss(self.family, batch, mse, latents=latents)
                sums_and_counts[0, group] = losses.float().cpu()
                sums_and_counts[1, group] = float(bool(mine))
        if not mine:
            sums_and_counts.zero_()
        sums, counts = self.world.add_up(sums_and_counts)
        assert bool((counts == 1).all()), "every point is measured by one process"
        found = (sums / counts).numpy()
        if not np.isfinite(found).all():
            bad = points[int(np.flatnonzero(~np.isfinite(found))[0])]
            raise DamagedModelError(
                f"the loss of {self.probe.images[bad.image].id} at u = {bad.u:.4f} is not finite",
                "The model is damaged, or the precision is too low for it: in training, try a "
                "lower learning rate, a warm-up, or another precision.mixed.",
            )
        return found

    def _groups(self, points: Sequence[Point], images: range, size: int) -> Iterator[list[int]]:
        """Indices of some images' points that can share a forward: one bucket, one text length."""
        groups: dict[tuple[tuple[int, int], int], list[int]] = {}
        for at, point in enumerate(points):
            if point.image not in images:
                continue
            image = self.probe.images[point.image]
            key = (image.bucket_hw, self.family.num_chunks(image.prompt))
            groups.setdefault(key, []).append(at)
        for group in groups.values():
            for start in range(0, len(group), size):
                yield group[start : start + size]

    def _batch(self, points: Sequence[Point]) -> tuple[Batch, Tensor]:
        images = [self.probe.images[point.image] for point in points]
        latents = torch.stack([self._encoded(point.image) for point in points])
        seed = self.probe.seed
        noise = [
            noise_for(seed, p.noise_purpose, image.id, p.noise_index, latents.shape[1:])
            for p, image in zip(points, images, strict=True)
        ]
        batch = Batch(
            ids=[image.id for image in images],
            visits=[0] * len(points),
            pixels=torch.empty(len(points), 0),  # the latents stand in for them
            prompts=[image.prompt for image in images],
            micro=[self._micro[point.image] for point in points],
            noise=torch.stack(noise),
            u=torch.tensor([point.u for point in points], dtype=torch.float64),
        )
        return batch.to(self.device), latents

    def _expect(self, points: Sequence[Point], groups: Sequence[Sequence[int]]) -> None:
        """Announce the pictures of the next forwards, as far as they are not encoded yet."""
        images = dict.fromkeys(points[at].image for group in groups for at in group)
        new = [self.probe.images[image].id for image in images if image not in self._latents]
        expect(self.rows, [self._row_of[id_] for id_ in new])

    def _encoded(self, index: int) -> Tensor:
        """Scaled latents of one image, (C, h, w), encoded alone: no batch mate can change them."""
        if index not in self._latents:
            image = self.probe.images[index]
            height, width = image.bucket_hw
            picture = self.rows.image(self._row_of[image.id])
            pixels, self._micro[index] = evaluation_view(picture, Bucket(width, height))
            self._latents[index] = self.family.encode_images(pixels[None].to(self.device))[0]
        return self._latents[index]


def evaluate(probe_set: ProbeSet, samples_seen: int, variant: str = "") -> dict[str, Any]:
    """Evaluate the model as it is, keep the matrix on disk, and compare it with sample 0.

    Args:
        probe_set: what is evaluated.
        samples_seen: the clock.
        variant: which other weights of the run are in the model, such as `ema`. Their matrices lie
            in `<variant>/<probe_id>/` beside those of the run itself.

    Returns:
        the validation line for `metrics.jsonl`.

    Raises:
        DataError: the matrix of sample 0 is gone.
    """
    matrix = probe_set.evaluate()
    if not variant:
        probe_set.history[samples_seen] = matrix.weighted
    return probe_set.world.on_main(lambda: _keep(probe_set, matrix, samples_seen, variant))


def _keep(
    probe_set: ProbeSet, matrix: LossMatrix, samples_seen: int, variant: str
) -> dict[str, Any]:
    """Write the matrix; the line of the metrics."""
    assert probe_set.folder is not None, "open_probes says where matrices go"
    probe, folder = probe_set.probe, probe_set.folder
    place = probe.save(folder.parent / variant) if variant else folder
    matrix.save(place / f"{samples_seen}.npz", [image.id for image in probe.images])
    start = matrix if samples_seen == 0 else LossMatrix.load(folder / "0.npz")
    change = compare(start.weighted, matrix.weighted, matrix.u)
    n, m = probe.shape
    return {
        "kind": "validation",
        "samples_seen": samples_seen,
        "set": f"{probe.name}_{variant}" if variant else probe.name,
        "images": n,
        "timesteps_per_image": m,
        "mean": matrix.mean,
        "change_percent": change.change_percent,
        "ci95_percent": change.ci95_percent,
        "ci95_new_images_percent": change.ci95_new_images_percent,
        # sample 0 compared with itself says nothing about what can be resolved
        "resolves_percent": change.resolves_percent if samples_seen else None,
        "resolves_new_images_percent": (
            change.resolves_new_images_percent if samples_seen else None
        ),
        "resolves_percent_expected": (
            None if samples_seen else expected_from(start.weighted, start.u)
        ),
        "bins": _bins(matrix, start),
        **breakdown(probe, start, matrix, samples_seen),
        "probe_id": probe.probe_id,
    }


def _bins(matrix: LossMatrix, start: LossMatrix) -> list[dict[str, float | None]]:
    """Ten bins of u: the loss, and how it compares with sample 0."""
    found = []
    for k, (now, then) in enumerate(zip(matrix.bins(), start.bins(), strict=True)):
        relative = now / then if now is not None and then else None
        found.append({"from": k / 10, "to": (k + 1) / 10, "loss": now, "relative": relative})
    return found


def breakdown(
    probe: Probe, start: LossMatrix, matrix: LossMatrix, samples_seen: int
) -> dict[str, Any]:
    """`tags` and `sources` that moved most since sample 0; nothing where a probe has none."""
    if not samples_seen:
        return {}
    found = groups(start.weighted, matrix.weighted, probe.labels, start.u)
    kinds = {"tags": extremes(found, "tag", MOST_GROUPS), "sources": extremes(found, "source", 99)}
    return {name: [each.to_json() for each in of] for name, of in kinds.items() if of}


def verdict(lines: Sequence[dict[str, Any]]) -> str:
    """What the newest evaluation of both sets says, in a word.

    Args:
        lines: validation lines of one moment, at most one for each set.
    """
    moved = {line["set"]: side(line["ci95_percent"]) for line in lines}
    held_out, seen = moved.get("validation"), moved.get("train_probe")
    if held_out is None:
        return "no validation images: cannot tell learning from memorising"
    if any(x["set"] == "validation" and x["ci95_percent"] is None for x in lines):
        return NO_INTERVAL
    if held_out < 0:
        return "learning"
    if held_out > 0 and seen is not None and seen < 0:
        return "memorising"
    if held_out > 0:
        return "diverging" if seen is None or seen > 0 else "getting worse"
    return "flat"


@contextmanager
def evaluation_mode(family: Family) -> Iterator[None]:
    """Networks in eval mode; every module gets its own mode back, whatever happens."""
    parts = family.parts.values()
    modes = [(module, module.training) for part in parts for module in part.modules()]
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
