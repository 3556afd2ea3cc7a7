"""Recall by kind of edit, and false merges, of the search for near duplicates.

    python tools/bench/near_duplicates.py ../shared/data/near_duplicates [PHOTOS...]

The first folder has a groups.csv (file, group, transform). Each further folder of photos is edited
in many ways and strengths here; photos of those folders must not be merged with one another.
"""

from __future__ import annotations

import argparse
import csv
import io
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from sdprep.images import open_image
from sdprep.near_edges import Edges, find_edges
from sdprep.near_search import Views
from sdprep.signatures import view_signatures

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
Edit = Callable[[Image.Image], Image.Image]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fixture", type=Path, help="folder with groups.csv")
    parser.add_argument("photos", type=Path, nargs="*", help="folders of photos to edit")
    parser.add_argument("--every", type=int, default=1, help="edit every n-th photo only")
    options = parser.parse_args()
    of_fixture(options.fixture)
    for folder in options.photos:
        of_edits(folder, options.every)


def of_fixture(folder: Path) -> None:
    """Recall against each group's original, and pairs of different groups that were merged."""
    with (folder / "groups.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images = [open_image(folder / row["file"]).image for row in rows]
    started = time.perf_counter()
    views = Views.of([view_signatures(image) for image in images])
    signed = time.perf_counter()
    found = find_edges(views)
    distances = {edge[:2]: edge[2] for edge in found.edges}
    originals = {row["group"]: i for i, row in enumerate(rows) if row["transform"] == "original"}
    kinds: dict[str, list[int | None]] = defaultdict(list)
    for index, row in enumerate(rows):
        if row["group"] in originals and row["transform"] != "original":
            first, second = sorted((index, originals[row["group"]]))
            kinds[row["transform"]].append(distances.get((first, second)))
    print(f"{folder}: {len(rows)} images, {1000 * (signed - started) / len(rows):.1f} ms each")
    print_kinds(kinds)
    false = [(i, j, d) for i, j, d in found.edges if rows[i]["group"] != rows[j]["group"]]
    print_merges(found, [f"{rows[i]['file']} {rows[j]['file']} {d}" for i, j, d in false])


def of_edits(folder: Path, every: int) -> None:
    """Recall of edits made here, and photos that were merged."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    print(f"{folder}: {len(paths)} photos, every {every}. of them with {len(EDITS)} edits")
    kinds: dict[str, list[int | None]] = defaultdict(list)
    for path in paths[::every]:
        photo = open_image(path).image
        views = Views.of([view_signatures(image) for image in [photo, *edited(photo)]])
        found = find_edges(views, np.arange(len(views)) == 0)
        distances = {edge[1]: edge[2] for edge in found.edges if edge[0] == 0}
        for row, kind in enumerate(EDITS, 1):
            kinds[kind].append(distances.get(row))
    print_kinds(kinds)
    found = find_edges(Views.of([view_signatures(open_image(path).image) for path in paths]))
    print_merges(found, [f"{paths[i]} {paths[j]} {d}" for i, j, d in found.edges])


def edited(photo: Image.Image) -> list[Image.Image]:
    """The photo after each edit, as a file would hold it."""
    return [edit(photo) for edit in EDITS.values()]


def print_kinds(kinds: dict[str, list[int | None]]) -> None:
    """One line per kind of edit."""
    print(f"  {'edit':32} {'found':>9}  bits: median, most")
    for kind in sorted(kinds):
        hits = [distance for distance in kinds[kind] if distance is not None]
        bits = f"{np.median(hits):6.0f} {max(hits):6}" if hits else ""
        print(f"  {kind:32} {len(hits):4}/{len(kinds[kind]):<4} {bits}")


def print_merges(found: Edges, merges: list[str]) -> None:
    """What should be nothing."""
    print(f"  edges {len(found.edges)}, refused by the second look {found.num_refused}")
    print(f"  false merges: {len(merges)}")
    for merge in merges:
        print(f"    {merge}")


# --- edits ----------------------------------------------------------------------------------------


def as_file(image: Image.Image, format_: str = "JPEG", quality: int = 90) -> Image.Image:
    """The image after a round trip through a lossy file."""
    file = io.BytesIO()
    image.save(file, format_, quality=quality)
    return open_image(file.getvalue()).image


def scaled(x: float, y: float) -> Edit:
    """Resize each side by a factor."""
    return lambda image: as_file(
        image.resize(
            (max(1, round(image.width * x)), max(1, round(image.height * y))),
            Image.Resampling.LANCZOS,
        )
    )


def cropped(share: float, x: float = 0.5, y: float = 0.5) -> Edit:
    """Keep a share of each side; x and y say where the rest goes (0..1)."""

    def edit(image: Image.Image) -> Image.Image:
        width, height = round(image.width * share), round(image.height * share)
        left, top = round((image.width - width) * x), round((image.height - height) * y)
        return as_file(image.crop((left, top, left + width, top + height)))

    return edit


def letterboxed(share: float, colour: str, sides: str) -> Edit:
    """Add bars of a share of the image at top and bottom (v), left and right (h), or both."""

    def edit(image: Image.Image) -> Image.Image:
        x = round(image.width * share) if "h" in sides else 0
        y = round(image.height * share) if "v" in sides else 0
        return as_file(ImageOps.expand(image, border=(x, y, x, y), fill=colour))

    return edit


def watermarked(alpha: int, size: float, angle: float) -> Edit:
    """Write over the middle in white; alpha 0..255, size as a share of the width."""

    def edit(image: Image.Image) -> Image.Image:
        ink = Image.new("L", image.size)
        font = ImageFont.load_default(max(8.0, image.width * size))
        centre = (image.width / 2, image.height / 2)
        ImageDraw.Draw(ink).text(centre, "SAMPLE", font=font, fill=alpha, anchor="mm")
        ink = ink.rotate(angle)
        return as_file(Image.composite(Image.new("RGB", image.size, "white"), image, ink))

    return edit


def brightened(factor: float) -> Edit:
    """Multiply the levels."""
    return lambda image: as_file(ImageEnhance.Brightness(image).enhance(factor))


def rotated(degrees: float) -> Edit:
    """Turn about the middle, corners black."""
    return lambda image: as_file(image.rotate(degrees, Image.Resampling.BILINEAR))


EDITS: dict[str, Edit] = {
    "must flip": lambda image: as_file(ImageOps.mirror(image)),
    "must grey": lambda image: as_file(image.convert("L").convert("RGB")),
    **{f"must jpeg {q}": lambda image, q=q: as_file(image, "JPEG", q) for q in (60, 75, 95)},
    **{f"must webp {q}": lambda image, q=q: as_file(image, "WEBP", q) for q in (60, 80)},
    **{f"must resize {f}": scaled(f, f) for f in (0.5, 0.6, 0.75, 1.3, 1.7)},
    "must stretch 1.15 wide": scaled(1.15, 1),
    "must stretch 1.15 tall": scaled(1, 1.15),
    **{
        f"must watermark {alpha} of 255, size {size}": watermarked(alpha, size, 25)
        for alpha in (80, 120, 160)
        for size in (0.08, 0.16)
    },
    "must crop 0.92": cropped(0.92),
    **{
        f"must letterbox {share} {colour} {sides}": letterboxed(share, colour, sides)
        for share in (0.06, 0.12)
        for colour in ("black", "white")
        for sides in ("v", "h", "vh")
    },
    **{f"should brightness {f}": brightened(f) for f in (0.8, 1.1, 1.2)},
    **{f"should crop {share} middle": cropped(share) for share in (0.75, 0.8, 0.85, 0.95)},
    **{f"should crop 0.75 at {x},{y}": cropped(0.75, x, y) for x in (0, 1) for y in (0, 1)},
    **{f"should rotate {degrees}": rotated(degrees) for degrees in (1, 2, 4)},
}

if __name__ == "__main__":
    main()
