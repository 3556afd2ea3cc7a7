"""YOLO models that were exported to ONNX, without any code of their authors.

Written from the format: an input of letterboxed RGB, 0..1, channels first; an output of boxes and
class scores in pixels of that input.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdprep.boxes import not_overlapping
from sdprep.errors import DataError, UserError
from sdprep.onnx_sessions import open_session

WHO = "detector yolo"
MAX_BOXES = 300
DEFAULT_SIDE_PX = 640
TASKS = ("detect", "segment", "pose")  # those whose output begins with upright boxes
_PADDING = 114


@dataclass(frozen=True)
class Detections:
    """What was found in one image: (m, 4) x0, y0, x1, y1 as fractions, (m,) scores and classes."""

    places: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


class OnnxYolo:
    """One exported model."""

    def __init__(self, path: Path, device: str, image_size_px: int | None) -> None:
        """Open the model.

        Raises:
            UserError: ONNX Runtime is missing, or the device, or it is another kind of model.
        """
        self.path = path
        self.session = open_session(path, device, WHO, "detect")
        facts = self.session.get_modelmeta().custom_metadata_map
        task = facts.get("task", "detect")
        if task not in TASKS:
            raise DataError(f"{path} is for the task {task}; expected {', '.join(TASKS)}")
        self.names = _names(facts.get("names", ""), path)
        entry = self.session.get_inputs()[0]
        if len(entry.shape) != 4 or entry.shape[1] != 3:
            raise DataError(f"{path} takes {entry.shape}, expected (batch, 3, height, width)")
        self.input, self.dtype = entry.name, _dtype(entry.type, path)
        self.batch_size = entry.shape[0] if isinstance(entry.shape[0], int) else None
        self.size_hw = _size_hw(entry.shape[2:], image_size_px, path)

    def __call__(
        self, images: Sequence[Image.Image], min_score: float, max_iou: float
    ) -> list[Detections]:
        """Boxes of some images, best first."""
        found: list[Detections] = []
        step = self.batch_size or len(images)
        for start in range(0, len(images), step):
            part = images[start : start + step]
            pixels = np.zeros((step, 3, *self.size_hw), self.dtype)
            for index, image in enumerate(part):
                pixels[index] = letterboxed(image, self.size_hw).transpose(2, 0, 1) / 255.0
            output = np.asarray(self.session.run(None, {self.input: pixels})[0], np.float32)
            if output.ndim != 3 or len(output) != step:
                raise DataError(f"{self.path} gave {output.shape}, expected (images, ., .)")
            for image, values in zip(part, output, strict=False):  # the last ones may be padding
                places, scores, classes = decoded(values, len(self.names), min_score, max_iou)
                fractions = unletterboxed(places, image.size, self.size_hw)
                is_inside = (fractions[:, 2:] > fractions[:, :2]).all(1)
                found.append(
                    Detections(fractions[is_inside], scores[is_inside], classes[is_inside])
                )
        return found

    def label(self, index: int) -> str:
        """Name of a class; its number where the file has no names."""
        return self.names.get(index, f"class {index}")


def decoded(
    output: np.ndarray, num_classes: int, min_score: float, max_iou: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes of one image, best first.

    Args:
        output: (4 + classes + more, N) rows centre x, centre y, width, height and the score of each
            class; or, of models that suppress overlaps themselves, (N, 6) x0, y0, x1, y1, score,
            class. What follows the classes (mask coefficients, key points) is not read.
        num_classes: 0 if not known: then all rows after the fourth are classes.

    Returns:
        (m, 4) x0, y0, x1, y1 in pixels of the input, (m,) scores, (m,) int64 classes.
    """
    if output.shape[1] == 6:
        output = output[output[:, 4] > min_score]
        output = output[np.argsort(-output[:, 4], kind="stable")][:MAX_BOXES]
        return output[:, :4], output[:, 4], output[:, 5].astype(np.int64)
    by_class = output[4 : 4 + num_classes] if num_classes else output[4:]
    if not len(by_class) or len(by_class) < num_classes:
        raise DataError(f"a YOLO output of {output.shape} has no {num_classes or 'class'} scores")
    best = by_class.max(0)
    kept = np.flatnonzero(best > min_score)
    scores, classes = best[kept], by_class[:, kept].argmax(0)
    centre, half = output[:2, kept].T, output[2:4, kept].T / 2
    places = np.concatenate([centre - half, centre + half], axis=1)
    stay: list[int] = []
    for index in np.unique(classes):  # boxes of two classes never suppress each other
        own = np.flatnonzero(classes == index)
        stay += own[not_overlapping(places[own], scores[own], max_iou)].tolist()
    order = np.array(sorted(stay, key=lambda i: -scores[i])[:MAX_BOXES], np.int64)
    return places[order], scores[order], classes[order]


