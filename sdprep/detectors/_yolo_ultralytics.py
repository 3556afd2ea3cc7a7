"""YOLO weights (`.pt`) run by ultralytics, whose licence is AGPL-3.0."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdprep.detectors._yolo_onnx import (
    DEFAULT_SIDE_PX,
    MAX_BOXES,
    TASKS,
    WHO,
    Detections,
)
from sdprep.devices import torch_device
from sdprep.errors import DataError, MissingExtraError, UserError

_SETTINGS = {
    "ULTRALYTICS_SAFE_LOAD": "1",  # a .pt is a pickle, which could run any code
    "YOLO_AUTOINSTALL": "false",
    "YOLO_OFFLINE": "true",
    "YOLO_VERBOSE": "false",
}


class UltralyticsYolo:
    """One model with its weights."""

    def __init__(self, path: Path, device: str, image_size_px: int | None) -> None:
        """Load the weights, and nothing but weights.

        Raises:
            UserError: ultralytics is missing or cannot load safely, or the file is no YOLO.
        """
        yolo = _imported()
        self.device = torch_device(device, WHO)
        self.side_px = image_size_px or DEFAULT_SIDE_PX
        with _explained():
            try:
                self.model = yolo(str(path))
            except (TypeError, AttributeError, KeyError, OSError) as error:
                raise DataError(f"{path} holds no YOLO weights: {error}") from None
        if self.model.task not in TASKS:
            raise DataError(f"{path} is for the task {self.model.task}, not {', '.join(TASKS)}")
        self.names: dict[int, str] = dict(self.model.names)

    def __call__(
        self, images: Sequence[Image.Image], min_score: float, max_iou: float
    ) -> list[Detections]:
        """Boxes of some images, best first."""
        how: dict[str, Any] = {"conf": min_score, "iou": max_iou, "imgsz": self.side_px}
        how |= {"max_det": MAX_BOXES, "device": self.device, "verbose": False}
        arrays = [np.ascontiguousarray(np.asarray(image)[:, :, ::-1]) for image in images]  # BGR
        with _explained():
            results = self.model.predict(arrays, **how)
        return [
            Detections(
                result.boxes.xyxyn.cpu().numpy(),
                result.boxes.conf.cpu().numpy(),
                result.boxes.cls.cpu().numpy().astype(np.int64),
            )
            for result in results
        ]

    def label(self, index: int) -> str:
        """Name of a class."""
        return self.names.get(index, f"class {index}")


def _imported() -> Any:
    """The class YOLO, once it is sure that it loads weights without running what they bring."""
    import torch

    os.environ.update(_SETTINGS)  # read at import
    with _explained():
        try:
            import ultralytics
        except ModuleNotFoundError as error:
            raise MissingExtraError(error.name or "ultralytics", "yolo", WHO) from None
    is_safe = getattr(ultralytics.utils, "SAFE_LOAD", False)
    if not is_safe or not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        raise UserError(
            f"{WHO}: ultralytics {ultralytics.__version__} with PyTorch {torch.__version__} cannot "
            "load weights without running the code that a .pt may hold",
            "If something imported ultralytics earlier, set ULTRALYTICS_SAFE_LOAD=1 before. Else "
            "install ultralytics >= 8.4 and torch >= 2.6, or export the model to ONNX where you "
            "trust it: yolo export model=FILE.pt format=onnx",
        )
    return ultralytics.YOLO


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what a torchvision of another build raises into a message.

    Raises:
        UserError: torchvision does not fit torch.
    """
    try:
        yield
    except (RuntimeError, ImportError) as error:
        if "torchvision" not in str(error):
            raise
        import torch

        raise UserError(
            f"{WHO}: the installed torchvision was built for another PyTorch than "
            f"{torch.__version__}: {str(error).splitlines()[0]}",
            "Install the pair that belongs together (see pytorch.org), or export the model: "
            "yolo export model=FILE.pt format=onnx runs without either.",
        ) from None
