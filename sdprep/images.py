"""Open one image file the same way everywhere: upright, sRGB, 8 bits, alpha taken apart.

Used by every stage and by the trainer, from any thread: nothing of Pillow's global state
(pixel limit, tolerance of truncated files, warning filters) is read for a verdict or changed.
"""

from __future__ import annotations

import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sdprep.colour import BadProfile, plain_rgb, split_alpha, to_srgb
from sdprep.errors import DataError
from sdprep.formats import ANIMATIONS, PLUGIN_PACKAGES, ends_early, open_lazily, opener, sniff

MAX_PIXELS = 178_956_970
"""Largest accepted area: twice Pillow's own limit."""

NEEDS_PLUGIN = "needs_plugin:"
"""Prefix of the reason for a format that Pillow reads once the named package is installed."""


class ImageRejected(DataError):
    """A file that is no usable image.

    Args:
        reason: empty_file, not_an_image, truncated, decode_error, too_many_pixels, animated,
            missing_file, unreadable, or `needs_plugin:<package>`.
        detail: what exactly was found, for people.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class ImageInfo:
    """What a file said about its image, before conversion; width and height are upright."""

    width: int
    height: int
    format: str
    mode: str
    frames: int
    exif_orientation: int  # 1..8; 1 when there is none
    has_alpha: bool  # the file stores alpha, though it may be opaque everywhere
    warnings: tuple[str, ...] = ()  # bad_exif, bad_icc, depth_stretched


@dataclass(frozen=True)
class OpenedImage:
    """An image as all stages see it."""

    image: Image.Image  # mode RGB, upright, sRGB, composited on the background
    alpha: Image.Image | None  # mode L, upright; None where the image is opaque
    info: ImageInfo


def open_image(
    source: bytes | Path,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    first_frame: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> OpenedImage:
    """Decode an image: EXIF orientation, ICC to sRGB, depth, CMYK, alpha on `background`, RGB8.

    Args:
        source: the file's bytes, or its path.
        background: RGB, 0..255, what shows through where the image is transparent.
        first_frame: take the first frame of an animation instead of rejecting it.
        max_pixels: largest width x height, judged by the header before anything is decoded.
    Raises:
        ImageRejected: with the reason; nothing else, whatever the bytes are.
    """
    data = source if isinstance(source, bytes) else _read(source)
    name = _format_of(data)
    try:
        return _open(data, name, background, first_frame, max_pixels)
    except ImageRejected:
        raise
    except Exception as error:  # decoders raise anything at all on hostile bytes
        raise ImageRejected(_reason(error, data, name), f"{name}: {error}") from error


def _read(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would block for ever
            raise ImageRejected("not_an_image", f"{path} is not a regular file")
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageRejected("missing_file", str(path)) from None
    except OSError as error:
        raise ImageRejected("unreadable", f"{path}: {error.strerror}") from error


def _format_of(data: bytes) -> str:
    if not data:
        raise ImageRejected("empty_file", "0 bytes")
    name = sniff(data[:64])
    if name is None:
        raise ImageRejected("not_an_image", f"begins with {data[:12]!r}, which no format does")
    if opener(name) is None:
        package = PLUGIN_PACKAGES[name]
        raise ImageRejected(NEEDS_PLUGIN + package, f"{name} needs: pip install {package}")
    return name


def _open(
    data: bytes, name: str, background: tuple[int, int, int], first_frame: bool, max_pixels: int
) -> OpenedImage:
    lazy, _ = open_lazily(data, name)
    width, height = lazy.size
    if width * height > max_pixels:
        raise ImageRejected("too_many_pixels", f"{width}x{height}, allowed are {max_pixels:,}")
    mode, frames = lazy.mode, int(getattr(lazy, "n_frames", 1))
    if frames > 1 and name in ANIMATIONS and not first_frame:
        raise ImageRejected("animated", f"{frames} frames; sdprep ingest --first-frame takes one")
    stored = vars(lazy)["tag_v2"].get(_ORIENTATION_TAG, 1) if name == "TIFF" else None
    lazy.load()
    orientation, exif_is_good = _orientation(lazy, stored)
    image: Image.Image = lazy if name in _UPRIGHT_WHEN_LOADED else _upright(lazy, orientation)
    image, alpha, is_stretched = split_alpha(image)
    image, icc_is_good = _converted(image, lazy.info)
    has_alpha = alpha is not None
    if alpha is not None and alpha.getextrema() == (255, 255):
        alpha = None
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, background), alpha)
    if image is lazy:
        image = image.copy()  # lets go of the file's bytes
    image.info = {}
    flags = {"bad_exif": not exif_is_good, "bad_icc": not icc_is_good}
    flags["depth_stretched"] = is_stretched
    notes = tuple(flag for flag, is_set in flags.items() if is_set)
    info = ImageInfo(*image.size, name, mode, frames, orientation, has_alpha, notes)
    return OpenedImage(image, alpha, info)


def _converted(image: Image.Image, info: dict[Any, Any]) -> tuple[Image.Image, bool]:
    """Pixels in sRGB, and False if the embedded profile had to be ignored."""
    profile = info.get("icc_profile")
    try:
        return to_srgb(image, profile), "icc_profile" not in info or bool(profile)
    except BadProfile:
        return plain_rgb(image), False


def _reason(error: Exception, data: bytes, name: str) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "too_many_pixels"
    if isinstance(error, MemoryError):
        return "decode_error"
    text = str(error).lower()
    ran_out = "truncated" in text or "not enough image data" in text
    if isinstance(error, EOFError) or ran_out or ends_early(data, name):
        return "truncated"
    return "decode_error"


# --- orientation --------------------------------------------------------------------------------

_ORIENTATION_TAG = 0x0112
_UPRIGHT_WHEN_LOADED = ("TIFF", "HEIF", "JXL")  # their decoders turn the pixels themselves
_OPERATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    operation = _OPERATIONS.get(orientation)
    return image if operation is None else image.transpose(operation)


def _orientation(image: Image.Image, stored: int | None) -> tuple[int, bool]:
    """EXIF orientation 1..8 of a loaded image, and whether its EXIF data is sound.

    Args:
        stored: the value, where the format has a tag of its own; else None.
    """
    is_sound, found = True, stored
    if found is None:
        found, is_sound = exif_orientation(_exif_bytes(image.info))
    if found is None:
        found = _xmp_orientation(image.info)
    if found in range(1, 9):
        return int(found), is_sound
    return 1, False


def _exif_bytes(info: dict[Any, Any]) -> bytes:
    exif = info.get("exif")
    if isinstance(exif, bytes):
        return exif.removeprefix(b"Exif\x00\x00")
    text = info.get("Raw profile type exif")  # how ImageMagick stores EXIF in a PNG
    if not isinstance(text, str):
        return b""
    try:
        return bytes.fromhex("".join(text.split("\n")[3:])).removeprefix(b"Exif\x00\x00")
    except ValueError:
        return b"broken"


def _xmp_orientation(info: dict[Any, Any]) -> int:
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp") or b""
    text = xmp.encode() if isinstance(xmp, str) else bytes(xmp)
    match = re.search(rb'tiff:Orientation(?:="|>)([0-9])', text)
    return int(match[1]) if match else 1


def exif_orientation(tiff: bytes) -> tuple[int | None, bool]:
    """The orientation in an EXIF block, and whether the block could be walked to its end.

    Read here rather than by Pillow, which reports broken blocks through Python warnings only.

    Args:
        tiff: the block without its `Exif` prefix; empty when the file has none.
    Returns:
        the stored value, None when there is no such tag; False for a block that is cut off.
    """
    if not tiff:
        return None, True
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return None, False
    found, is_sound, todo, seen = None, True, [struct.unpack_from(order + "I", tiff, 4)[0]], 0
    while todo and seen < 16:
        seen += 1
        try:
            tags, sound = _directory(tiff, todo.pop(), order)
        except struct.error:
            is_sound = False
            continue
        is_sound = is_sound and sound
        if seen == 1:
            found = tags.get(_ORIENTATION_TAG)
            todo += [tags[tag] for tag in (0x8769, 0x8825) if tag in tags]  # EXIF and GPS blocks
    return found, is_sound


_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}


def _directory(tiff: bytes, start: int, order: str) -> tuple[dict[int, int], bool]:
    """Small integer tags of one directory, and whether all its values lie within the block."""
    (count,) = struct.unpack_from(order + "H", tiff, start)
    tags: dict[int, int] = {}
    is_sound = True
    for index in range(count):
        at = start + 2 + 12 * index
        try:
            tag, kind, number, value = struct.unpack_from(order + "HHII", tiff, at)
        except struct.error:
            return tags, False
        size = _TYPE_SIZES.get(kind, 0) * number
        if kind not in _TYPE_SIZES or (size > 4 and value + size > len(tiff)):
            is_sound = False
        elif number == 1 and kind in (3, 4):
            tags[tag] = struct.unpack_from(order + "HI"[kind == 4], tiff, at + 8)[0]
    return tags, is_sound
