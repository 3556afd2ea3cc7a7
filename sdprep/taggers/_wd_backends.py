"""The two forms in which WD taggers are published: ONNX, and safetensors for timm.

Both look at BGR. ONNX wants 0..255 with channels last and gives probabilities; timm wants
channels first, normalised, and gives logits. Mixing the two is the usual bug.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sdprep.devices import batch_on, torch_device
from sdprep.errors import DataError, MissingExtraError
from sdprep.model_files import ModelFolder
from sdprep.onnx_sessions import device_of, open_session

if TYPE_CHECKING:
    from torch import Tensor

WHO = "tagger wd"
ONNX_FILE = "model.onnx"
TIMM_FILES = ("config.json", "model.safetensors")


class Backend(Protocol):
    """A loaded model."""

    side_px: int

    def probabilities(self, bgr: np.ndarray) -> np.ndarray:
        """(B, side_px, side_px, 3) uint8, BGR, to (B, N) float32, 0..1."""
        ...


class OnnxBackend:
    """`model.onnx`, run by ONNX Runtime."""

    def __init__(self, folder: ModelFolder, device: str, num_tags: int) -> None:
        """Open the graph and check what goes in and comes out.

        Raises:
            UserError: ONNX Runtime or the device is missing, or it is another kind of graph.
        """
        self.check(folder)
        path = folder.need(ONNX_FILE)
        self.session = open_session(path, device, WHO, "tag")
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        shape = inputs[0].shape
        if len(inputs) != 1 or len(shape) != 4 or shape[3] != 3 or not _is_square(shape[1:3]):
            found = ", ".join(str(each.shape) for each in inputs)
            raise DataError(
                f"{path} takes {found}, expected one input (images, side, side, 3)",
                "WD taggers are published with channels last; this is another model or export.",
            )
        width = outputs[0].shape[-1] if outputs[0].shape else 0
        if width != num_tags and isinstance(width, int):  # a name stands for any number
            raise DataError(f"{path} gives {width} values, selected_tags.csv lists {num_tags}")
        self.num_tags = num_tags
        self.side_px: int = shape[1]
        self.name = inputs[0].name
        self.fixed = shape[0] if isinstance(shape[0], int) else None
        self.device = device_of(self.session)
        self.path = path

    @staticmethod
    def check(folder: ModelFolder) -> None:
        """Whether the file and the package are there, without reading the weights.

        Raises:
            UserError: one is not.
        """
        folder.need(ONNX_FILE)
        _need_package("onnxruntime", "tag", ONNX_FILE)

    def probabilities(self, bgr: np.ndarray) -> np.ndarray:
        """As `Backend` says; the graph ends in a sigmoid of its own."""
        size = self.fixed or batch_on(self.device, len(bgr))
        parts = [self._run(bgr[start : start + size], size) for start in range(0, len(bgr), size)]
        found = np.concatenate(parts)
        if found.shape != (len(bgr), self.num_tags):
            raise DataError(
                f"{self.path} gave values of shape {found.shape}, expected "
                f"{(len(bgr), self.num_tags)}, as selected_tags.csv lists"
            )
        low, high = float(np.nanmin(found)), float(np.nanmax(found))
        if low < -1e-4 or high > 1 + 1e-4:
            raise DataError(
                f"{self.path} gave values from {low:.3g} to {high:.3g}, expected probabilities",
                "It gives logits, or is another model.",
            )
        return found

    def _run(self, bgr: np.ndarray, size: int) -> np.ndarray:
        pixels = np.zeros((size, *bgr.shape[1:]), np.float32)
        pixels[: len(bgr)] = bgr
        (found,) = self.session.run(None, {self.name: pixels})[:1]
        return np.asarray(found, np.float32)[: len(bgr)]


def _need_package(package: str, extra: str, file: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, extra, f"{WHO} with {file}")


def _is_square(sides: list[Any]) -> bool:
    return isinstance(sides[0], int) and sides[0] == sides[1] and sides[0] > 0


class TimmBackend:
    """`config.json` and `model.safetensors`, run by timm."""

    def __init__(self, folder: ModelFolder, device: str, num_tags: int) -> None:
        """Build the architecture that `config.json` names and load its weights.

        Raises:
            UserError: timm or the device is missing, or the files do not fit each other.
        """
        self.check(folder)
        import timm

        config = folder.read_json(TIMM_FILES[0])
        self.side_px = input_side(config, str(folder.path / TIMM_FILES[0]))
        classes = config.get("num_classes", num_tags)
        if classes != num_tags:
            raise DataError(
                f"model {folder.name}: config.json says num_classes {classes}, selected_tags.csv "
                f"lists {num_tags}"
            )
        self.device = torch_device(device, WHO)
        weights = folder.read_weights(TIMM_FILES[1])
        try:
            options = config.get("model_args") or {}
            model = timm.create_model(config["architecture"], num_classes=num_tags, **options)
            model.load_state_dict(weights)
        except (KeyError, RuntimeError, TypeError) as error:
            raise DataError(f"model {folder.name} cannot be built by timm: {error}") from None
        self.model = model.eval().to(self.device)

    @staticmethod
    def check(folder: ModelFolder) -> None:
        """Whether files and package are there, without reading the weights.

        Raises:
            UserError: one is not.
        """
        for file in reversed(TIMM_FILES):
            folder.need(file)
        _need_package("timm", "timm", f"{TIMM_FILES[1]} (its {ONNX_FILE} does without)")

    def probabilities(self, bgr: np.ndarray) -> np.ndarray:
        """As `Backend` says."""
        import torch

        size = batch_on(self.device, len(bgr))
        with torch.inference_mode():
            logits = [
                self.model(normalised(bgr[start : start + size]).to(self.device))
                for start in range(0, len(bgr), size)
            ]
            return torch.cat(logits).float().sigmoid().cpu().numpy()


def input_side(config: dict[str, Any], where: str) -> int:
    """Side in px of the square that timm's `config.json` names; WD v3 has 448.

    Raises:
        DataError: it does not name one, or normalises in another way than WD taggers do.
    """
    trained = config.get("pretrained_cfg")
    if not isinstance(trained, dict):
        raise DataError(f"{where} has no pretrained_cfg", "This is no model in timm's layout.")
    size = trained.get("input_size")
    if not isinstance(size, list) or len(size) != 3 or size[0] != 3 or not _is_square(size[1:]):
        raise DataError(f"{where}: input_size is {size!r}, expected such as [3, 448, 448]")
    for key in ("mean", "std"):
        if list(trained.get(key) or [0.5] * 3) != [0.5] * 3:
            raise DataError(f"{where}: {key} is {trained[key]!r}, WD taggers have [0.5, 0.5, 0.5]")
    return size[1]


def normalised(bgr: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 from -1 to 1, in the same order of channels."""
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(bgr.transpose(0, 3, 1, 2))).float()
    return (pixels / 255 - 0.5) / 0.5
