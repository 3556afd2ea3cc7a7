"""The pictures of the card: a sheet of samples, and plots. The same facts give the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdprep.bucket_table import BucketTable
from sdprep.buckets import SDXL_RESOLUTION_PX
from sdprep.card_facts import SAMPLE_HEIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

SHEET_WIDTH = 1280
GAP = 8
INK, MUTED, GRID = "#24292f", "#57606a", "#d8dee4"
TRAIN, VALIDATION = "#3b6ea8", "#e08a3c"
_HISTOGRAM: dict[str, Any] = {"color": TRAIN, "edgecolor": "white", "linewidth": 0.8}


def contact_sheet(pictures: Sequence[Image.Image], to: Path) -> None:
    """Write the samples as rows of equal height that fill the width.

    Args:
        pictures: at least one, RGB, of equal height.
        to: a JPEG file, written without any metadata.
    """
    from PIL import Image

    rows = _justified([picture.width / picture.height for picture in pictures])
    width = max(sum(widths) + GAP * (len(widths) + 1) for widths, _ in rows)
    height = GAP + sum(GAP + row_height for _, row_height in rows)
    sheet = Image.new("RGB", (width, height), "white")
    top, left_over = GAP, list(pictures)
    for widths, row_height in rows:
        left = GAP
        for width in widths:
            small = left_over.pop(0).resize((width, row_height), Image.Resampling.LANCZOS)
            sheet.paste(small, (left, top))
            left += width + GAP
        top += row_height + GAP
    sheet.save(to, "JPEG", quality=88, optimize=True, progressive=True)


def _justified(aspects: Sequence[float]) -> list[tuple[list[int], int]]:
    """Widths and height of each row: about equally full, and filling the width if many enough."""
    total = sum(aspects)
    num_rows = max(1, round(total * SAMPLE_HEIGHT / SHEET_WIDTH))
    rows: list[list[float]] = [[] for _ in range(num_rows)]
    passed = 0.0
    for aspect in aspects:  # a picture goes where its middle falls
        rows[min(num_rows - 1, int((passed + aspect / 2) / total * num_rows))].append(aspect)
        passed += aspect
    return [_filled(row) for row in rows if row]


def _filled(row: Sequence[float]) -> tuple[list[int], int]:
    room = SHEET_WIDTH - GAP * (len(row) + 1)
    height = min(2 * SAMPLE_HEIGHT, int(room / sum(row)))
    full = room if height < 2 * SAMPLE_HEIGHT else height * sum(row)
    edges = np.rint(np.cumsum([0.0, *row]) / sum(row) * full).astype(int)
    return np.diff(edges).tolist(), height


def plot_buckets(
    table: BucketTable, widths: Sequence[int], heights: Sequence[int], to: Path
) -> None:
    """Images per bucket, and how large the images are before they are scaled."""

    def draw(axes: Sequence[Axes]) -> None:
        names = [str(row.bucket).replace("x", " × ") for row in table.rows]
        places, size = range(len(names)), 8 if len(names) < 25 else 6
        axes[0].bar(places, [row.count for row in table.rows], color=TRAIN, width=0.8)
        axes[0].set_xlim(-0.7, max(len(names), 4) - 0.3)
        _label(axes[0], "images per bucket", "", "images")
        axes[0].set_xticks(places, names, rotation=90)
        axes[0].tick_params(axis="x", labelsize=size)
        _draw_sides(axes[1], np.sqrt(np.asarray(widths, np.float64) * np.asarray(heights)))

    _figure(draw, to, 2, (10, 3.6))


def _draw_sides(axes: Axes, sides: np.ndarray) -> None:
    low, high = np.floor(np.log2(sides.min())), np.floor(np.log2(sides.max())) + 1
    step = 4 if high - low < 8 else 2  # bins per octave
    edges = 2.0 ** np.arange(low, high + 0.5 / step, 1 / step)
    axes.hist(sides, bins=edges.tolist(), **_HISTOGRAM)
    axes.set_xscale("log", base=2)
    _label(axes, "size of the images", "√(width × height), pixels", "images")
    axes.set_xticks(edges[::step], [f"{edge:.0f}" for edge in edges[::step]], minor=False)
    axes.minorticks_off()
    if edges[0] < SDXL_RESOLUTION_PX < edges[-1]:
        axes.axvline(SDXL_RESOLUTION_PX, color=VALIDATION, linewidth=1.5)
        place = axes.get_xaxis_transform()
        style: dict[str, Any] = {"color": VALIDATION, "fontsize": 8, "transform": place}
        axes.text(SDXL_RESOLUTION_PX, 1.01, "one megapixel", ha="center", va="bottom", **style)


def plot_counts(
    tags_per_image: Mapping[int, int], scores: Mapping[str, Counter[int]], to: Path
) -> None:
    """Tags per image, and published scores as shares of each split; only what there is."""
    has_tags = any(tags_per_image) and sum(tags_per_image.values()) > 0
    splits = [split for split in scores if scores[split]]

    def draw(axes: Sequence[Axes]) -> None:
        parts = iter(axes)
        if has_tags:
            part = next(parts)
            values = np.repeat(list(tags_per_image), list(tags_per_image.values()))
            step = max(1, -(-(int(values.max()) + 1) // 40))
            part.hist(
                values, bins=np.arange(-0.5, values.max() + step, step).tolist(), **_HISTOGRAM
            )
            part.locator_params(axis="x", integer=True)
            _label(part, "tags per image", "tags", "images")
        if splits:
            part = next(parts)
            for offset, split in zip((-0.2, 0.2), splits, strict=False):
                shares = [
                    100 * scores[split][rank] / scores[split].total() for rank in range(1, 10)
                ]
                color = TRAIN if split == "train" else VALIDATION
                shift = offset if len(splits) > 1 else 0.0
                part.bar(
                    np.arange(1, 10) + shift,
                    shares,
                    color=color,
                    label=split,
                    width=0.4 if len(splits) > 1 else 0.8,
                )
            part.set_xticks(range(1, 10))
            if len(splits) > 1:
                part.legend(frameon=False, fontsize=8)
            _label(part, "score", "score (9 is best)", "% of the split")

    _figure(draw, to, has_tags + bool(splits), (10, 3.2))


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold", pad=12)
    axes.set_xlabel(x, fontsize=9, color=MUTED)
    axes.set_ylabel(y, fontsize=9, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.locator_params(axis="y", integer=True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def _figure(draw: Any, to: Path, num_parts: int, size: tuple[float, float]) -> None:
    """Draw side by side with settings of our own, not the user's, and no date in the file."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(size[0] * (1 if num_parts > 1 else 0.6), size[1]), dpi=130)
        FigureCanvasAgg(figure)
        draw(figure.subplots(1, num_parts, squeeze=False)[0])
        figure.tight_layout(w_pad=3)
        figure.savefig(to, format="png", facecolor="white", metadata={"Software": None})
