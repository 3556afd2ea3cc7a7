"""Tags that follow from the file: size, animation, rotation, colour and transparency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image, ImageChops

from sdprep.annotate import PixelNeeds, Sample
from sdprep.recipe import AnnotatorConfig
from sdprep.schema import SCORED_TAG
from sdprep.size_tags import size_tags

COLUMNS = pa.schema([pa.field("tags", pa.list_(SCORED_TAG))])

_ANIMATED = {"GIF": "animated_gif", "PNG": "animated_png"}
_ROTATING = (3, 6, 8)  # 180, 90, 270 degrees; those that also mirror are not meant [danbooru]
_SAMPLE_SIDE_PX = 512
_STEPS_PER_DEGREE = 100


class Config(AnnotatorConfig):
    """Danbooru's automatic tags, and a few that need the pixels; needs no model."""

    type: Literal["attributes"] = "attributes"

    def build(self) -> AttributesTagger:
        """Make the tagger."""
        return AttributesTagger()


class AttributesTagger:
    """Fills `tags_attributes`; every tag is of category meta and certain."""

    columns = COLUMNS
    pixels = PixelNeeds(alpha=True)
    fingerprint = '{"name": "attributes", "version": 1}'
    batch_size = 16
    is_thread_safe = True

    def annotate(self, batch: Sequence[Sample]) -> pa.RecordBatch:
        """Tag each sample by itself."""
        rows = [{"tags": [_meta(name) for name in attributes(sample)]} for sample in batch]
        return pa.RecordBatch.from_pylist(rows, schema=COLUMNS)


def _meta(name: str) -> dict[str, Any]:
    return {"name": name, "p": 1.0, "category": "meta"}


def attributes(sample: Sample) -> list[str]:
    """Every tag whose rule applies, in a fixed order."""
    assert sample.image is not None
    row = sample.row
    names = size_tags(row["width"], row["height"])
    if (row.get("frames") or 1) >= 2 and row["format"] in _ANIMATED:
        names.append(_ANIMATED[row["format"]])
    if row.get("exif_orientation") in _ROTATING:
        names.append("exif_rotation")
    names += colour_tags(sample.image, is_one_channel=_is_one_channel(row.get("mode")))
    if sample.alpha is not None and is_background_transparent(sample.alpha):
        names.append("transparent_background")
    return names


def _is_one_channel(mode: str | None) -> bool:
    """Whether Pillow's mode stores one channel of colour; a palette does not say."""
    return mode is not None and mode.split(";")[0] in ("1", "L", "LA", "La", "I", "F")


def colour_tags(image: Image.Image, is_one_channel: bool = False) -> list[str]:
    """Tags `greyscale` and `monochrome`, judged by every pixel of the stored resolution.

    Greyscale: a file of one channel, or at most 0.1 % of the pixels have a chroma (largest minus
    smallest channel) over 8. Every greyscale picture is monochrome. Monochrome too: at least 99 %
    of the pixels with a chroma over 16 lie within an arc of 30 degrees of hue; also where no
    pixel has, since then there is no second colour.
    """
    if is_one_channel:
        return ["greyscale", "monochrome"]
    red, green, blue = image.split()
    high = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    low = ImageChops.darker(ImageChops.darker(red, green), blue)
    counts = ImageChops.subtract(high, low).histogram()
    if 1000 * sum(counts[9:]) <= image.width * image.height:
        return ["greyscale", "monochrome"]
    return ["monochrome"] if _is_one_hue(np.asarray(image), sum(counts[17:])) else []


def _is_one_hue(rgb: np.ndarray, num_chromatic: int) -> bool:
    """Whether 99 % of the chromatic pixels share an arc of 30 degrees of hue.

    Args:
        rgb: (H, W, 3) uint8.
        num_chromatic: pixels in `rgb` with a chroma over 16.
    """
    # What every arc leaves out of some of the pixels, it leaves out of all of them. So a thin
    # sample settles nearly every picture of many colours; the others are counted in full.
    step = max(1, min(rgb.shape[:2]) // _SAMPLE_SIDE_PX)
    for part in (rgb[::step, ::step], rgb) if step > 1 else (rgb,):
        outside = _outside_best_arc(hue_steps(part))
        if 100 * outside > num_chromatic:
            return False
    return True


def hue_steps(rgb: np.ndarray) -> np.ndarray:
    """Hue of the pixels with a chroma over 16, in hundredths of a degree, 0..35999.

    Args:
        rgb: (..., 3) uint8.
    """
    pixels = rgb.reshape(-1, 3)
    red, green, blue = (pixels[:, channel].astype(np.int16) for channel in range(3))
    high = np.maximum(np.maximum(red, green), blue)
    chroma = high - np.minimum(np.minimum(red, green), blue)
    chosen = np.flatnonzero(chroma > 16)
    red, green, blue = red[chosen], green[chosen], blue[chosen]
    high, chroma = high[chosen], chroma[chosen].astype(np.float64)
    sixth = np.where(
        high == red,
        (green - blue) / chroma,
        np.where(high == green, 2 + (blue - red) / chroma, 4 + (red - green) / chroma),
    )
    steps = np.rint(sixth * 60 * _STEPS_PER_DEGREE).astype(np.int64)
    return steps % (360 * _STEPS_PER_DEGREE)


def _outside_best_arc(steps: np.ndarray) -> int:
    """Number of hues outside the closed arc of 30 degrees that holds most of them."""
    circle = 360 * _STEPS_PER_DEGREE
    arc = 30 * _STEPS_PER_DEGREE + 1  # both ends belong to it
    counts = np.bincount(steps, minlength=circle)
    running = np.concatenate([[0], np.cumsum(np.concatenate([counts, counts[: arc - 1]]))])
    return int(counts.sum() - (running[arc:] - running[:-arc]).max())


def is_background_transparent(alpha: Image.Image) -> bool:
    """Whether at least half of the outermost ring of pixels is nearly clear (alpha under 16)."""
    values = np.asarray(alpha)
    is_ring = np.ones(values.shape, dtype=bool)
    is_ring[1:-1, 1:-1] = False
    ring = values[is_ring]
    return bool(2 * int((ring < 16).sum()) >= ring.size)
