"""YOLO: persons, faces or anything else that weights were trained for."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field

from sdprep import boxes
from sdprep.annotate import PixelNeeds, Sample
from sdprep.detectors._yolo_onnx import WHO, OnnxYolo
from sdprep.detectors._yolo_ultralytics import UltralyticsYolo
from sdprep.devices import BatchSize, DeviceName, FittingBatches
from sdprep.errors import DataError, UserError, nearest
from sdprep.model_files import ModelFolder, Revision, fingerprint, model_folder
from sdprep.recipe import AnnotatorConfig

_BACKENDS: dict[str, Any] = {".onnx": OnnxYolo, ".pt": UltralyticsYolo}


class Config(AnnotatorConfig):
    """YOLO with your weights: an exported .onnx, or a .pt by ultralytics (AGPL-3.0, extra `yolo`).

    The licence of weights may bind you too: those of ultralytics are AGPL-3.0 as well.
    """

    type: Literal["yolo"] = "yolo"
    model: str = Field(
        min_length=1, description="File .onnx or .pt, its folder, or an id on the Hub (USER/NAME)."
    )
    file: str | None = Field(None, description="Name of the file in that folder or on the Hub.")
    revision: Revision = None
    device: DeviceName = "auto"
    batch_size: BatchSize = 8
    labels: tuple[str, ...] = Field((), description="Only boxes of these classes; none: of all.")
    min_score: float = Field(0.25, ge=0, lt=1, description="Boxes above this score are stored.")
    max_iou: float = Field(
        0.7,
        gt=0,
        le=1,
        description="Of boxes that overlap more than this, the best stays (0 to 1).",
    )
    image_size_px: int | None = Field(
        None, ge=32, le=4096, description="Side of the model's input; none: as exported, or 640."
    )

    def build(self) -> YoloDetector:
        """Find the weights and load them.

        Raises:
            UserError: no such file, no such class, or a package or device is missing.
        """
        return YoloDetector(*_found(self.model, self.file, self.revision), self)


class YoloDetector:
    """Fills `boxes_yolo`; each class is a label."""

    columns = boxes.COLUMNS
    pixels = PixelNeeds()
    is_thread_safe = False

    def __init__(self, folder: ModelFolder, file: str, config: Config) -> None:
        self.batch_size = config.batch_size
        self.limits = {"min_score": config.min_score, "max_iou": config.max_iou}
        path = folder.need(file)
        self.model = _BACKENDS[path.suffix.lower()](path, config.device, config.image_size_px)
        self.labels = _known(config.labels, list(self.model.names.values()), path)
        options = {**self.limits, "labels": sorted(config.labels)}
        options |= {"image_size_px": config.image_size_px, "backend": path.suffix.lower()}
        self.fingerprint = fingerprint("yolo", 1, folder, **options)
        self._batches = FittingBatches(WHO)

    def annotate(self, batch: Sequence[Sample]) -> pa.RecordBatch:
        """One row a sample, its boxes best first."""
        images = [sample.image for sample in batch if sample.image is not None]
        rows = self._batches.run(self._rows, images)
        return pa.RecordBatch.from_pylist(rows, schema=self.columns)

    def _rows(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        return [self._row(found) for found in self.model(images, **self.limits)]

    def _row(self, found: Any) -> dict[str, Any]:
        labels = [self.model.label(int(index)) for index in found.classes]
        kept = [i for i, label in enumerate(labels) if not self.labels or label in self.labels]
        names = [labels[index] for index in kept]
        return boxes.found(names, found.scores[kept].tolist(), np.asarray(found.places)[kept])


def _known(labels: Sequence[str], names: list[str], path: Path) -> frozenset[str]:
    for label in labels:
        if names and label not in names:
            near = nearest(label, names)
            hint = f"Did you mean {near}?" if near else f"There are: {', '.join(names[:80])}."
            raise UserError(f"{path} has no class {label!r}", hint)
    return frozenset(labels)


def _found(model: str, file: str | None, revision: str | None) -> tuple[ModelFolder, str]:
    """The folder that holds the weights, and their name in it.

    Raises:
        UserError: there are none, or several to choose from.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if file is not None or revision is not None:
            raise UserError(f"model {model} is a file", "Leave file and revision out.")
        return model_folder(str(path.parent), None, [glob.escape(path.name)]), _readable(path.name)
    if path.is_dir() and file is None:
        names = sorted(p.name for p in path.iterdir() if p.suffix.lower() in _BACKENDS)
        if len(names) != 1:
            there = ", ".join(names) or "none"
            raise UserError(f"{model} has no single .onnx or .pt file: {there}", "Say which: file.")
        file = names[0]
    if file is None:
        if path.suffix.lower() in _BACKENDS:
            raise UserError(f"there is no file {model}")
        raise UserError(
            f"which file of {model} holds the weights?", "Say it: --set file=yolo11n.onnx"
        )
    return model_folder(model, revision, [glob.escape(file)]), _readable(file)


def _readable(name: str) -> str:
    if Path(name).suffix.lower() not in _BACKENDS:
        raise DataError(
            f"{name} is no kind of weights that {WHO} reads: {', '.join(_BACKENDS)}",
            "Export it: yolo export model=FILE.pt format=onnx",
        )
    return name
