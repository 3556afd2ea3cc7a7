"""From an upright picture to the pixels of a bucket, and what the model is told about them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdprep.buckets import Bucket, fit
from sdprep.seeding import integer, uniform
from sdtrain.batch import MicroConditioning


@dataclass(frozen=True)
class Crop:
    """What is cut out of a picture that was scaled to cover its bucket.

    Args:
        top_left: corner in the scaled picture before it is mirrored, px.
        is_flipped: whether the crop is mirrored left to right afterwards.
    """

    top_left: tuple[int, int]
    is_flipped: bool


def training_crop(
    size_hw: tuple[int, int], bucket: Bucket, key: tuple[int, str, int], flip_prob: float
) -> Crop:
    """The crop that `training_view` takes; pure geometry, no pixel is read."""
    height, width = size_hw
    spare_h, spare_w = fit(width, height, bucket).spare_hw
    seed, sample_id, visit = key
    top = integer(seed, "crop", sample_id, visit, "top") % (spare_h + 1)
    left = integer(seed, "crop", sample_id, visit, "left") % (spare_w + 1)
    return Crop((top, left), uniform(seed, "flip", sample_id, visit) < flip_prob)


def training_view(
    image: Image.Image, bucket: Bucket, key: tuple[int, str, int], flip_prob: float = 0.0
) -> tuple[Tensor, MicroConditioning]:
    """Scale to cover the bucket, crop at a keyed random place, and perhaps mirror.

    Args:
        image: upright RGB.
        bucket: the size wanted.
        key: (seed, sample id, visit), which decides the crop and the flip.
        flip_prob: probability of mirroring.

    Returns:
        (3, H, W) float32 in [-1, 1], and the sizes as they really were.
    """
    return _view(image, bucket, training_crop((image.height, image.width), bucket, key, flip_prob))


def evaluation_view(image: Image.Image, bucket: Bucket) -> tuple[Tensor, MicroConditioning]:
    """Scale to cover the bucket and crop the centre: the same for every visit.

    Returns:
        (3, H, W) float32 in [-1, 1], and the sizes as they really were.
    """
    centre = fit(image.width, image.height, bucket).crop_top_left
    return _view(image, bucket, Crop(centre, is_flipped=False))


def picture_of(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] back to a picture, for people to look at."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy(), "RGB")


def _view(image: Image.Image, bucket: Bucket, crop: Crop) -> tuple[Tensor, MicroConditioning]:
    resized_h, resized_w = fit(image.width, image.height, bucket).resized_hw
    top, left = crop.top_left
    original_size_hw = image.height, image.width
    if image.size != (resized_w, resized_h):
        image = image.resize((resized_w, resized_h), Image.Resampling.LANCZOS)
    image = image.crop((left, top, left + bucket.width, top + bucket.height))
    if crop.is_flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left = resized_w - left - bucket.width  # where the crop lies in the mirrored picture
    values = torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1)  # (3, H, W)
    pixels = values.to(torch.float32) / 127.5 - 1.0
    return pixels, MicroConditioning(original_size_hw, (top, left), bucket.size_hw)
