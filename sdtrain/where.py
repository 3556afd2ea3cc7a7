"""Where two models differ: at which noise levels, tags and sources, and on which images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sdtrain.labels import Group, groups
from sdtrain.probe import LossMatrix, Probe

NUM_BINS = 10
FEWEST_POINTS = 3
MOST_IMAGES = 5
_PROMPT_CHARACTERS = 60


@dataclass(frozen=True)
class Bin:
    """One tenth of the noise levels.

    Args:
        start: its lowest u.
        end: its highest.
        change_percent: of the loss in it; None where nothing was measured.
        ci95_percent: images and levels taken together as chance; None with too few points.
    """

    start: float
    end: float
    change_percent: float | None
    ci95_percent: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "from": self.start,
            "to": self.end,
            "change_percent": self.change_percent,
            "ci95_percent": self.ci95_percent,
        }


@dataclass(frozen=True)
class ImageChange:
    """How one image moved."""

    id: str
    prompt: str
    change_percent: float

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class Where:
    """The parts of one comparison.

    Args:
        bins: ten, from the least noise to the most.
        groups: tags and sources of at least four images each.
        images: the most improved and the most worsened ones, improved first.
    """

    bins: list[Bin]
    groups: list[Group]
    images: list[ImageChange]


def where(probe: Probe, a: LossMatrix, b: LossMatrix) -> Where:
    """Take a comparison apart."""
    return Where(bins(a, b), groups(a.weighted, b.weighted, probe.labels, a.u), images(probe, a, b))


def bins(a: LossMatrix, b: LossMatrix) -> list[Bin]:
    """Change in equal bins of the noise level, with an interval."""
    which = np.minimum((a.u * NUM_BINS).astype(int), NUM_BINS - 1)
    found = []
    for k in range(NUM_BINS):
        inside = which == k
        change, interval = _ratio(a.weighted[inside], b.weighted[inside])
        found.append(Bin(k / NUM_BINS, (k + 1) / NUM_BINS, change, interval))
    return found


def _ratio(a: np.ndarray, b: np.ndarray) -> tuple[float | None, tuple[float, float] | None]:
    """Change of a mean in percent, and its interval with every point a draw of its own."""
    if not len(a) or not a.sum() > 0:
        return None, None
    ratio = float(b.sum() / a.sum() - 1)
    if len(a) < FEWEST_POINTS:
        return 100 * ratio, None
    from scipy.stats import t

    residual = (b - a) - ratio * a  # of the ratio, to first order
    error = float(residual.std(ddof=1) * np.sqrt(len(a)) / a.sum())
    half = float(t.ppf(0.975, len(a) - 1)) * error
    return 100 * ratio, (100 * (ratio - half), 100 * (ratio + half))


def images(probe: Probe, a: LossMatrix, b: LossMatrix) -> list[ImageChange]:
    """The images that moved most, either way; all of them if they are few."""
    before, now = a.weighted.mean(1), b.weighted.mean(1)
    found = [
        ImageChange(image.id, image.prompt[:_PROMPT_CHARACTERS], float(100 * (y / x - 1)))
        for image, x, y in zip(probe.images, before, now, strict=True)
        if x > 0
    ]
    found.sort(key=lambda each: (each.change_percent, each.id))
    return found if len(found) <= 2 * MOST_IMAGES else found[:MOST_IMAGES] + found[-MOST_IMAGES:]


def text(found: Where) -> list[str]:
    """Where they differ, for people: lines."""
    lines = []
    for kind in ("tag", "source"):
        moved = [group for group in found.groups if group.kind == kind and group.differs]
        if moved:
            shown = _ends([f"{g.name} {g.found.change_percent:+.2f} %" for g in moved])
            lines.append(f"  {kind}s that differ  {shown}")
        elif any(group.kind == kind for group in found.groups):
            lines.append(f"  {kind}s that differ  none, corrected for looking at all of them")
    if len(found.images) > 1:
        first, last = found.images[0], found.images[-1]
        lines += [
            f"  image most improved  {first.id} {first.change_percent:+.2f} %  {first.prompt!r}",
            f"  image least so       {last.id} {last.change_percent:+.2f} %  {last.prompt!r}",
        ]
    return lines


def _ends(words: Sequence[str], most: int = 3) -> str:
    if len(words) <= 2 * most:
        return ", ".join(words)
    return f"{', '.join(words[:most])} … {', '.join(words[-most:])}"
