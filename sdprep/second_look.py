"""The second look: where signatures agree, do the aligned thumbnails agree too.

Signatures of a subject on plain ground are close although the subjects differ, and at 17 to 28 bits
unrelated photos begin to meet. So thumbnails are compared by gradients, which plain ground has
none of, as a whole and window by window.

Numbers behind the constants (g: correlation of gradients; w: fourth lowest of 49 windows):
- four drawings of one character on white (dreambooth/red_cartoon): 11 to 18 bits, so most would
  stand by distance alone, and luma correlation up to .93, so the usual .9 accepts them;
  g .48 to .75, w at most .60;
- other photos of one subject or shoot within 17 to 28 bits: g at most .53;
- edits that must be found: g from .83 with a watermark of half opacity (.89 in near_duplicates);
  where a crop or border shifts the picture by a pixel g falls to .42, and w stays above .79.
With them tools/bench/near_duplicates.py finds all 78 gated edits of near_duplicates and 3,628 of
3,630 made from dreambooth and skimage (lost: broad writing of 63 % opacity on two of the pictures
of the sky), and merges no two photos.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from sdprep.signatures import LUMA_PX, THUMBNAIL_PX, Box

PLAIN_SHARE = 0.5  # of the thumbnail without gradient: the signature is about an outline only
STILL_GRADIENT = 0.5  # grey levels per thumbnail pixel
MIN_G_PLAIN = 0.8
MIN_G_CLOSE = 0.5  # up to the distance that stands by itself: only a contradiction counts
MIN_G_FAR = 0.7
WINDOW_PX, WINDOW_STEP_PX = 16, 8
WINDOW_GRADIENT = 1.0  # rms grey levels per pixel that both windows need to be compared
MIN_WINDOW_COVERAGE = 0.5
MIN_WORST_WINDOW, MIN_FOURTH_WINDOW = 0.5, 0.7
HOPELESS_G = 0.2  # windows are not worth a look


def crop_thumbnail(thumbnail: np.ndarray, box: Box, *, is_mirrored: bool = False) -> np.ndarray:
    """One view of a thumbnail, enlarged to its size.

    Args:
        thumbnail: (64, 64) uint8.
        box: in the 256-px luma.
        is_mirrored: flip left to right.
    Returns:
        (64, 64) float32.
    """
    if box != (0, 0, LUMA_PX, LUMA_PX):
        scale = THUMBNAIL_PX / LUMA_PX
        left, top, right, bottom = (edge * scale for edge in box)
        image = Image.fromarray(thumbnail).resize(
            (THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BILINEAR, (left, top, right, bottom)
        )
        thumbnail = np.asarray(image)
    return (thumbnail[:, ::-1] if is_mirrored else thumbnail).astype(np.float32)


def gradients(levels: np.ndarray) -> np.ndarray:
    """(2, 64, 64) float32, d/dx and d/dy of the slightly smoothed levels."""
    padded = np.pad(levels, 1, "edge")
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    padded = np.pad((rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4, 1, "edge")
    across = padded[1:-1, 2:] - padded[1:-1, :-2]
    down = padded[2:, 1:-1] - padded[:-2, 1:-1]
    return np.stack([across, down]) / 2


def is_plain(thumbnail: np.ndarray) -> bool:
    """Whether most of an image is ground without any structure."""
    steepness = np.sqrt((gradients(thumbnail.astype(np.float32)) ** 2).sum(axis=0))
    return bool((steepness < STILL_GRADIENT).mean() >= PLAIN_SHARE)


def agrees(first: np.ndarray, second: np.ndarray, *, is_close: bool, is_plain: bool) -> bool:
    """Whether two views whose signatures agree show one photo.

    Args:
        first: (64, 64) float32, thumbnail of the one.
        second: of the other, aligned with it.
        is_close: their distance is one that stands by itself unless contradicted.
        is_plain: one of the images is mostly plain ground.
    """
    one, two = gradients(first), gradients(second)
    norm = float(np.sqrt((one**2).sum() * (two**2).sum()))
    whole = float((one * two).sum()) / norm if norm > 0 else 0.0
    if whole >= (MIN_G_PLAIN if is_plain else MIN_G_CLOSE if is_close else MIN_G_FAR):
        return True
    return whole >= HOPELESS_G and _windows_agree(one, two)


def _windows_agree(one: np.ndarray, two: np.ndarray) -> bool:
    """Whether windows agree nearly everywhere, each allowed to be shifted by one pixel."""
    inner = slice(1, THUMBNAIL_PX - 1)
    fixed = one[:, inner, inner]
    energy = _window_sums((fixed**2).sum(axis=0))
    best = np.full_like(energy, -1)
    least = np.zeros_like(energy)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            moved = two[:, 1 + dy : THUMBNAIL_PX - 1 + dy, 1 + dx : THUMBNAIL_PX - 1 + dx]
            other = _window_sums((moved**2).sum(axis=0))
            if dy == dx == 0:
                least = np.minimum(energy, other)
            product = _window_sums((fixed * moved).sum(axis=0))
            best = np.maximum(best, product / np.sqrt(energy * other + 1e-9))
    is_compared = least > WINDOW_PX**2 * WINDOW_GRADIENT**2
    if is_compared.mean() < MIN_WINDOW_COVERAGE:
        return False
    found = np.sort(best[is_compared])
    return bool(found[0] >= MIN_WORST_WINDOW and found[3] >= MIN_FOURTH_WINDOW)


def _window_sums(values: np.ndarray) -> np.ndarray:
    """Sums over 16-px windows, 8 px apart; float64."""
    sums = np.pad(values.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    start = np.arange(0, len(values) - WINDOW_PX + 1, WINDOW_STEP_PX)
    rows, columns = start[:, None], start[None]
    return (
        sums[rows + WINDOW_PX, columns + WINDOW_PX]
        - sums[rows, columns + WINDOW_PX]
        - sums[rows + WINDOW_PX, columns]
        + sums[rows, columns]
    )
