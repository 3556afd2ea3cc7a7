"""Tags that follow from width and height alone, by Danbooru's rules."""

from __future__ import annotations

SIZE_TAGS = ("incredibly_absurdres", "absurdres", "highres", "lowres")
"""Recomputed for every image: one that came with it spoke of another copy of the picture.

`wide_image` and `tall_image` are not among them: those that were imported stay.
"""


def size_tags(width: int, height: int) -> list[str]:
    """Tags of a picture of this size, in pixels; a very large one is also a large one.

    Source: Danbooru, help:image resolution and the automatic tags of its uploads.
    """
    rules = {
        "incredibly_absurdres": width >= 10_000 or height >= 10_000,
        "absurdres": width >= 3200 or height >= 2400,
        "highres": width >= 1600 or height >= 1200,
        "lowres": width <= 500 and height <= 500,
        "wide_image": width >= 1024 and width >= 4 * height,
        "tall_image": height >= 1024 and height >= 4 * width,
    }
    return [name for name, applies in rules.items() if applies]
