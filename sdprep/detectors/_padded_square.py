"""OWLv2's square: padded right and below with grey, then resized as scikit-image does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_PAD = np.float32(0.5)  # of 0..1; transformers 4.57 pads so too, 5.23 pads 0
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's, RGB
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_TRUNCATE = 4.0  # the Gaussian ends at this many deviations


def pixels_of(image: Image.Image, side_px: int) -> np.ndarray:
    """(3, side_px, side_px) float32, RGB, normalised with CLIP's mean and deviation.

    Padding and resizing are linear, and what they make of plain grey is plain grey. So only the
    difference from grey is resized, and the padded square is never made.
    """
    square_px = max(image.size)
    values = np.asarray(image, np.float32) / np.float32(255) - _PAD  # (H, W, 3)
    height, width, _ = values.shape
    down = resize_matrix(square_px, side_px)[:, :height] @ values.reshape(height, width * 3)
    down = np.moveaxis(down.reshape(side_px, width, 3), 2, 0)  # (3, side, W)
    across = down.reshape(3 * side_px, width) @ resize_matrix(square_px, side_px)[:, :width].T
    square = across.reshape(3, side_px, side_px).astype(np.float32) + _PAD
    return (square - _MEAN[:, None, None]) / _STD[:, None, None]


def resize_matrix(from_px: int, to_px: int) -> csr_array:
    """(to_px, from_px) weights: a Gaussian against aliasing, then bilinear interpolation.

    The Gaussian has a deviation of half of what the scale exceeds 1. Edges are mirrored without
    repeating the outermost pixel.
    Source: skimage.transform.resize(order=1, anti_aliasing=True), which scenic's OWL-ViT calls.
    """
    from scipy.sparse import csr_array

    scale = from_px / to_px
    at = (np.arange(to_px) + 0.5) * scale - 0.5  # pixel centres lie at whole numbers
    low = np.floor(at)
    rows = np.repeat(np.arange(to_px), 2)
    columns = _mirrored(np.stack([low, low + 1], axis=1).astype(np.int64).ravel(), from_px)
    share = np.stack([low + 1 - at, at - low], axis=1).ravel()
    bilinear = csr_array((share, (rows, columns)), shape=(to_px, from_px))
    return (bilinear @ _gaussian(from_px, max(0.0, (scale - 1) / 2))).astype(np.float32)


def _gaussian(size_px: int, sigma_px: float) -> csr_array:
    from scipy.sparse import csr_array, eye_array

    radius = int(_TRUNCATE * sigma_px + 0.5)
    if radius == 0:
        return csr_array(eye_array(size_px))
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma_px) ** 2)
    rows = np.repeat(np.arange(size_px), len(offsets))
    columns = _mirrored((np.arange(size_px)[:, None] + offsets).ravel(), size_px)
    values = np.tile(weights / weights.sum(), size_px)
    return csr_array((values, (rows, columns)), shape=(size_px, size_px))  # repeats add up


def _mirrored(index: np.ndarray, size: int) -> np.ndarray:
    """Indices beyond an edge, reflected about the centre of its pixel."""
    if size == 1:
        return np.zeros_like(index)
    folded = index % (2 * size - 2)
    return np.minimum(folded, 2 * size - 2 - folded)
