"""Colour: any pixel mode and profile to 8-bit sRGB, and alpha taken apart from it."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_SPACE_OF_MODE = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}


class BadProfile(Exception):
    """An ICC profile that cannot be read, or that is not for pixels of this kind."""


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None, bool]:
    """Bring pixels to 8 bits and take the alpha channel off.

    Args:
        image: loaded, any mode.
    Returns:
        pixels in mode L, RGB, CMYK or LAB; alpha in mode L, or None where the file has none; and
        whether a depth without a fixed range (32-bit, float) was stretched to fit.
    """
    if image.mode in _WIDE_GREY:
        return _split_wide_grey(image)
    if not image.has_transparency_data:
        return _without_alpha(image), None, False
    if image.mode in ("LA", "La"):
        grey = image.convert("LA")
        return grey.getchannel("L"), grey.getchannel("A"), False
    rgba = image.convert("RGBA")
    return rgba.convert("RGB"), rgba.getchannel("A"), False


def _without_alpha(image: Image.Image) -> Image.Image:
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in _SPACE_OF_MODE else image.convert("RGB")


def _split_wide_grey(image: Image.Image) -> tuple[Image.Image, Image.Image | None, bool]:
    """16-bit grey divided by 257, so that 65535 becomes 255 and nothing is clipped."""
    if image.mode == "I;16B":
        values = np.frombuffer(image.tobytes(), dtype=">u2").reshape(image.size[::-1])
    else:
        values = np.asarray(image)
    key = image.info.get("transparency")
    alpha = None
    if isinstance(key, int):
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8), "L")
    is_stretched = False
    if values.dtype == np.float32:
        scaled, is_stretched = _unit_range(values)
    elif values.size and (values.min() < 0 or values.max() > 65535):
        scaled, is_stretched = _unit_range(values.astype(np.float64))
    else:
        scaled = (values.astype(np.uint32) + 128) // 257
    return Image.fromarray(scaled.astype(np.uint8), "L"), alpha, is_stretched


def _unit_range(values: np.ndarray) -> tuple[np.ndarray, bool]:
    """Scale to 0..255: floats within 0..1 by 255, anything else from its own extremes."""
    finite = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    if values.dtype == np.float32 and low >= 0 and high <= 1:
        return np.rint(finite * 255), False
    return np.rint((finite - low) * (255 / max(high - low, 1e-300))), True


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to sRGB: relative colorimetric with black-point compensation; untagged is sRGB.

    Args:
        image: mode L, RGB, CMYK or LAB.
        profile: the embedded ICC profile; None or empty when there is none.
    Raises:
        BadProfile: the profile is broken or belongs to another kind of pixels.
    """
    if not profile:
        return plain_rgb(image)
    space = _profile_space(profile)
    if image.mode == "L" and space == "RGB":
        image = image.convert("RGB")
    if _SPACE_OF_MODE[image.mode] != space:
        raise BadProfile(f"a {space} profile on {image.mode} pixels")
    transform = _transform(profile, image.mode)
    return plain_rgb(image) if transform is None else _applied(transform, image)


def plain_rgb(image: Image.Image) -> Image.Image:
    """RGB without any profile of the file: Pillow's arithmetic, and CIE Lab by definition."""
    if image.mode == "LAB":
        return _applied(_lab_to_srgb(), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _applied(transform: Any, image: Image.Image) -> Image.Image:
    result = ImageCms.applyTransform(image, transform)
    assert result is not None
    return result


@lru_cache(maxsize=32)
def _profile_space(profile: bytes) -> str:
    try:
        return ImageCms.ImageCmsProfile(BytesIO(profile)).profile.xcolor_space.strip()
    except (OSError, ValueError, TypeError) as error:
        raise BadProfile(str(error)) from error


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform to sRGB, or None when it would move no colour by more than one level.

    littlecms keeps its one-pixel cache on the caller's stack, so threads may share a transform.
    """
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        raise BadProfile(str(error)) from error
    if mode == "RGB":
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(18, -1, 3)
        moved = np.asarray(_applied(transform, Image.fromarray(grid)), dtype=np.int16)
        if np.abs(moved - grid).max() <= 1:
            return None  # an sRGB profile: leave the pixels exactly as they are
    return transform


@lru_cache(maxsize=1)
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
