"""The figures of a run's page: SVG pictures with axes that say what they are."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, DIM, GRID = "#1f2328", "#59636e", "#e3e6e9"
COLOURS = {
    **{"validation": "#0b6bcb", "train_probe": "#c2570c", "forgetting": "#8250df"},
    **{"validation_ema": "#0a7f86", "train_probe_ema": "#a8790b"},
}
SERIES = ("#0b6bcb", "#c2570c", "#1a7f37", "#8250df", "#bf3989", "#6e7781")
NAMES = {
    "validation": "Held-out images",
    "train_probe": "Training images",
    "forgetting": "Outside images",
    "validation_ema": "Held-out images, EMA",
    "train_probe_ema": "Training images, EMA",
}
_ON_DARK = {
    **{"#ffffff": "#161b22", INK: "#e6edf3", DIM: "#9aa4ae", GRID: "#30363d"},
    **{"#0b6bcb": "#4c9aff", "#c2570c": "#f0883e", "#8250df": "#b392f0", "#1a7f37": "#3fb950"},
    **{"#0a7f86": "#39c5cf", "#a8790b": "#d5a52a", "#bf3989": "#f778ba", "#6e7781": "#9aa4ae"},
}
_RULES = "".join(
    f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
    for light, dark in _ON_DARK.items()
    for kind in ("fill", "stroke")
)
_DARK = f"<style>@media (prefers-color-scheme: dark){{{_RULES}}}</style>".encode()
"""A picture follows its reader's colours by itself: matplotlib writes colours into `style`."""
_SIZE_INCHES = (5.4, 3.3)
ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 2}
"""Where a legend covers nothing, whatever the curve does."""
_FEW_POINTS = 40

Line = dict[str, Any]


def _figure(draw: Callable[[Axes], None], texts: Sequence[str] = ()) -> str:
    """A data URI of what `draw` puts on one pair of axes; `texts` are labels in any script."""
    file = io.BytesIO()
    with styled_axes(file, form="svg", metadata={"Date": None}, texts=texts) as (axes,):
        draw(axes)
    svg = file.getvalue().replace(b"<defs>", _DARK + b"<defs>", 1)
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


