"""The quality setting that a JPEG was written with, read from its quantisation tables."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from sdprep.formats import open_lazily


def jpeg_quality(data: bytes) -> int | None:
    """Quality, 1..100, at which a JPEG was written; None for any other format.

    Exact for the tables of the Independent JPEG Group; for others the quality whose table is
    nearest (least sum of absolute differences, the lower of two equally near).
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    header, _ = open_lazily(data, "JPEG")
    tables = getattr(header, "quantization", None)
    if not tables:
        return None
    table = np.asarray(tables[min(tables)], dtype=np.int64)
    distance = np.abs(_ijg_tables() - table).sum(axis=1)
    return int(np.argmin(distance)) % 100 + 1


def coarseness_percent(quality: int) -> int:
    """Coarseness of the quantisation at one quality, in percent of the standard tables.

    Source: `jpeg_quality_scaling` of libjpeg.
    """
    return 5000 // quality if quality < 50 else 200 - 2 * quality


# fmt: off
_IJG_LUMINANCE = (
    16, 11, 10, 16, 24, 40, 51, 61,
    12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77,
    24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)
# fmt: on


@lru_cache
def _ijg_tables() -> np.ndarray:
    """(200, 64) luminance tables of quality 1..100: first limited to 8 bits, then to 15.

    Source: ITU-T T.81 annex K.1, scaled as `jpeg_quality_scaling` of libjpeg does.
    """
    base = np.asarray(_IJG_LUMINANCE, dtype=np.int64)
    scaled = (
        np.outer([coarseness_percent(quality) for quality in range(1, 101)], base) + 50
    ) // 100
    return np.concatenate([scaled.clip(1, 255), scaled.clip(1, 32767)])
