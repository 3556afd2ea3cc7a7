"""Take everything out of an image file but its pixels, its colour profile and its orientation.

No pixel is re-encoded. JPEG, PNG, WebP, GIF, JPEG 2000 and BMP are copied segment by segment
(`strip_segments.py`); TIFF and AVIF, whose parts are named by their offsets, range by range
(`strip_offsets.py`). A segment is kept because it is on a list of what decoding needs; so one that
nobody has heard of is dropped. Files of any other format, or laid out too strangely to cut, are
packed losslessly as PNG: other bytes, the same pixels.
"""

from __future__ import annotations

import io
import struct
import warnings

from sdprep.errors import DataError
from sdprep.exif import minimal_exif, orientation_of
from sdprep.strip_offsets import strip_avif, strip_tiff
from sdprep.strip_segments import (
    strip_bmp,
    strip_gif,
    strip_jpeg,
    strip_jpeg2000,
    strip_png,
    strip_webp,
)

EXTENSIONS = (
    (0, b"\xff\xd8\xff", "jpg"),
    (0, b"\x89PNG\r\n\x1a\n", "png"),
    (8, b"WEBP", "webp"),
    (0, b"GIF8", "gif"),
    (4, b"ftyp", "avif"),
    (0, b"II*\0", "tif"),
    (0, b"MM\0*", "tif"),
    (0, b"II+\0", "tif"),
    (0, b"MM\0+", "tif"),
    (4, b"jP  ", "jp2"),
    (0, b"\xff\x4f\xff\x51", "j2k"),
    (0, b"BM", "bmp"),
)


_TURNED_BY_EXIF = {
    "JPEG": strip_jpeg,
    "MPO": strip_jpeg,  # a JPEG followed by more of them
    "PNG": strip_png,
    "WEBP": strip_webp,
}
_OTHERS = {
    "GIF": strip_gif,
    "BMP": strip_bmp,
    "JPEG2000": strip_jpeg2000,
    "TIFF": strip_tiff,
    "AVIF": strip_avif,
}

_UPRIGHT_WHEN_LOADED = ("TIFF", "HEIF", "JXL")  # their decoders turn the pixels themselves


def strip_metadata(data: bytes, format: str, *, orientation: int | None = None) -> bytes:
    """The same picture without EXIF, XMP, IPTC, comments, thumbnails and appended data.

    Args:
        data: a whole image file that Pillow can decode.
        format: Pillow's name of its format, such as `JPEG`.
        orientation: 1 to 8 as found at ingest; None reads it from the file.

    Returns:
        A file of the same format, with the ICC profile and a minimal EXIF that holds only the
        orientation where that is not 1; or a PNG, where the format has no lossless way.

    Raises:
        DataError: the file is damaged, or has pixels that PNG cannot hold (such as CMYK in PSD).
    """
    try:
        if format in _TURNED_BY_EXIF:
            return _TURNED_BY_EXIF[format](data, orientation)
        if format in _OTHERS:
            return _OTHERS[format](data)
    except (ValueError, struct.error, IndexError):
        pass  # laid out strangely; a length that lies ends in one of the three
    return _packed_as_png(data, format)


def image_extension(data: bytes) -> str:
    """File name extension that fits the first bytes of a stripped file; `bin` if none does."""
    for offset, magic, extension in EXTENSIONS:
        if data[offset : offset + len(magic)] == magic:
            return extension
    return "bin"


def _packed_as_png(data: bytes, format: str) -> bytes:
    """The first frame's pixels, untouched, in a PNG with profile and orientation."""
    from PIL import Image

    orientation = 1 if format in _UPRIGHT_WHEN_LOADED else orientation_of(data)
    packed = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                profile = image.info.get("icc_profile")
                exif = minimal_exif(orientation) if orientation != 1 else None
                image.load()
                image.save(packed, "PNG", icc_profile=profile, exif=exif)
    except Exception as error:  # Pillow raises a dozen kinds on damaged files
        raise DataError(
            f"metadata of this {format} file cannot be removed: {type(error).__name__}: {error}",
            "Convert it to JPEG, PNG or WebP, or reject it.",
        ) from None
    return packed.getvalue()
