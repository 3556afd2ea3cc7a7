"""Compare evaluations of one probe, and say whether B is better than A and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdprep.console import warn
from sdprep.errors import DataError
from sdtrain.matrices import Measured, differences, find, start_of
from sdtrain.paired import Comparison, compare, holm
from sdtrain.where import Where, where
from sdtrain.where import text as where_text
from sdtrain.wording import amount, percent, sentence, span

ALPHA = 0.05
VERDICTS = {-1: "better", 0: "cannot tell", 1: "worse"}
TARGETS_PERCENT = (0.1, 0.5)


@dataclass(frozen=True)
class Pair:
    """One set, measured twice.

    Args:
        name: the set.
        probe_id: of both.
        a: what the first is called.
        b: what the second is called.
        found: the comparison.
        where: the parts of the difference.
        direction: -1 b is better, 1 worse, 0 cannot tell; corrected for many looks.
        p_value: the same correction of the two-sided p on these images.
        new_direction: the direction that new images would show, too.
        new_p_value: likewise.
    """

    name: str
    probe_id: str
    a: str
    b: str
    found: Comparison
    where: Where
    direction: int
    p_value: float | None
    new_direction: int
    new_p_value: float | None

    @property
    def bins_percent(self) -> list[float | None]:
        """Change in ten equal bins of the noise level; None where nothing was measured."""
        return [each.change_percent for each in self.where.bins]

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        found = self.found
        return {
            "set": self.name,
            "probe_id": self.probe_id,
            "a": self.a,
            "b": self.b,
            "images": found.num_images,
            "timesteps_per_image": found.num_levels,
            "mean_a": found.mean_a,
            "mean_b": found.mean_b,
            "change_percent": found.change_percent,
            "ci95_percent": found.ci95_percent,
            "ci95_new_images_percent": found.ci95_new_images_percent,
            "resolves_percent": found.resolves_percent,
            "resolves_new_images_percent": found.resolves_new_images_percent,
            "p_value": self.p_value,
            "p_value_new_images": self.new_p_value,
            "images_needed": {str(t): found.images_needed(t) for t in TARGETS_PERCENT},
            "bins": [each.to_json() for each in self.where.bins],
            "tags": [g.to_json() for g in self.where.groups if g.kind == "tag"],
            "sources": [g.to_json() for g in self.where.groups if g.kind == "source"],
            "images_most_moved": [each.to_json() for each in self.where.images],
            "verdict": VERDICTS[self.direction],
            "verdict_new_images": VERDICTS[self.new_direction],
            "sentence": self.sentence,
        }

    @property
    def sentence(self) -> str:
        """The outcome in words."""
        return sentence(self.found, "A", "B", self.direction)


def compare_paths(paths: Sequence[Path]) -> list[Pair]:
    """Compare the first path with each of the others; one run alone with its own start.

    Args:
        paths: what `matrices.find` takes.

    Raises:
        DataError: a path holds no evaluation, or no set was measured on one probe.
    """
    first = find(paths[0])
    if len(paths) == 1:
        starts = {name: start_of(measured) for name, measured in first.items()}
        return compare_measured([(starts[name], first[name]) for name in _ordered(first)])
    pairs: list[tuple[Measured, Measured]] = []
    for path in paths[1:]:
        pairs += _matching(paths[0], first, path, find(path))
    return compare_measured(pairs)


def _ordered(names: Iterable[str]) -> list[str]:
    """Held-out images first: they are what counts."""
    return sorted(names, key=lambda name: (name != "validation", name))


def _matching(
    path_a: Path, a: dict[str, Measured], path_b: Path, b: dict[str, Measured]
) -> list[tuple[Measured, Measured]]:
    """Pairs of one probe; sets that were measured on two are left out with the reason."""
    pairs, reasons = [], []
    for name in _ordered({**a, **b}):
        if name not in a or name not in b:
            reasons.append(f"{name}: measured only in {path_a if name in a else path_b}")
        elif a[name].probe.probe_id != b[name].probe.probe_id:
            found = "; ".join(differences(a[name].probe, b[name].probe))
            reasons.append(f"{name}: two different probes ({found})")
        else:
            pairs.append((a[name], b[name]))
    if not pairs:
        raise DataError(
            f"{path_a} and {path_b} share no probe, so their numbers cannot be compared\n  "
            + "\n  ".join(reasons),
            "Use one probe for both: validation.probe = PATH in the recipe of the later run, or "
            "sdtrain validate RECIPE with both checkpoints.",
        )
    for reason in reasons:
        warn(f"not compared: {reason}")
    return pairs


def compare_measured(pairs: Sequence[tuple[Measured, Measured]]) -> list[Pair]:
    """Compare matrices pair by pair; p-values are corrected for the number of looks at a set."""
    matrices = [(a.load(), b.load()) for a, b in pairs]
    found = [compare(a.weighted, b.weighted, a.u) for a, b in matrices]
    names = [a.probe.name for a, _ in pairs]
    here = _corrected(names, [each.p_value for each in found])
    new = _corrected(names, [each.p_value_new_images for each in found])
    return [
        Pair(
            name=a.probe.name,
            probe_id=a.probe.probe_id,
            a=a.label,
            b=b.label,
            found=found[at],
            where=where(a.probe, *matrices[at]),
            direction=found[at].direction if here.get(at, 1.0) <= ALPHA else 0,
            p_value=here.get(at),
            new_direction=found[at].direction_new_images if new.get(at, 1.0) <= ALPHA else 0,
            new_p_value=new.get(at),
        )
        for at, (a, b) in enumerate(pairs)
    ]


def _corrected(names: Sequence[str], p_values: Sequence[float | None]) -> dict[int, float]:
    """Index of each comparison to its p-value by Holm, over all looks at the same set."""
    found: dict[int, float] = {}
    for name in dict.fromkeys(names):
        known = {at: p for at, p in enumerate(p_values) if names[at] == name and p is not None}
        found |= dict(zip(known, holm(list(known.values())), strict=True))
    return found


def text(pairs: Sequence[Pair]) -> str:
    """The comparisons for people."""
    return "\n\n".join(_pair_text(pair) for pair in pairs)


def _pair_text(pair: Pair) -> str:
    found = pair.found
    resolves = "unknown" if found.resolves_percent is None else f"{found.resolves_percent:.3g} %"
    lines = [
        f"{pair.name}: {amount(found.num_images, 'image')} x {found.num_levels} noise levels, "
        f"probe {pair.probe_id[:8]}",
        f"  A  mean {found.mean_a:.6f}  {pair.a}",
        f"  B  mean {found.mean_b:.6f}  {pair.b}",
        f"  change             {percent(found.change_percent)}",
        f"  95 % these images  {span(found.ci95_percent)}   (this probe resolves {resolves})",
        f"  95 % new images    {span(found.ci95_new_images_percent)}   ({_needed(found)})",
        f"  by noise level     {_bins_text(pair.bins_percent)}",
        *where_text(pair.where),
        f"  {pair.sentence}",
    ]
    return "\n".join(lines)


def _needed(found: Comparison) -> str:
    known = {t: found.images_needed(t) for t in TARGETS_PERCENT}
    words = [
        f"{amount(count, 'image')} to see {t} %" for t, count in known.items() if count is not None
    ]
    alone = found.ci95_new_images_percent is None
    return ", ".join(words) or ("one image says nothing about others" if alone else "none moved")


def _bins_text(changes: Sequence[float | None]) -> str:
    shown = ["-" if change is None else f"{change:+.2f}" for change in changes]
    return f"least {' '.join(shown)} most noise, %"
