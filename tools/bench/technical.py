"""Measure how fast the annotators without a model run on pictures of common sizes.

Usage: python tools/bench/technical.py [IMAGE...]
Prints milliseconds an image, on one thread, for the decode and for each annotator beside it.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from sdprep.annotate import Annotator, Sample
from sdprep.images import open_image
from sdprep.scorers import technical
from sdprep.taggers import attributes

SIZES_PX = ((512, 512), (1024, 1024), (2048, 1536), (4000, 3000))


def milliseconds(work: Callable[[], object], seconds: float = 1.0) -> float:
    """Least time of one call among those that fit into `seconds`, at least three."""
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def made_up_jpeg(size: tuple[int, int]) -> bytes:
    """A JPEG with structure at every scale, so that no branch gets an easy picture."""
    rng = np.random.default_rng(0)
    picture = Image.new("RGB", size, (128, 128, 128))
    for grid in (4, 32, 256):
        coarse = Image.fromarray(rng.integers(0, 256, (grid, grid, 3), dtype=np.uint8))
        picture = Image.blend(picture, coarse.resize(size, Image.Resampling.BICUBIC), 0.4)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def main(paths: list[str]) -> None:
    """Print one line per picture."""
    files = {path: Path(path).read_bytes() for path in paths}
    files = files or {f"{w}x{h}": made_up_jpeg((w, h)) for w, h in SIZES_PX}
    annotators: dict[str, Annotator] = {
        "technical": technical.Config().build(),
        "attributes": attributes.Config().build(),
    }
    for name, data in files.items():
        opened = open_image(data)
        row = {"exif_orientation": 1, "frames": 1, "format": "JPEG", "mode": "RGB"}
        row |= {"width": opened.image.width, "height": opened.image.height}
        sample = Sample("x", row, opened.image, opened.alpha, data)
        parts = [f"decode {milliseconds(lambda data=data: open_image(data)):8.1f}"]
        for kind, annotator in annotators.items():
            spent = milliseconds(lambda a=annotator, s=sample: a.annotate([s]))
            parts.append(f"{kind} {spent:8.1f}")
        print(f"{name:>24}  ms: " + "  ".join(parts))


if __name__ == "__main__":
    main(sys.argv[1:])
