"""File formats: which one some bytes are, how they are opened, and whether they end too early.

Plugins of Pillow are called by name instead of through `Image.open`: only formats that have a
magic number are tried (EPS would start Ghostscript), and Pillow's global pixel limit, with its
warning, stays out of the way of ours.
"""

from __future__ import annotations

import importlib
import struct
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import ImageFile

EXTENSIONS = {
    "AVIF": ("avif", "avifs"),
    "BMP": ("bmp", "dib"),
    "GIF": ("gif",),
    "HEIF": ("heic", "heif", "heics", "heifs", "hif"),
    "ICO": ("ico", "cur"),
    "JPEG": ("jpg", "jpeg", "jpe", "jfif", "jif", "mpo"),
    "JPEG2000": ("jp2", "j2k", "jpf", "jpx", "jpc", "j2c"),
    "JXL": ("jxl",),
    "PNG": ("png", "apng"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "PSD": ("psd",),
    "QOI": ("qoi",),
    "TIFF": ("tif", "tiff"),
    "WEBP": ("webp",),
}
"""File name extensions of each format that may hold a photo, lower case, without the dot."""

FORMAT_OF_EXTENSION = {name: form for form, names in EXTENSIONS.items() for name in names}

ANIMATIONS = ("AVIF", "GIF", "HEIF", "JXL", "PNG", "TIFF", "WEBP")
"""Formats whose further frames are pictures of their own (in a PSD they are layers)."""

PLUGIN_PACKAGES = {"HEIF": "pillow-heif", "JXL": "pillow-jxl-plugin"}
"""Formats that Pillow reads only with another package installed."""

_CLASSES = {
    "AVIF": ("AvifImagePlugin", "AvifImageFile"),
    "BMP": ("BmpImagePlugin", "BmpImageFile"),
    "GIF": ("GifImagePlugin", "GifImageFile"),
    "ICO": ("IcoImagePlugin", "IcoImageFile"),
    # The class, not Pillow's factory: phones append previews and gain maps, which would make an
    # ordinary photo look like an animation of format MPO.
    "JPEG": ("JpegImagePlugin", "JpegImageFile"),
    "JPEG2000": ("Jpeg2KImagePlugin", "Jpeg2KImageFile"),
    "PNG": ("PngImagePlugin", "PngImageFile"),
    "PPM": ("PpmImagePlugin", "PpmImageFile"),
    "PSD": ("PsdImagePlugin", "PsdImageFile"),
    "QOI": ("QoiImagePlugin", "QoiImageFile"),
    "TIFF": ("TiffImagePlugin", "TiffImageFile"),
    "WEBP": ("WebPImagePlugin", "WebPImageFile"),
}

_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"BM", "BMP"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"\x00\x00\x02\x00", "ICO"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JXL"),
    (b"\xff\x0a", "JXL"),
    (b"8BPS", "PSD"),
    (b"qoif", "QOI"),
)


def sniff(head: bytes) -> str | None:
    """Name the format by its first bytes (32 are enough), or None for anything unknown."""
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return _sniff_brands(head)
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3] in (b" ", b"\t", b"\n", b"\r"):
        return "PPM"
    return None


def _sniff_brands(head: bytes) -> str | None:
    """Tell AVIF from HEIF by the brands of an ISO media file."""
    length = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[8:12]] + [head[at : at + 4] for at in range(16, length, 4)]
    if any(brand in (b"avif", b"avis") for brand in brands):
        return "AVIF"
    heif = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    return "HEIF" if any(brand in heif for brand in brands) else None


@lru_cache
def opener(name: str) -> Any | None:
    """The callable that opens a format from a file object, or None if its package is missing."""
    if name in _CLASSES:
        module, cls = _CLASSES[name]
        return getattr(importlib.import_module(f"PIL.{module}"), cls)
    try:
        if name == "HEIF":
            return importlib.import_module("pillow_heif").HeifImageFile
        importlib.import_module("pillow_jxl")
    except ImportError:
        return None
    from PIL import Image

    return Image.OPEN["JXL"][0]


class WatchedBytes(BytesIO):
    """Bytes in memory that note when a reader asks for more than there is."""

    ran_out = False

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as a file does; a short answer is noted in `ran_out`."""
        found = super().read(size)
        if size is not None and size > len(found):
            self.ran_out = True
        return found


def open_lazily(data: bytes, name: str) -> tuple[ImageFile.ImageFile, WatchedBytes]:
    """Open `data` as format `name` up to the header.

    Raises:
        Exception: whatever the plugin raises; what it ran into is for the caller to name.
    """
    file = WatchedBytes(data)
    make = opener(name)
    assert make is not None, name
    try:
        return make(file, ""), file
    except Exception as error:
        if file.ran_out and not isinstance(error, MemoryError):
            raise EOFError(f"the header is cut off: {error}") from error
        raise


def ends_early(data: bytes, name: str) -> bool:
    """Whether the container itself says that there should be more bytes than there are."""
    if name == "WEBP":
        return len(data) < 12 or int.from_bytes(data[4:8], "little") + 8 > len(data)
    if name == "PNG":
        return not _png_is_whole(data)
    if name in ("AVIF", "HEIF") or data.startswith(b"\x00\x00\x00\x0c"):
        return not _boxes_are_whole(data)
    return False


def _png_is_whole(data: bytes) -> bool:
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if not kind.isalpha():
            return True  # nonsense, not a lack of bytes
        at += 12 + length
        if kind == b"IEND":
            return at <= len(data)
    return False


def _boxes_are_whole(data: bytes) -> bool:
    at = 0
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if length == 0:  # this box reaches to the end, wherever that is
            return True
        if length == 1 and at + 16 <= len(data):
            length = int.from_bytes(data[at + 8 : at + 16], "big")
        if length < 8:
            return True  # nonsense, not a lack of bytes
        at += length
    return at == len(data)
