"""What the card says of a data set, counted row by row while it is written."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdprep.errors import DataError
from sdprep.images import open_image
from sdprep.schema import SPLITS
from sdprep.seeding import integer

if TYPE_CHECKING:
    from PIL import Image

NUM_SAMPLES = 15
SAMPLE_HEIGHT = 220
_SHOWABLE = (None, "", "g", "general", "safe")


class Facts:
    """Counters over the rows that are published; memory grows by eight bytes per image."""

    def __init__(self) -> None:
        self.rows = Counter(dict.fromkeys(SPLITS, 0))
        self.num_bytes: Counter[str] = Counter()
        self.captioned: Counter[str] = Counter()
        self.scores: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
        self.tags_per_image: Counter[int] = Counter()
        self.tags: Counter[str] = Counter()
        self.sources: Counter[tuple[str, str]] = Counter()  # (source, licence)
        self.ratings: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.num_boxes = 0
        self.widths, self.heights = array("i"), array("i")
        self._samples: list[tuple[int, str, Image.Image]] = []

    @property
    def num_rows(self) -> int:
        """Rows of both splits."""
        return sum(self.rows.values())

    def add(self, split: str, row: Mapping[str, Any]) -> None:
        """Count one row of `schema.PREPARED`."""
        self.rows[split] += 1
        self.num_bytes[split] += len(row["image"]["bytes"])
        self.captioned[split] += bool(row["caption"])
        if row["score"] is not None:
            self.scores[split][row["score"]] += 1
        self.tags_per_image[len(row["tags"])] += 1
        self.tags.update(tag["name"] for tag in row["tags"])
        self.sources[row["source"] or "", row["license"] or ""] += 1
        self.ratings[row["rating"] or ""] += 1
        self.formats[row["image"]["path"].rpartition(".")[2]] += 1
        self.num_boxes += len(row["boxes"])
        self.widths.append(row["width"])
        self.heights.append(row["height"])
        self._consider(row)

    def samples(self) -> list[Image.Image]:
        """The pictures for the card, upright and small, in the order of their keys."""
        return [image for _, _, image in sorted(self._samples, key=lambda entry: -entry[0])]

    def _consider(self, row: Mapping[str, Any]) -> None:
        """Keep the images with the smallest keys; so few are decoded, and growth changes few.

        Pictures with a rating that is not for everyone are never shown.
        """
        key = -integer("card", "sample", row["id"])
        is_full = len(self._samples) >= NUM_SAMPLES
        if row["rating"] not in _SHOWABLE or (is_full and key < self._samples[0][0]):
            return
        try:
            picture = _small(open_image(row["image"]["bytes"], first_frame=True).image)
        except DataError:  # a format that needs a plugin; it is published all the same
            return
        push = heapq.heappushpop if is_full else heapq.heappush
        push(self._samples, (key, row["id"], picture))


def _small(image: Image.Image) -> Image.Image:
    """At most 440 px high and three times as wide; extreme shapes are cropped in the centre."""
    from PIL import Image, ImageOps

    height = 2 * SAMPLE_HEIGHT
    width = round(height * min(3.0, max(1 / 3, image.width / image.height)))
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
