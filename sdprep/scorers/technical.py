"""Technical quality: what can be measured in one picture without any model.

Measured on luma (Pillow's `L`) whose long side is brought to at most 1024 px by an integer box
reduction; the JPEG grid, the borders and the file itself are measured at stored resolution. Every
number is a function of the file alone: it never depends on what runs beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from sdprep.annotate import PixelNeeds, Sample
from sdprep.jpeg_quality import coarseness_percent, jpeg_quality
from sdprep.recipe import AnnotatorConfig

LONG_SIDE_PX = 1024
BORDER_LEVELS = 12  # grey levels that a uniform border may span; JPEG ringing needs some

COLUMNS = pa.schema(
    [
        pa.field("score", pa.float32()),  # 0..9, never NULL; see `quality`
        pa.field("score_raw", pa.float32()),  # log2(score / 9): 0 is flawless, -1 halves the score
        pa.field("sharpness", pa.float32()),  # NULL where a reduced side is under 3 px
        pa.field("detail", pa.float32()),  # NULL where a reduced side is under 3 px
        pa.field("brightness", pa.float32()),  # 0..1
        pa.field("contrast", pa.float32()),  # 0..0.5
        pa.field("dark", pa.float32()),  # share of pixels <= 5
        pa.field("bright", pa.float32()),  # share of pixels >= 250
        pa.field("entropy", pa.float32()),  # bits, 0..8
        pa.field("colourfulness", pa.float32()),
        pa.field("noise", pa.float32()),  # grey levels; NULL where a reduced side is under 3 px
        pa.field("blockiness", pa.float32()),  # 1 = no grid; NULL where no 8-px line is crossed
        pa.field("jpeg_quality", pa.int8()),  # 1..100; NULL where the file is no JPEG
        pa.field("bits_per_pixel", pa.float32()),
        pa.field("border_fraction", pa.float32()),  # 0..1
        pa.field("reduce_factor", pa.int16()),
    ]
)


class Config(AnnotatorConfig):
    """Sharpness, exposure, noise, compression and borders; needs no model."""

    type: Literal["technical"] = "technical"

    def build(self) -> TechnicalScorer:
        """Make the scorer."""
        return TechnicalScorer()


class TechnicalScorer:
    """Fills `score_technical`."""

    columns = COLUMNS
    pixels = PixelNeeds(data=True)
    fingerprint = '{"name": "technical", "version": 1}'
    batch_size = 16
    is_thread_safe = True
    is_thread_safe = True

    def annotate(self, batch: Sequence[Sample]) -> pa.RecordBatch:
        """Measure each sample by itself."""
        return pa.RecordBatch.from_pylist([_row(sample) for sample in batch], schema=COLUMNS)


def _row(sample: Sample) -> dict[str, float | None]:
    assert sample.image is not None
    assert sample.data is not None
    luma = sample.image.convert("L")
    factor = reduce_factor(luma.size)
    reduced = luma.reduce(factor)
    small = np.asarray(reduced, dtype=np.int16)
    stored = _as_stored(np.asarray(luma), sample.row.get("exif_orientation") or 1)
    row: dict[str, float | None] = {
        "sharpness": sharpness(small),
        "detail": detail(reduced),
        **exposure(small),
        "colourfulness": colourfulness(np.asarray(sample.image.reduce(factor), dtype=np.int16)),
        "noise": noise(small),
        "blockiness": blockiness(stored),
        "jpeg_quality": jpeg_quality(sample.data),
        "bits_per_pixel": 8 * len(sample.data) / stored.size,
        "border_fraction": border_fraction(stored),
        "reduce_factor": factor,
    }
    kept = quality(row)
    return row | {"score": 9 * kept, "score_raw": math.log2(kept)}


def quality(row: Mapping[str, float | None]) -> float:
    """Share of a flawless picture's quality that is left, above 0 and at most 1.

    A product with one factor per damage: a factor falls with the metric that names its damage
    and is one half at the reference value given here. The values were set so that a score of 2
    (a share of 2/9) parts clearly damaged pictures from usable ones: Gaussian blur of 3 px on a
    448 px photo, JPEG quality 12, noise of 55 grey levels and a twentieth of the light fall below
    it; night sky, soft motion, grass, scanned text and low-key photos stay above.
    """
    sharp, grain = row["sharpness"] or 0.0, row["noise"] or 0.0
    light = row["brightness"] or 0.0
    # White noise of variance v adds 20 v to the Laplacian's variance. Taken off, noise is no
    # sharpness; and the less of the variance it explains, the more of it is texture, not noise.
    explained = min(20 * grain**2 / sharp, 1.0) if sharp else 0.0
    true_sharp = sharp * max(1 - explained, 0.02)
    true_grain = grain * explained**3
    jpeg = row["jpeg_quality"]
    coarseness = 0.0 if jpeg is None else coarseness_percent(int(jpeg))
    blocks = max((row["blockiness"] or 1.0) - 1, 0.0)
    factors = (
        _enough(true_sharp, half=15, slope=0.8),
        _limited(true_grain, half=10, slope=1.3),
        min(_limited(coarseness, half=140, slope=1.2), _limited(blocks, half=1.5, slope=1.5)),
        _enough(light, half=0.06, slope=1.7),
        _enough(1 - light, half=0.03, slope=1.7),
        _enough(row["contrast"] or 0.0, half=0.02, slope=2),
        _limited(row["border_fraction"] or 0.0, half=0.6, slope=3),
    )
    return math.prod(factors)


def _limited(damage: float, half: float, slope: float) -> float:
    return 1 / (1 + (damage / half) ** slope)


def _enough(value: float, half: float, slope: float) -> float:
    return _limited(half / max(value, half / 1000), half=1, slope=slope)


def reduce_factor(size: tuple[int, int]) -> int:
    """The whole number that brings the long side to at most 1024 px; 1 where it is already."""
    return max(1, math.ceil(max(size) / LONG_SIDE_PX))


def sharpness(luma: np.ndarray) -> float | None:
    """Variance of the 4-neighbour Laplacian over the pixels that have all four neighbours.

    Args:
        luma: (H, W) int16, in which every step is exact.
    """
    if min(luma.shape) < 3:
        return None
    sides = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return _variance(sides - 4 * luma[1:-1, 1:-1])


def detail(luma: Image.Image) -> float | None:
    """Structure over four octaves: the mean of log2(1 + sharpness) at 1, 1/2, 1/4 and 1/8 size.

    Unlike `sharpness` it tells a picture enlarged 16 times from one enlarged 8 times, where the
    finest octave holds nothing but compression noise. Octaves under 3 px are left out.
    """
    octaves = [sharpness(np.asarray(luma.reduce(step), dtype=np.int16)) for step in (1, 2, 4, 8)]
    present = [math.log2(1 + octave) for octave in octaves if octave is not None]
    return sum(present) / len(present) if present else None


def noise(luma: np.ndarray) -> float | None:
    """Standard deviation of the noise, in grey levels; fine texture counts as noise.

    Args:
        luma: (H, W) int16, in which every step is exact.
    Source: Immerkær 1996, "Fast noise variance estimation".
    """
    if min(luma.shape) < 3:
        return None
    # The kernel [1 -2 1; -2 4 -2; 1 -2 1] is the second difference along rows, then columns.
    across = luma[:, :-2] - 2 * luma[:, 1:-1] + luma[:, 2:]
    both = across[:-2] - 2 * across[1:-1] + across[2:]
    return math.sqrt(math.pi / 2) * int(np.abs(both).sum(dtype=np.int64)) / (6 * both.size)


def exposure(luma: np.ndarray) -> dict[str, float | None]:
    """Brightness, contrast, shares of black and white, and entropy, from the histogram."""
    counts = np.bincount(luma.ravel(), minlength=256)
    share = counts / luma.size
    present = share[share > 0]
    levels = np.arange(256)
    mean = float(share @ levels)
    return {
        "brightness": mean / 255,
        "contrast": math.sqrt(float(share @ (levels - mean) ** 2)) / 255,
        "dark": float(counts[:6].sum() / luma.size),
        "bright": float(counts[250:].sum() / luma.size),
        "entropy": max(0.0, float(-(present * np.log2(present)).sum())),
    }


def colourfulness(rgb: np.ndarray) -> float:
    """How colourful a picture looks: 0 grey, 15 slightly, 45 quite, over 80 extremely.

    Args:
        rgb: (H, W, 3) int16.
    Source: Hasler and Süsstrunk 2003, "Measuring colourfulness in natural images".
    """
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    red_green = red - green
    twice_yellow_blue = red + green - 2 * blue  # doubled, so that it stays whole
    spread = _variance(red_green) + _variance(twice_yellow_blue) / 4
    offset = float(red_green.mean()) ** 2 + float(twice_yellow_blue.mean()) ** 2 / 4
    return math.sqrt(spread) + 0.3 * math.sqrt(offset)


def blockiness(stored: np.ndarray) -> float | None:
    """Mean step across the lines of the 8-px JPEG grid, over the mean step elsewhere.

    Args:
        stored: (H, W) uint8, in the orientation of the file: its grid starts at the top left.

    Returns:
        1 where no grid shows, as in a flat picture; more with stronger compression. None where
        the picture is too small to cross a line.
    """
    crop = stored[_centred(stored.shape[0]), _centred(stored.shape[1])].astype(np.int16)
    if max(crop.shape) <= 8:
        return None
    on_sum = on_count = all_sum = all_count = 0
    for axis in (0, 1):
        steps = np.abs(np.diff(crop, axis=axis))
        lines = steps[7::8] if axis == 0 else steps[:, 7::8]
        on_sum += int(lines.sum(dtype=np.int64))
        on_count += lines.size
        all_sum += int(steps.sum(dtype=np.int64))
        all_count += steps.size
    off_sum, off_count = all_sum - on_sum, all_count - on_count
    if on_sum == off_sum == 0:
        return 1.0
    # Blocks of one flat colour have no step elsewhere; count one level in all, to stay finite.
    return (on_sum / on_count) / (max(off_sum, 1) / off_count)


def _centred(side_px: int) -> slice:
    start = max(0, side_px - LONG_SIDE_PX) // 2 // 8 * 8
    return slice(start, start + LONG_SIDE_PX)


def border_fraction(luma: np.ndarray) -> float:
    """Share of the picture's area that is a uniform border: bars, frames, blank margins.

    From each side inwards, lines belong to the border as long as all their pixels together span
    at most 12 grey levels. Bars above and below give just the share of rows that they take.
    """
    height, width = luma.shape
    rows = _inner_lines(luma.min(axis=1), luma.max(axis=1))
    columns = _inner_lines(luma.min(axis=0), luma.max(axis=0))
    return 1 - (rows / height) * (columns / width)


def _inner_lines(low: np.ndarray, high: np.ndarray) -> int:
    """Number of lines left when the uniform ones at both ends are taken off."""
    first = _uniform_run(low, high)
    last = _uniform_run(low[::-1], high[::-1])
    return max(0, len(low) - first - last)


def _uniform_run(low: np.ndarray, high: np.ndarray) -> int:
    span = np.maximum.accumulate(high).astype(np.int16) - np.minimum.accumulate(low)
    return int((span <= BORDER_LEVELS).sum())


def _as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """A view of the upright picture as it lies in the file, before its EXIF orientation."""
    match orientation:
        case 2:
            return upright[:, ::-1]
        case 3:
            return upright[::-1, ::-1]
        case 4:
            return upright[::-1]
        case 5:
            return upright.T
        case 6:
            return np.rot90(upright)
        case 7:
            return upright[::-1, ::-1].T
        case 8:
            return np.rot90(upright, -1)
    return upright


def _variance(values: np.ndarray) -> float:
    """Population variance of whole numbers, free of rounding."""
    wide = values.astype(np.int32)
    total = int(wide.sum(dtype=np.int64))
    squares = int((wide * wide).sum(dtype=np.int64))
    return (squares * wide.size - total * total) / wide.size**2
