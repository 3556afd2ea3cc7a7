"""Measure how well the detector `ocr` tells pictures with text drawn on them from clean ones.

Usage: python tools/bench/ocr_overlay.py [FOLDER] [key=value...]
FOLDER holds annotations.json with `file`, `kind` and `boxes`; pictures whose kind begins with
`scene_text` count as neither. Prints recall, false alarms, and the share of box area found.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from sdprep.annotate import Sample
from sdprep.detectors.ocr import Config
from sdprep.images import open_image
from sdprep.masks import corners, coverage
from sdprep.recipe import options

OVERLAY = Path(__file__).resolve().parents[3] / "shared" / "data" / "overlay"


def share_found(picture: dict[str, Any], found: list[dict[str, Any]]) -> float:
    """How much of the drawn area lies within boxes that were found."""
    side = np.array([picture["width"], picture["height"]] * 2)
    drawn = np.array([box["bbox_xyxy"] for box in picture["boxes"]]) / side
    both = coverage(np.concatenate([drawn, corners(found)]))
    area = coverage(drawn)
    return (area + coverage(corners(found)) - both) / area


def main(arguments: list[str]) -> None:
    """Print a line for every picture with a box, then the counts."""
    folder = Path(next((text for text in arguments if "=" not in text), OVERLAY))
    settings = [text for text in arguments if "=" in text]
    detector = options(Config, settings, type="ocr").build()
    counts: dict[str, list[bool]] = {"drawn text": [], "clean": [], "text in the scene": []}
    shares, started = [], time.perf_counter()
    pictures = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
    for picture in pictures:
        image = open_image((folder / picture["file"]).read_bytes()).image
        (row,) = detector.annotate([Sample("", {}, image)]).to_pylist()
        kind = "drawn text" if picture["boxes"] else "text in the scene"
        kind = "clean" if picture["kind"] == "clean" else kind
        counts[kind].append(bool(row["boxes"]))
        if picture["boxes"]:
            shares.append(share_found(picture, row["boxes"]))
        words = " | ".join(f"{line['text']} {line['score']:.2f}" for line in row["lines"])
        print(
            f"{picture['file']:<28} {len(row['boxes'])} boxes, "
            f"text_fraction {row['text_fraction']:.3f}  {words}"
        )
    for kind, hits in counts.items():
        print(f"{kind}: boxes in {sum(hits)} of {len(hits)} pictures")
    print(f"drawn area inside boxes: mean {np.mean(shares):.2f}, least {min(shares):.2f}")
    print(f"{(time.perf_counter() - started) / len(pictures):.2f} s a picture")


if __name__ == "__main__":
    main(sys.argv[1:])
