"""The forest plot of a comparison: the whole, noise levels, tags and sources, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdprep.errors import UserError
from sdtrain.fonts import families_for
from sdtrain.labels import extremes
from sdtrain.wording import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sdtrain.compare import Pair

BETTER, WORSE, UNSURE, DIM, GRID = "#1a7f37", "#c2372c", "#59636e", "#8b949e", "#e3e6e9"
MOST_GROUPS = 8
_ROW_INCHES, _WIDE_INCHES, _LABEL_CHARACTERS = 0.27, 9.0, 34
_TITLE_CHARACTERS = 80
_ENDINGS = (".png", ".svg", ".pdf")

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Row:
    """One line of the plot; a row without a change is a heading."""

    label: str
    change: float | None = None
    here: Interval = None
    new: Interval = None
    note: str = ""


def draw(pairs: Sequence[Pair], to: Path) -> Path:
    """Write the picture, one panel for each comparison.

    Args:
        pairs: at least one.
        to: `.png`, `.svg` or `.pdf`.

    Raises:
        UserError: another ending, or it cannot be written.
    """
    if to.suffix.lower() not in _ENDINGS:
        raise UserError(f"--to {to} must end in {', '.join(_ENDINGS)}")
    import warnings

    import matplotlib
    from matplotlib.figure import Figure

    panels = [rows(pair) for pair in pairs]
    heights = [len(panel) + 4 for panel in panels]
    families = families_for([row.label for panel in panels for row in panel])
    style: Any = {"font.family": families, "font.size": 9, "svg.hashsalt": "sdtrain"}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # families_for has said so, once
        figure = Figure((_WIDE_INCHES, sum(heights) * _ROW_INCHES), layout="constrained", dpi=150)
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for pair, panel, ax in zip(pairs, panels, axes, strict=True):
            _panel(ax, pair, panel)
        metadata: Any = {"Date": None} if to.suffix.lower() == ".svg" else None
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(to, metadata=metadata)
        except OSError as error:
            raise UserError(f"cannot write {to}: {error}") from None
    return to


def rows(pair: Pair) -> list[Row]:
    """What is drawn of one comparison, from top to bottom."""
    found = pair.found
    n = f"n = {found.num_images}"
    here, new = found.ci95_percent, found.ci95_new_images_percent
    made = [Row("all images and noise levels", found.change_percent, here, new, n)]
    made.append(Row("by noise level u"))
    made += [
        Row(f"{each.start:.1f} to {each.end:.1f}", each.change_percent, None, each.ci95_percent)
        for each in pair.where.bins
    ]
    for kind, title in (("tag", "by tag"), ("source", "by source")):
        shown = extremes(pair.where.groups, kind, MOST_GROUPS)
        made += [Row(title)] if shown else []
        made += [
            Row(
                _short(each.name),
                each.found.change_percent,
                each.found.ci95_percent,
                each.found.ci95_new_images_percent,
                f"n = {each.found.num_images}{' *' if each.differs else ''}",
            )
            for each in shown
        ]
    return made


def _panel(ax: Axes, pair: Pair, panel: Sequence[Row]) -> None:
    ax.axvline(0, color=DIM, lw=1, ls=(0, (4, 3)), zorder=1)
    for at, row in enumerate(panel):
        if row.change is not None:
            _line(ax, at, row)
        weight = "normal" if row.change is not None else "bold"
        place: Any = {"transform": ax.get_yaxis_transform(), "va": "center", "parse_math": False}
        ax.text(-0.01, at, row.label, ha="right", weight=weight, **place)
        words = f"{percent(row.change)}  {row.note}" if row.change is not None else ""
        ax.text(1.01, at, words, color=UNSURE, **place)
    ax.set_ylim(len(panel) - 0.4, -0.6)
    ax.set_xlim(_limits(panel))
    ax.set_yticks([])
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="x", color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    ax.set_xlabel(
        "change of the loss, %: left is better; thick: these images, thin: new images (95 %)"
        + ("; *: differs, corrected for all tags" if pair.where.groups else "")
    )
    title = f"{pair.name}: B {_end_of(pair.b)}\nagainst A {_end_of(pair.a)}"
    ax.set_title(title, fontsize=9, loc="left", parse_math=False)


def _line(ax: Axes, at: int, row: Row) -> None:
    widest = row.new or row.here
    side = 0 if widest is None else (-1 if widest[1] < 0 else 1 if widest[0] > 0 else 0)
    colour = {-1: BETTER, 0: UNSURE, 1: WORSE}[side]
    for interval, width in ((row.new, 1.2), (row.here, 4.0)):
        if interval is not None:
            ax.plot(interval, (at, at), color=colour, lw=width, solid_capstyle="butt")
    ax.plot([row.change or 0.0], [at], "o", color="white", mec=colour, mew=1.4, ms=4.5, zorder=3)


def _limits(panel: Sequence[Row]) -> tuple[float, float]:
    """Room for every interval; a few very wide ones must not squeeze all others."""
    ends = [abs(end) for row in panel for part in (row.here, row.new) for end in part or ()]
    points = [abs(row.change) for row in panel if row.change is not None]
    ends.sort()
    usual = ends[int(0.9 * (len(ends) - 1))] if ends else 0.0
    widest = ends[-1] if ends and ends[-1] < 2 * usual else usual
    most = 1.05 * max([widest, *points, 1e-6])
    return -most, most


def _short(name: str) -> str:
    return name if len(name) <= _LABEL_CHARACTERS else name[: _LABEL_CHARACTERS - 1] + "…"


def _end_of(path: str) -> str:
    """The end of a path that is too long for a title, where the run and its clock stand."""
    return path if len(path) <= _TITLE_CHARACTERS else "…" + path[1 - _TITLE_CHARACTERS :]
