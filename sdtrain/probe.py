"""A probe: everything that fixes a StableEval number, in one file with a name of its own.

Two numbers may be compared if, and only if, they come from the same probe.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from sdprep.errors import DataError
from sdprep.seeding import digest
from sdtrain.labels import Labels
from sdtrain.lattice import Warp, lattice

PROBE_VERSION = 1
PROBE_FILE = "probe.json"


@dataclass(frozen=True)
class ProbeImage:
    """One image of a probe, as it is shown to the model every time."""

    id: str
    prompt: str  # rendered once, without noise
    bucket_hw: tuple[int, int]  # scaled to cover this size, then cropped at the centre


@dataclass(frozen=True)
class Probe:
    """Images, prompts, noise levels and networks of one series of numbers.

    Args:
        name: the set: validation, train_probe or forgetting.
        seed: of the evaluation.
        images: in the probe's order.
        num_levels: noise levels per image.
        warp: where the levels lie, from the pilot at sample 0.
        family: architecture.
        prediction_type: what the network predicts.
        precision: autocast dtype of the forwards.
        vae_hash: hash of the VAE's tensors.
        version: of the file.
        labels: tags and source of each image, in the same order, for breaking numbers down; no
            part of the name, because they move no number. Empty: not known.
    """

    name: str
    seed: int
    images: tuple[ProbeImage, ...]
    num_levels: int
    warp: Warp
    family: str
    prediction_type: str
    precision: str
    vae_hash: str
    version: int = PROBE_VERSION
    labels: tuple[Labels, ...] = field(default=(), compare=False)

    @cached_property
    def probe_id(self) -> str:
        """Hash of everything but the labels: the name of the folder that its numbers lie in."""
        fixed = {key: value for key, value in asdict(self).items() if key != "labels"}
        return digest("probe", json.dumps(fixed, sort_keys=True))

    @property
    def shape(self) -> tuple[int, int]:
        """(images, levels)."""
        return len(self.images), self.num_levels

    def u(self) -> np.ndarray:
        """(n, m) noise levels, warped."""
        return self.warp.quantile(lattice(self.seed, self.name, *self.shape))

    def density(self) -> np.ndarray:
        """(n, m) the density that each level was drawn with; the loss is divided by it."""
        return self.warp.density(self.u())

    def save(self, folder: Path) -> Path:
        """Write `<folder>/<probe_id>/probe.json`; returns that subfolder."""
        place = folder / self.probe_id
        place.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        scratch = _own_scratch(place / PROBE_FILE)
        scratch.write_text(text + "\n", encoding="utf-8")
        scratch.replace(place / PROBE_FILE)
        return place

    @classmethod
    def load(cls, path: Path) -> Probe:
        """Read a probe file, or the folder it lies in.

        Raises:
            DataError: it is missing, of another version, or was edited.
        """
        path = path / PROBE_FILE if path.is_dir() else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read the probe {path}: {error}") from None
        version = data.get("version") if isinstance(data, dict) else None
        if version != PROBE_VERSION:
            raise DataError(f"{path} has probe version {version}, expected {PROBE_VERSION}")
        try:
            images = tuple(
                ProbeImage(image["id"], image["prompt"], tuple(image["bucket_hw"]))
                for image in data["images"]
            )
            warp = Warp(tuple(data["warp"]["steps"]))
            labels = tuple(
                Labels(tuple(each["tags"]), each["source"]) for each in data.get("labels", ())
            )
            probe = cls(**{**data, "images": images, "warp": warp, "labels": labels})
        except (KeyError, TypeError, AssertionError) as error:
            raise DataError(f"{path} is no probe: {error!r}") from None
        if path.parent.name != probe.probe_id and len(path.parent.name) == len(probe.probe_id):
            raise DataError(f"{path} was edited: its content is {probe.probe_id}")
        return probe


@dataclass(frozen=True)
class LossMatrix:
    """What one evaluation measured.

    Args:
        loss: (n, m) float32, raw loss per image and level.
        u: (n, m) noise levels.
        density: (n, m) what the loss is divided by.
    """

    loss: np.ndarray
    u: np.ndarray
    density: np.ndarray

    @property
    def weighted(self) -> np.ndarray:
        """(n, m) float64 whose mean estimates the mean loss over uniform noise levels."""
        return self.loss.astype(np.float64) / self.density

    @property
    def mean(self) -> float:
        """The number: summed in index order."""
        return float(self.weighted.sum() / self.loss.size)

    def bins(self, count: int = 10) -> list[float | None]:
        """Mean loss in equal bins of u; None where no level fell into one."""
        which = np.minimum((self.u * count).astype(int), count - 1)
        values: list[float | None] = []
        for k in range(count):
            inside = which == k
            weights = 1 / self.density[inside]
            mean = (self.loss[inside] * weights).sum() / weights.sum() if inside.any() else None
            values.append(None if mean is None else float(mean))
        return values

    def save(self, path: Path, ids: Sequence[str]) -> None:
        """Write an `.npz`, all of it or nothing."""
        scratch = _own_scratch(path)
        np.savez(scratch, loss=self.loss, u=self.u, density=self.density, ids=np.array(ids))
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path) -> LossMatrix:
        """Read an `.npz` that `save` wrote.

        Raises:
            DataError: it is missing or holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(file["loss"], file["u"], file["density"])
        except FileNotFoundError:
            raise DataError(f"{path} is not there", "It was moved, or never written.") from None
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            # What numpy says of any other file is advice to open it as a pickle.
            why = "no .npz archive" if isinstance(error, ValueError | EOFError) else error
            raise DataError(f"{path} is no loss matrix: {why}") from None


def _own_scratch(path: Path) -> Path:
    """Where this process writes a file first: two that validate at once write the same ones."""
    return path.with_suffix(f".{os.getpid()}.new{path.suffix}")
