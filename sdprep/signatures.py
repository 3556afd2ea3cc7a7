"""Perceptual signatures of an image: 128 bits for each of a few views of its 256-px luma.

Bits 0..62 are pHash (low DCT frequencies above their median), bits 63..126 are dHash (is the next
cell brighter), bit 127, the spare one, is set where the image is flat and says nothing.
All resampling is Pillow's integer arithmetic, so the bits are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from PIL import Image

from sdprep.annotate import PixelNeeds

if TYPE_CHECKING:
    from sdprep.annotate import Sample

SIGNATURE_VERSION = 1
COLUMN = "signature_views"
LUMA_PX = 256
THUMBNAIL_PX = 64
BITS = 128
FLAT_SD = 4.0  # grey levels; below it a view holds nothing that could be compared
BORDER_RANGE = 12  # grey levels that a border may span
BORDER_SHARE = 3  # at most 1/3 of a side is border

WHOLE, TRIMMED = 0, 1
CROPS = ((0.9, 0.5, 0.5), *((0.75, x, y) for x, y in ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5))))
"""Views after whole and trimmed: share of each side, and where the spare room lies (0..1)."""
NUM_UPRIGHT = 2 + len(CROPS)
NUM_MIRRORED = 2  # whole and trimmed

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ViewSignatures:
    """What is known of one image.

    Attributes:
        upright: (8, 16) uint8, the signatures of whole, trimmed, centre .9, five crops of .75.
        mirrored: (2, 16) uint8, of whole and trimmed, flipped left to right.
        usable: (8,) bool; False where the view is flat, or is the same as whole.
        trim: left, top, right, bottom of the trimmed view in the 256-px luma.
        luma_sd: grey levels, of the whole.
        thumbnail: (64, 64) uint8 luma of the whole.
    """

    upright: np.ndarray
    mirrored: np.ndarray
    usable: np.ndarray
    trim: tuple[int, int, int, int]
    luma_sd: float
    thumbnail: np.ndarray


def luma_256(image: Image.Image) -> Image.Image:
    """The square 256-px luma that everything else is computed from; aspect is given up."""
    grey = image.convert("L")
    factor = min(grey.size) // (2 * LUMA_PX)
    if factor > 1:
        grey = grey.reduce(factor)
    is_smaller = min(grey.size) < LUMA_PX
    filter_ = Image.Resampling.BILINEAR if is_smaller else Image.Resampling.BOX
    return grey.resize((LUMA_PX, LUMA_PX), filter_)


def border_trim(levels: np.ndarray) -> tuple[int, int, int, int]:
    """The box inside a border of one tone.

    Args:
        levels: (256, 256) uint8.
    Returns:
        left, top, right, bottom; a side is moved while all it leaves out spans at most 12 grey
        levels, and by a third of the image at most. One pixel more goes with a border: it is a
        blend of border and picture (letterboxed photos came 5 bits closer for it on average).
    """
    height, width = levels.shape
    top, bottom = _border(levels), _border(levels[::-1])
    left, right = _border(levels.T), _border(levels.T[::-1])
    return left, top, width - right, height - bottom


def _border(lines: np.ndarray) -> int:
    """How many leading lines are border."""
    lines = lines[: len(lines) // BORDER_SHARE].astype(np.int16)
    highest = np.maximum.accumulate(lines.max(axis=1))
    lowest = np.minimum.accumulate(lines.min(axis=1))
    depth = int((highest - lowest <= BORDER_RANGE).sum())
    return depth + 1 if depth else 0


def view_boxes(trim: Sequence[int]) -> list[Box]:
    """Boxes of the eight upright views in the 256-px luma."""
    boxes: list[Box] = [(0, 0, LUMA_PX, LUMA_PX), (trim[0], trim[1], trim[2], trim[3])]
    for share, x, y in CROPS:
        side = LUMA_PX * share
        left, top = x * (LUMA_PX - side), y * (LUMA_PX - side)
        boxes.append((left, top, left + side, top + side))
    return boxes


@cache
def _dct_rows() -> np.ndarray:
    """(8, 32) float64, the eight lowest rows of DCT-II, unnormalised."""
    place, frequency = np.arange(32)[None], np.arange(8)[:, None]
    return np.cos(np.pi * frequency * (2 * place + 1) / 64)


def _signature(cells_32: np.ndarray, cells_9x8: np.ndarray) -> np.ndarray:
    """(16,) uint8 from a 32x32 and an 8-row, 9-column luma, both of signed integers."""
    coefficients = (_dct_rows() @ cells_32 @ _dct_rows().T).ravel()[1:]
    coefficients = coefficients.round(3)  # equal ones stay equal whatever the order of summation
    phash = coefficients > np.median(coefficients)
    dhash = (cells_9x8[:, 1:] > cells_9x8[:, :-1]).ravel()
    return np.packbits(np.concatenate([phash, dhash, [False]]))


def view_signatures(image: Image.Image) -> ViewSignatures:
    """All views of one image, mode RGB, upright."""
    luma = luma_256(image)
    levels = np.asarray(luma)
    trim = border_trim(levels)
    upright, mirrored, usable = [], [], []
    for index, box in enumerate(view_boxes(trim)):
        is_new = index != TRIMMED or trim != (0, 0, LUMA_PX, LUMA_PX)
        usable.append(is_new and _inside(levels, box).std() >= FLAT_SD)
        cells = np.asarray(luma.resize((32, 32), Image.Resampling.BOX, box=box)).astype(np.int64)
        steps = np.asarray(luma.resize((9, 8), Image.Resampling.BOX, box=box)).astype(np.int64)
        upright.append(_signature(cells, steps))
        if index in (WHOLE, TRIMMED):
            mirrored.append(_signature(cells[:, ::-1], steps[:, ::-1]))
    if not usable[WHOLE]:
        upright[WHOLE][-1] |= 1
    shrunk = luma.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    return ViewSignatures(
        np.array(upright),
        np.array(mirrored),
        np.array(usable),
        trim,
        float(levels.std()),
        np.asarray(shrunk),
    )


def _inside(levels: np.ndarray, box: Box) -> np.ndarray:
    left, top, right, bottom = (round(edge) for edge in box)
    return levels[top:bottom, left:right]


def is_flat(signature: bytes) -> bool:
    """Whether the image of a whole signature is too flat to be compared."""
    return bool(signature[-1] & 1)


class SignatureViews:
    """The annotator that fills the column `signature_views`."""

    columns = pa.schema(
        {
            "upright": pa.binary(),  # 8 x 16 bytes
            "mirrored": pa.binary(),  # 2 x 16 bytes
            "usable": pa.int32(),  # bit i: view i can be compared
            "trim": pa.binary(),  # left, top, right, bottom; little-endian uint16
            "luma_sd": pa.float32(),
            "thumbnail": pa.binary(),  # 64 x 64 bytes
        }
    )
    pixels = PixelNeeds()
    fingerprint = f"signature_views {SIGNATURE_VERSION}"
    batch_size = 64
    is_thread_safe = True

    def annotate(self, batch: Sequence[Sample]) -> pa.RecordBatch:
        """One row of signatures per sample."""
        rows = []
        for sample in batch:
            assert sample.image is not None, "the loop decodes for annotators that need pixels"
            views = view_signatures(sample.image)
            bits = sum(1 << index for index, flag in enumerate(views.usable) if flag)
            rows.append(
                {
                    "upright": views.upright.tobytes(),
                    "mirrored": views.mirrored.tobytes(),
                    "usable": bits,
                    "trim": np.array(views.trim, "<u2").tobytes(),
                    "luma_sd": views.luma_sd,
                    "thumbnail": views.thumbnail.tobytes(),
                }
            )
        return pa.RecordBatch.from_pylist(rows, schema=self.columns)
