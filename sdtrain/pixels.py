"""From an upright picture to the pixels of a bucket, and what the model is told about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True)
class CropRule:
    """How training pictures are cropped and mirrored; every draw is keyed.

    Args:
        flip_prob: probability of mirroring.
        place: `random` draws the corner at every visit, `centre` never does.
        num_kept: draws per image; later visits repeat them in turn. None: no end of them.
    """

    flip_prob: float = 0.0
    place: Literal["random", "centre"] = "random"
    num_kept: int | None = None

    @property
    def most_crops(self) -> int | None:
        """The most different crops that one image can have; None: no bound."""
        one_place = self.place == "centre"
        bound = (1 if self.flip_prob in (0.0, 1.0) else 2) if one_place else None
        found = [number for number in (bound, self.num_kept) if number is not None]
        return min(found, default=None)

    def crop(self, size_hw: tuple[int, int], bucket: Bucket, key: tuple[int, str, int]) -> Crop:
        """The crop of one visit; pure geometry, no pixel is read.

        Args:
            size_hw: upright height and width of the picture, px.
            bucket: the size wanted.
            key: (seed, sample id, visit).
        """
        height, width = size_hw
        fitted = fit(width, height, bucket)
        seed, sample_id, visit = key
        if self.num_kept is not None:
            visit %= self.num_kept
        is_flipped = uniform(seed, "flip", sample_id, visit) < self.flip_prob
        if self.place == "centre":
            return Crop(fitted.crop_top_left, is_flipped)
        spare_h, spare_w = fitted.spare_hw
        top = integer(seed, "crop", sample_id, visit, "top") % (spare_h + 1)
        left = integer(seed, "crop", sample_id, visit, "left") % (spare_w + 1)
        return Crop((top, left), is_flipped)

    def different(
        self, size_hw: tuple[int, int], bucket: Bucket, seed: int, sample_id: str, num_visits: int
    ) -> Iterator[tuple[int, Crop]]:
        """The first visit of each different crop that one image gets in so many visits."""
        seen: set[Crop] = set()
        for visit in range(min(num_visits, self.num_kept or num_visits)):
            crop = self.crop(size_hw, bucket, (seed, sample_id, visit))
            if crop not in seen:
                seen.add(crop)
                yield visit, crop
            if len(seen) == self.most_crops:
                return


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
    size_hw = image.height, image.width
    return crop_view(image, bucket, CropRule(flip_prob).crop(size_hw, bucket, key))


def evaluation_view(image: Image.Image, bucket: Bucket) -> tuple[Tensor, MicroConditioning]:
    """Scale to cover the bucket and crop the centre: the same for every visit.

    Returns:
        (3, H, W) float32 in [-1, 1], and the sizes as they really were.
    """
    centre = fit(image.width, image.height, bucket).crop_top_left
    return crop_view(image, bucket, Crop(centre, is_flipped=False))


def picture_of(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] back to a picture, for people to look at."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy(), "RGB")


def crop_view(image: Image.Image, bucket: Bucket, crop: Crop) -> tuple[Tensor, MicroConditioning]:
    """Scale to cover the bucket and cut out one crop of it.

    Returns:
        (3, H, W) float32 in [-1, 1], and the sizes as they really were.
    """
    size_hw = image.height, image.width
    resized_h, resized_w = fit(image.width, image.height, bucket).resized_hw
    top, left = crop.top_left
    if image.size != (resized_w, resized_h):
        image = image.resize((resized_w, resized_h), Image.Resampling.LANCZOS)
    image = image.crop((left, top, left + bucket.width, top + bucket.height))
    if crop.is_flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values = torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1)  # (3, H, W)
    pixels = values.to(torch.float32) / 127.5 - 1.0
    return pixels, conditioning_of(size_hw, bucket, crop)


def conditioning_of(size_hw: tuple[int, int], bucket: Bucket, crop: Crop) -> MicroConditioning:
    """What the model is told about one crop of a picture; no pixel is read."""
    top, left = crop.top_left
    if crop.is_flipped:  # where the crop lies in the mirrored picture
        left = fit(size_hw[1], size_hw[0], bucket).resized_hw[1] - left - bucket.width
    return MicroConditioning(size_hw, (top, left), bucket.size_hw)