@contextmanager
def styled_axes(
    to: Path | IO[bytes],
    *,
    form: str = "png",
    size_inches: tuple[float, float] = _SIZE_INCHES,
    columns: int = 1,
    metadata: Mapping[str, Any] | None = None,
    texts: Sequence[str] = (),
) -> Iterator[list[Axes]]:
    """Axes in the style of all figures, side by side, written when the block ends.

    Args:
        to: file to write.
        form: `png` or `svg`.
        size_inches: width and height; 150 px an inch in a PNG.
        columns: how many pairs of axes.
        metadata: of the file.
        texts: labels that may be in a script which the usual font lacks.
    """
    import warnings

    import matplotlib
    from matplotlib.figure import Figure

    from sdtrain.fonts import families_for

    style: Any = {
        "font.family": families_for(texts),
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": GRID,
        "axes.labelcolor": DIM,
        "axes.titlecolor": INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": DIM,
        "ytick.color": DIM,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "svg.hashsalt": "sdtrain",  # the same bytes every time
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # families_for has said so, once
        figure = Figure(figsize=size_inches, layout="constrained")
        found = list(figure.subplots(1, columns, squeeze=False)[0])
        for axes in found:
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(length=0)
        yield found
        figure.savefig(to, format=form, dpi=150, metadata=dict(metadata or {}))


def change_figure(lines: Sequence[Line], limits: tuple[float, float]) -> str:
    """One set's change since sample 0 with both intervals.

    Args:
        lines: validation lines of the set, oldest first.
        limits: of the vertical axis, shared by all sets.
    """
    colour = COLOURS.get(lines[0]["set"], INK)
    clock = [line["samples_seen"] for line in lines]

    def draw(axes: Axes) -> None:
        for key, alpha, label in (
            ("ci95_new_images_percent", 0.14, "95 %, new images of this kind"),
            ("ci95_percent", 0.35, "95 %, these very images"),
        ):
            known = [line for line in lines if line[key] is not None]
            axes.fill_between(
                [line["samples_seen"] for line in known],
                [line[key][0] for line in known],
                [line[key][1] for line in known],
                color=colour,
                alpha=alpha,
                linewidth=0,
                label=label,
            )
        marker = "o" if len(lines) <= _FEW_POINTS else None
        changes = [line["change_percent"] for line in lines]
        axes.plot(clock, changes, color=colour, lw=1.8, marker=marker, ms=4)
        axes.axhline(0, color=DIM, lw=1, ls=(0, (4, 3)))
        axes.set_ylim(limits)
        axes.set_ylabel("change of the loss, %")
        axes.legend(**ABOVE)
        _clock_axis(axes, clock)

    return _figure(draw)


def limits_of(lines: Sequence[Line]) -> tuple[float, float]:
    """A vertical range that holds every interval, with air, and never of no height."""
    keys = ("ci95_percent", "ci95_new_images_percent")
    ends = [end for line in lines for key in keys for end in line[key] or ()]
    values = [0.0, *ends, *(line["change_percent"] for line in lines)]
    values = [value for value in values if value is not None]
    low, high = min(values), max(values)
    air = 0.08 * (high - low) or 0.05
    return low - air, high + air


def bins_figure(latest: Mapping[str, Line]) -> str:
    """The newest evaluation of every set: change in ten bins of the noise level."""

    def draw(axes: Axes) -> None:
        width = 0.8 / max(1, len(latest))
        for k, (name, line) in enumerate(latest.items()):
            relative = [entry["relative"] for entry in line["bins"]]
            changes = [float("nan") if r is None else 100 * (r - 1) for r in relative]
            places = np.arange(len(changes)) + 0.5 + (k - (len(latest) - 1) / 2) * width
            label = NAMES.get(name, name)
            axes.bar(places, changes, width, color=COLOURS.get(name, INK), label=label)
        count = max((len(line["bins"]) for line in latest.values()), default=10)
        axes.set_xlim(0, count)
        ticks = range(0, count + 1, 2)
        axes.set_xticks(list(ticks), [f"{tick / count:g}" for tick in ticks])
        axes.axhline(0, color=DIM, lw=1)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("noise level u (0: clean picture, 1: pure noise)")
        axes.set_ylabel("change since the start, %")
        if len(latest) > 1:
            axes.legend(**ABOVE)

    return _figure(draw)


def loss_figure(lines: Sequence[Line], key: str, label: str, colour: str) -> str:
    """A training curve: every step as a dot, and a running mean through them."""
    known = [(line["samples_seen"], line[key]) for line in lines if line.get(key) is not None]
    clock = [point[0] for point in known]
    values = np.array([point[1] for point in known])
    shown = _thinned(len(known), 1500)

    def draw(axes: Axes) -> None:
        size = 4 if len(known) <= 300 else 2.5
        at_clock = [clock[at] for at in shown]
        axes.plot(at_clock, values[shown], "o", color=colour, alpha=0.35, ms=size, mew=0)
        smooth = running_mean(values)
        axes.plot(at_clock, smooth[shown], color=colour, lw=1.8)
        # The first steps or a spike must not flatten everything else.
        low, high = np.quantile(values, [0.0, 0.94])
        if len(values) > 8 and values.max() > high + (high - low) > 0:
            axes.set_ylim(low - 0.08 * (high - low), high + 0.15 * (high - low))
        axes.set_ylabel(label)
        _clock_axis(axes, clock)

    return _figure(draw)


def running_mean(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Mean over the window around each step that holds `share` of all steps."""
    half = max(1, round(len(values) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def rates_figure(
    lines: Sequence[Line], plan: Mapping[str, Sequence[tuple[int, float]]] | None = None
) -> str:
    """Learning rate of every parameter group: as planned, with what it was on top."""
    plan = plan or {}
    groups = list(dict.fromkeys([*plan, *(name for line in lines for name in line["lr"])]))
    shown = [lines[at] for at in _thinned(len(lines), 1000)]

    def draw(axes: Axes) -> None:
        for k, name in enumerate(groups):
            colour = SERIES[k % len(SERIES)]
            if name in plan:
                planned = zip(*plan[name], strict=True)
                axes.plot(*planned, color=colour, lw=1, ls=(0, (4, 3)), drawstyle="steps-pre")
            # A group that rests has no rate: the line is broken there.
            rates = [line["lr"].get(name, float("nan")) for line in shown]
            clock = [line["samples_seen"] for line in shown]
            axes.plot(clock, rates, color=colour, lw=2, label=name)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        axes.set_ylabel("learning rate")
        axes.legend(loc="best")
        ends = [point[0] for curve in plan.values() for point in curve]
        _clock_axis(axes, sorted([*ends, *(line["samples_seen"] for line in lines)]))

    return _figure(draw)


def variety_figure(lines: Sequence[Line]) -> str:
    """Spread between seeds of every prompt over the run, in units of the first."""
    prompts = list(dict.fromkeys(entry["prompt"] for line in lines for entry in line["prompts"]))

    def draw(axes: Axes) -> None:
        for k, prompt in enumerate(prompts):
            points = [
                (line["samples_seen"], entry["relative"])
                for line in lines
                for entry in line["prompts"]
                if entry["prompt"] == prompt and entry["relative"] is not None
            ]
            if points:
                label = (prompt[:40] + "…" if len(prompt) > 40 else prompt) or "(empty prompt)"
                colour = SERIES[k % len(SERIES)]
                clock, shares = zip(*points, strict=True)
                axes.plot(clock, shares, color=colour, lw=1.8, marker="o", ms=4, label=label)
        axes.axhline(1, color=DIM, lw=1, ls=(0, (4, 3)))
        axes.set_ylim(bottom=0)
        axes.set_ylabel("variety, 1 = start")
        # A prompt is no formula, whatever it has between dollar signs.
        for text in axes.legend(loc="best").get_texts():
            text.set_parse_math(False)
        _clock_axis(axes, [line["samples_seen"] for line in lines])

    return _figure(draw, prompts)


def _clock_axis(axes: Axes, clock: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("samples seen")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if clock and clock[0] == clock[-1]:
        axes.set_xlim(clock[0] - 1, clock[0] + 1)


def _thinned(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` points, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