def _placement(size: tuple[int, int], box_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """Where a picture of (width, height) lies in the letterbox: left, top, width, height."""
    scale = min(box_hw[1] / size[0], box_hw[0] / size[1])
    width, height = (max(1, round(side * scale)) for side in size)
    # An odd row or column of padding goes right and below.
    return (box_hw[1] - width) // 2, (box_hw[0] - height) // 2, width, height


def letterboxed(image: Image.Image, box_hw: tuple[int, int]) -> np.ndarray:
    """box_hw + (3,) uint8: the picture in the middle, whole, and grey where it does not reach.

    Bilinear between the four nearest pixels and nothing else, as these models are trained:
    Pillow's own bilinear filter would average more of them when it reduces.
    """
    left, top, width, height = _placement(image.size, box_hw)
    box = np.full((*box_hw, 3), _PADDING, np.uint8)
    box[top : top + height, left : left + width] = _bilinear(np.asarray(image), (height, width))
    return box


def unletterboxed(places: np.ndarray, size: tuple[int, int], box_hw: tuple[int, int]) -> np.ndarray:
    """From pixels of the letterbox to fractions of the picture, cut to 0..1."""
    left, top, width, height = _placement(size, box_hw)
    moved = places - np.array([left, top, left, top])
    return (moved / np.array([width, height, width, height])).clip(0, 1)


def _bilinear(pixels: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 to size_hw; pixel centres lie at halves, edges repeat."""
    if pixels.shape[:2] == size_hw:
        return pixels
    low_y, high_y, share_y = _neighbours(pixels.shape[0], size_hw[0])
    low_x, high_x, share_x = _neighbours(pixels.shape[1], size_hw[1])
    share_x = share_x[:, None]
    rows = [
        pixels[row][:, low_x] * (1 - share_x) + pixels[row][:, high_x] * share_x
        for row in (low_y, high_y)
    ]
    values = rows[0] * (1 - share_y[:, None, None]) + rows[1] * share_y[:, None, None]
    return (values + 0.5).astype(np.uint8)


def _neighbours(from_px: int, to_px: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    at = ((np.arange(to_px) + 0.5) * (from_px / to_px) - 0.5).clip(0, from_px - 1)
    low = np.floor(at).astype(np.int64)
    return low, np.minimum(low + 1, from_px - 1), (at - low).astype(np.float32)


# --- the file ------------------------------------------------------------------------------------


def _names(text: str, path: Path) -> dict[int, str]:
    """Class names from the file's metadata: a Python dict, or list, as text."""
    if not text:
        return {}
    try:
        value = ast.literal_eval(text)
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {int(key): str(name) for key, name in pairs}
    except (ValueError, SyntaxError, TypeError) as error:
        raise DataError(f"{path}: its class names cannot be read: {text[:80]!r}: {error}") from None


def _dtype(name: str, path: Path) -> Any:
    found = {"tensor(float)": np.float32, "tensor(float16)": np.float16}.get(name)
    if found is None:
        raise DataError(f"{path} takes {name}, expected float or float16", "Export it again.")
    return found


def _size_hw(shape: Sequence[Any], wanted: int | None, path: Path) -> tuple[int, int]:
    """Size of the input: the one it was exported with, else what is wanted."""
    fixed = tuple(side if isinstance(side, int) else wanted or DEFAULT_SIDE_PX for side in shape)
    if wanted is not None and fixed != (wanted, wanted):
        raise UserError(
            f"{path} was exported for {fixed[1]} x {fixed[0]} px, image_size_px is {wanted}",
            "Leave image_size_px out, or export the model again with another imgsz.",
        )
    return fixed[0], fixed[1]
