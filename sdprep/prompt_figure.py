"""What a prompt policy does, as a picture: one policy, or two side by side, beside their laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdprep.prompt_stats import REFERENCE

_COLOURS = ("#3b6ea8", "#e08a3c")
_TOKEN_BIN = 15
_CHUNK_EDGES = (75, 150, 225)

Report = dict[str, Any]


def draw_statistics(counted: list[Report], to: Path) -> None:
    """Draw tags, tokens, chunks, score tags and dropout of one or two policies as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    _tags(axes[0][0], counted)
    _tokens(axes[0][1], counted)
    _chunks(axes[1][0], counted)
    _frequencies(axes[1][1], counted)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylabel("% of prompts")
        axis.grid(axis="y", color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=110)
    pyplot.close(figure)


def _tags(axis: Any, counted: list[Report]) -> None:
    """Tags per prompt that shows tags, and the law that the policy asks for."""
    for place, found in enumerate(counted):
        shown = {int(n): count for n, count in found["tags"].items() if int(n)}
        _bars(axis, place, len(counted), shown, sum(shown.values()), 1.0)
        target = found["target"]["tags"]
        if target:
            numbers = [int(n) + 0.4 for n in target]
            shares = [100 * share for share in target.values()]
            line = {"color": _COLOURS[place], "marker": "_", "markersize": 9}
            axis.plot(
                numbers, shares, linewidth=1, linestyle=":", label=_law(place, counted), **line
            )
    axis.set_xlabel("tags per prompt that shows tags")
    axis.legend(frameon=False)


def _tokens(axis: Any, counted: list[Report]) -> None:
    for place, found in enumerate(counted):
        shown = {int(n): count for n, count in found["tokens"].items()}
        _bars(axis, place, len(counted), shown, sum(shown.values()), _TOKEN_BIN)
    for edge in _CHUNK_EDGES:
        axis.axvline(edge, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xlabel("tokens per prompt; dotted: 75, 150 and 225, the ends of chunks")


def _chunks(axis: Any, counted: list[Report]) -> None:
    for place, found in enumerate(counted):
        shown = {int(n): count for n, count in found["chunks"].items()}
        _bars(axis, place, len(counted), shown, sum(shown.values()), 1.0)
    reference = REFERENCE["v1_chunk_shares"]
    numbers = [int(n) + 0.4 for n in reference]
    axis.plot(
        numbers, [100 * s for s in reference.values()], "k_", markersize=22, label="bigASP v1"
    )
    axis.set_xticks([n + 0.4 for n in range(1, 4)], ["1", "2", "3"])
    axis.set_xlabel("chunks of 75 tokens per prompt")
    axis.legend(frameon=False)


def _frequencies(axis: Any, counted: list[Report]) -> None:
    """How often each score tag is shown, and how often the caption is dropped."""
    names = sorted({name for found in counted for name in found["score_tags"]})
    labels = ["dropped", *names]
    for place, found in enumerate(counted):
        shares = {"dropped": found["shares"]["dropped"], **found["score_tags"]}
        width = 0.8 / len(counted)
        left = [at + width * place for at in range(len(labels))]
        heights = [100 * shares.get(label, 0.0) for label in labels]
        axis.bar(left, heights, width=width, align="edge", color=_COLOURS[place])
        target = 100 * found["target"]["dropped"]
        axis.plot([width * (place + 0.5)], [target], "k_", markersize=14)
    axis.set_xticks([at + 0.4 for at in range(len(labels))], labels, rotation=60, ha="right")
    axis.set_xlabel("caption dropped (black: the policy's probability), and score tags shown")


def _bars(
    axis: Any, place: int, num: int, counts: dict[int, int], total: int, bin_width: float
) -> None:
    width = 0.8 * bin_width / num
    left = [value + width * place for value in counts]
    shares = [100 * count / (total or 1) for count in counts.values()]
    label = f"policy {place + 1}" if num > 1 else None
    axis.bar(left, shares, width=width, align="edge", color=_COLOURS[place], label=label)


def _law(place: int, counted: list[Report]) -> str:
    return "the policy's law" if len(counted) == 1 else f"law of policy {place + 1}"
