"""Writing in pictures, read by rapidocr with the models it brings along; works offline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field

from sdprep import boxes
from sdprep.annotate import PixelNeeds, Sample
from sdprep.errors import MissingExtraError
from sdprep.recipe import AnnotatorConfig

LINE = pa.struct(
    {
        "text": pa.string(),
        "score": pa.float32(),
        # x, y of four corners, clockwise from where the line begins; fractions of the original
        "polygon": pa.list_(pa.float32()),
    }
)
COLUMNS = pa.schema(
    [
        *boxes.COLUMNS,
        pa.field("text_fraction", pa.float32()),  # area of the turned lines, not of upright boxes
        pa.field("lines", pa.list_(LINE)),  # everything that was read, noise too
    ]
)
LABEL = "text"
_RAW_SCORE = 0.5
_MAX_ASPECT = 8


class Config(AnnotatorConfig):
    """Text in the picture, with its words: captions, dates, signatures, watermarks; no GPU needed.

    On 13 photos with text drawn on them, all were found; of 16 clean photos one was taken for text
    (`tools/bench/ocr_overlay.py`). Writing on objects in the picture is found as well.
    """

    type: Literal["ocr"] = "ocr"
    min_score: float = Field(
        0.7, ge=0.5, le=1, description="Lines read with less confidence make no box (0.5 to 1)."
    )
    min_characters: int = Field(
        2, ge=1, description="Lines of fewer letters and digits make no box: mostly texture."
    )

    def build(self) -> OcrDetector:
        """Load the models.

        Raises:
            MissingExtraError: rapidocr is not installed.
        """
        return OcrDetector(self.min_score, self.min_characters)


class OcrDetector:
    """Fills `boxes_ocr`: boxes labelled `text`, and every line with its polygon."""

    columns = COLUMNS
    pixels = PixelNeeds()
    batch_size = 4
    is_thread_safe = False  # the reader keeps the options of a call on itself

    def __init__(self, min_score: float, min_characters: int) -> None:
        self.min_score, self.min_characters = min_score, min_characters
        self._read, version = _reader()
        facts = {"name": "ocr", "version": 1, "rapidocr": version}
        facts |= {"min_score": min_score, "min_characters": min_characters}
        self.fingerprint = json.dumps(facts)

    def annotate(self, batch: Sequence[Sample]) -> pa.RecordBatch:
        """Read each picture by itself."""
        return pa.RecordBatch.from_pylist([self._row(s.image) for s in batch], schema=COLUMNS)

    def _row(self, image: Image.Image | None) -> dict[str, Any]:
        assert image is not None
        # Channels blue first, as the reader expects of an array.
        result = self._read(np.ascontiguousarray(_widened(image)[:, :, ::-1]))
        texts, scores = list(result.txts or ()), list(result.scores or ())
        polygons = np.array([] if result.boxes is None else result.boxes, float).reshape(-1, 4, 2)
        polygons = polygons / (image.width, image.height)
        kept = [i for i in range(len(texts)) if self._is_text(texts[i], scores[i])]
        places = np.concatenate([polygons[kept].min(1), polygons[kept].max(1)], axis=1)
        row = boxes.found([LABEL] * len(kept), [scores[i] for i in kept], places)
        row["text_fraction"] = text_fraction(polygons[kept])
        row["lines"] = [
            {"text": text, "score": float(score), "polygon": polygon.ravel().tolist()}
            for text, score, polygon in zip(texts, scores, polygons, strict=True)
        ]
        return row

    def _is_text(self, text: str, score: float) -> bool:
        characters = sum(character.isalnum() for character in text)
        return score >= self.min_score and characters >= self.min_characters


def text_fraction(polygons: np.ndarray) -> float:
    """Share of the picture that lies within any of the polygons.

    Args:
        polygons: (n, 4, 2) x, y as fractions of the picture; each is convex.
    """
    from shapely import MultiPoint, union_all
    from shapely import box as rectangle

    # The hull mends corners that arrive crossed, which would make the area wrong.
    shapes = [MultiPoint(polygon).convex_hull for polygon in polygons]
    return float(union_all(shapes).intersection(rectangle(0, 0, 1, 1)).area)


def _widened(image: Image.Image) -> np.ndarray:
    """Pixels, with white added right or below to a picture that is a mere strip.

    The reader enlarges the short side to 736 px: a strip of 1 x 2000 px would take all memory.
    """
    width = max(image.width, -(-image.height // _MAX_ASPECT))
    height = max(image.height, -(-image.width // _MAX_ASPECT))
    if (width, height) != image.size:
        strip, image = image, Image.new("RGB", (width, height), "white")
        image.paste(strip, (0, 0))
    return np.asarray(image)


def _reader() -> tuple[Any, str]:
    """The reader, and the version of the package, which says which models it brings."""
    from importlib.metadata import version

    params = {"Global.log_level": "critical", "Global.text_score": _RAW_SCORE}
    try:
        from rapidocr import RapidOCR

        return RapidOCR(params=params), version("rapidocr")
    except ImportError as error:  # itself, or the onnxruntime or OpenCV that it needs
        raise MissingExtraError(error.name or "rapidocr", "detect", "detector ocr") from None
