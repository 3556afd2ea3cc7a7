"""What JoyTag and the WD taggers look at: the picture in a white square, made smaller."""

from __future__ import annotations

import numpy as np
from PIL import Image

WHITE = (255, 255, 255)
MAX_SIDE_PX = 32_768
_PIXELS_AT_ONCE = 1 << 24


def white_square(image: Image.Image, side_px: int) -> np.ndarray:
    """Centre the picture in a white square (offsets rounded down), then resize it bicubically.

    Args:
        image: mode RGB, transparency composited on white already.

    Returns:
        (side_px, side_px, 3) uint8, RGB.
    Raises:
        ValueError: a side is longer than 32,768 px.
    """
    side = max(image.size)
    if side > MAX_SIDE_PX:
        raise ValueError(f"{image.width}x{image.height}: no side may be over {MAX_SIDE_PX:,} px")
    left, top = (side - image.width) // 2, (side - image.height) // 2
    if side == side_px:
        return np.asarray(_padded(image, (side, side), left, top))
    rows = max(1, _PIXELS_AT_ONCE // side)
    # Pillow resizes rows first, then columns, so rows may be done in parts: the same pixels,
    # without a square of gigabytes for a long and narrow picture.
    narrow = Image.new("RGB", (side_px, side))
    for start in range(0, side, rows):
        end = min(start + rows, side)
        first, last = (min(max(row - top, 0), image.height) for row in (start, end))
        strip = image.crop((0, first, image.width, last))
        part = _padded(strip, (side, end - start), left, max(top - start, 0))
        narrow.paste(part.resize((side_px, end - start), Image.Resampling.BICUBIC), (0, start))
    return np.asarray(narrow.resize((side_px, side_px), Image.Resampling.BICUBIC))


def _padded(image: Image.Image, size: tuple[int, int], left: int, top: int) -> Image.Image:
    canvas = Image.new("RGB", size, WHITE)
    canvas.paste(image, (left, top))
    return canvas
