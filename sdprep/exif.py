"""The one EXIF entry that outlives the removal of metadata: the orientation."""

from __future__ import annotations

import io
import struct
import warnings

ORIENTATION = 0x0112


def orientation_of(data: bytes) -> int:
    """EXIF orientation 1 to 8 as Pillow reads it, from EXIF or XMP; 1 if there is none.

    Damaged metadata count as none, as they do when the picture is opened for training.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow raises a dozen kinds on damaged EXIF
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def minimal_exif(orientation: int) -> bytes:
    """A TIFF header with one entry, the orientation (26 bytes)."""
    entry = struct.pack(">HHIHH", ORIENTATION, 3, 1, orientation, 0)
    return b"MM\0*" + struct.pack(">IH", 8, 1) + entry + b"\0\0\0\0"
