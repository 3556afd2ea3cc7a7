"""What a run has come to, in a word, with the evidence: never by eye.

The words: `learning`, `finished`, `overfitting`, `damaged`, `cannot tell`. A change counts when
new images of this kind would show it too, after a correction for every look that was taken, and
when it is larger than what another training seed changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sdtrain.best import ALPHA, FEWEST_IMAGES, Best, find_best
from sdtrain.looks import over_looks
from sdtrain.paired import Comparison, compare
from sdtrain.wording import SEED_NOISE_PERCENT, percent, span

HELD_OUT, SEEN, OUTSIDE = "validation", "train_probe", "forgetting"
SETTLED_SHARE = 0.10
"""A run whose last third brought less than this share of its whole gain has settled: a curve that
still falls in a line brings a third there, one that has run for three time constants 9 %."""

History = Mapping[str, Mapping[int, np.ndarray]]
"""Set to clock to (n, m) weighted losses."""

Levels = Mapping[str, np.ndarray]
"""Set to (n, m) noise levels."""


@dataclass(frozen=True)
class Evidence:
    """One comparison that a verdict rests on.

    Args:
        set: the images.
        since: clock of the earlier evaluation.
        until: clock of the later one.
        change_percent: of the loss between them.
        ci95_percent: on these images.
        ci95_new_images_percent: for new images.
        p_value: of no change on new images, two-sided, corrected for the looks.
        looks: how many comparisons it was corrected for.
        direction: -1 fell, 1 rose, 0 cannot tell.
    """

    set: str
    since: int
    until: int
    change_percent: float
    ci95_percent: tuple[float, float] | None
    ci95_new_images_percent: tuple[float, float] | None
    p_value: float | None
    looks: int
    direction: int

    def __str__(self) -> str:
        name = {HELD_OUT: "held-out images", SEEN: "training images", OUTSIDE: "outside images"}
        return (
            f"{name.get(self.set, self.set)} {percent(self.change_percent)} from {self.since:,} to "
            f"{self.until:,} samples (95 %: {span(self.ci95_percent)} on these images, "
            f"{span(self.ci95_new_images_percent)} on new ones; "
            f"{self.looks} {'look' if self.looks == 1 else 'looks'})"
        )


@dataclass(frozen=True)
class Verdict:
    """A word and what it rests on.

    Args:
        word: learning, finished, overfitting, damaged or cannot tell.
        reason: one sentence.
        evidence: the comparisons, the decisive one first.
        best: the best evaluation on held-out images; None without any.
        forgets: whether the loss on outside images rose; None if there are none.
    """

    word: str
    reason: str
    evidence: tuple[Evidence, ...]
    best: Best | None
    forgets: bool | None

    @property
    def sentence(self) -> str:
        """Word, reason and evidence."""
        proof = "; ".join(str(each) for each in self.evidence)
        return f"{self.word}: {self.reason}{f' Evidence: {proof}.' if proof else ''}"

    def to_json(self) -> dict[str, Any]:
        """As the metrics keep it."""
        best = None
        if self.best is not None:
            best = {k: v for k, v in asdict(self.best).items() if k != "p_values"}
        return {
            "verdict": self.word,
            "reason": self.reason,
            "evidence": [asdict(each) for each in self.evidence],
            "best": best,
            "forgets": self.forgets,
        }


@dataclass(frozen=True)
class _Looks:
    """What was measured, and where."""

    history: History
    levels: Levels

    def at(self, name: str) -> Mapping[int, np.ndarray]:
        return self.history.get(name, {})

    def compare(self, name: str, since: int, until: int) -> Comparison:
        matrices = self.history[name]
        return compare(matrices[since], matrices[until], self.levels.get(name))

    def corrected(self, name: str, since: int, untils: Sequence[int]) -> tuple[Comparison, float]:
        """The last comparison, and its p-value for new images corrected for all of them."""
        matrices = self.history[name]
        found = [self.compare(name, since, until) for until in untils]
        changes = np.stack([(matrices[until] - matrices[since]).mean(1) for until in untils])
        p_values = [each.p_value_new_images or 0.0 for each in found]
        return found[-1], over_looks(changes, p_values)[-1]


def judge(history: History, levels: Levels | None = None) -> Verdict:
    """Say what a run has come to.

    Args:
        history: every evaluation so far of `validation`, `train_probe` and `forgetting`; each set
            is optional, and the first clock of each is the base model.
        levels: where each set was looked at, for narrower intervals on its own images.
    """
    looks = _Looks(history, levels or {})
    held = looks.at(HELD_OUT)
    outside = _since_start(OUTSIDE, looks)
    forgets = None if outside is None else outside.direction > 0
    best = find_best(held) if held else None
    word, reason, evidence = _word(looks, held, best)
    if outside is not None:
        evidence = (*evidence, outside)
        if forgets:
            reason += " It forgets: the loss on images from outside the training set rose."
    return Verdict(word, reason, evidence, best, forgets)


_Finding = tuple[str, str, tuple[Evidence, ...]]


def _word(looks: _Looks, held: Mapping[int, np.ndarray], best: Best | None) -> _Finding:
    change = _since_start(HELD_OUT, looks)
    if best is None or change is None:
        return "cannot tell", _why_not(held), _known(_since_start(SEEN, looks))
    seen = _since_start(SEEN, looks)
    later = _since_best(HELD_OUT, looks, best)
    if later is not None and later.direction > 0:
        return _worse(looks, best, later, change)
    if change.direction > 0:  # the start is the best, which a look at fewer evaluations shows
        return _worse(looks, best, change, change)
    if change.direction < 0:
        return _better(looks, change, seen)
    return "cannot tell", _undecided(change, seen), _known(change, seen)


def _undecided(change: Evidence, seen: Evidence | None) -> str:
    """Why new images cannot be spoken of, with what is sure of these ones."""
    low, high = change.ci95_percent or (0.0, 0.0)
    if high < 0 or low > 0:
        how = "better" if high < 0 else "worse"
        return (
            f"These held-out images got {how}; whether new ones would, so few images do not say "
            "for certain. Hold out more of them."
        )
    text = "No change on held-out images that chance or another seed could not make."
    if seen is not None and seen.direction < 0:
        text += " The training images got better: more of this is learning by heart."
    return text


def _worse(looks: _Looks, best: Best, rise: Evidence, change: Evidence) -> _Finding:
    """Held-out images got worse: tell learning by heart from damage."""
    seen = _between(SEEN, looks, rise.since, rise.until)
    where = f"since {rise.since:,} samples" if rise.since else "since the start"
    if seen is not None and seen.direction > 0:
        return "damaged", f"The loss rose on held-out and on training images {where}.", (rise, seen)
    if seen is None:
        if change.direction > 0:
            text = f"The loss on held-out images rose {where}; no training images were evaluated."
            return "damaged", text, (rise,)
        text = f"Held-out images got worse {where}; no training images were evaluated to prove it."
        return "overfitting", text, (rise,)
    how = "got better" if seen.direction < 0 else "did not get worse"
    text = f"Held-out images got worse {where} while training images {how}."
    if best.samples_seen:
        text += f" The best evaluation was at {best.samples_seen:,} samples."
    return "overfitting", text, (rise, seen)


def _better(looks: _Looks, change: Evidence, seen: Evidence | None) -> _Finding:
    """Held-out images got better: tell whether that still goes on."""
    held = looks.at(HELD_OUT)
    clocks = sorted(held)
    earlier = [clock for clock in clocks if 0 < clock <= change.until * 2 / 3]
    if not earlier:
        text = "Held-out images got better; too few evaluations to say whether that has ended."
        return "learning", text, _known(change, seen)
    recent = _between(HELD_OUT, looks, earlier[-1], change.until)
    assert recent is not None, "both clocks are of this set"
    start, then, now = (float(held[k].mean()) for k in (clocks[0], earlier[-1], change.until))
    share = (then - now) / (start - now)  # of the whole gain, which may dwarf what is left
    if share < SETTLED_SHARE or recent.change_percent > -SEED_NOISE_PERCENT:
        text = (
            "Held-out images got better, and the last third of the run brought "
            f"{100 * max(0.0, share):.2g} % of the gain."
        )
        return "finished", text, _known(change, recent, seen)
    is_sure = recent.ci95_percent is not None and recent.ci95_percent[1] < 0
    more = "it still goes on: more training may help" if is_sure else "it may still go on"
    return "learning", f"Held-out images got better, and {more}.", _known(change, recent, seen)


def _why_not(held: Mapping[int, np.ndarray]) -> str:
    if not held:
        return "No held-out images: learning cannot be told from learning by heart."
    if len(held) < 2:
        return "Only the base model has been evaluated."
    return "The held-out images are too few for an interval."


def _known(*evidence: Evidence | None) -> tuple[Evidence, ...]:
    return tuple(each for each in evidence if each is not None)


# --- comparisons ---------------------------------------------------------------------------------


def _since_start(name: str, looks: _Looks) -> Evidence | None:
    """The newest evaluation against the first, corrected for every evaluation in between."""
    clocks = sorted(looks.at(name))
    if len(clocks) < 2:
        return None
    found, corrected = looks.corrected(name, clocks[0], clocks[1:])
    if found.p_value_new_images is None or found.num_images < FEWEST_IMAGES:
        return None
    return _evidence(name, clocks[0], clocks[-1], found, corrected, len(clocks) - 1)


def _since_best(name: str, looks: _Looks, best: Best) -> Evidence | None:
    """The newest evaluation against the best: by the bootstrap, and for every look since."""
    matrices = looks.at(name)
    later = [clock for clock in sorted(matrices) if clock > best.samples_seen]
    if not later or best.p_values is None:
        return None
    found, corrected = looks.corrected(name, best.samples_seen, later)
    largest = max(corrected, best.p_values[later[-1]])
    return _evidence(name, best.samples_seen, later[-1], found, largest, len(matrices) - 1)


def _between(name: str, looks: _Looks, since: int, until: int) -> Evidence | None:
    """Two given evaluations of a set; None if it lacks one or gives no interval."""
    if since not in looks.at(name) or until not in looks.at(name):
        return None
    found = looks.compare(name, since, until)
    if found.p_value_new_images is None:
        return None
    return _evidence(name, since, until, found, found.p_value_new_images, 1)


def _evidence(
    name: str, since: int, until: int, found: Comparison, p_value: float, looks: int
) -> Evidence:
    is_claimed = p_value <= ALPHA and abs(found.change_percent) >= SEED_NOISE_PERCENT
    return Evidence(
        set=name,
        since=since,
        until=until,
        change_percent=found.change_percent,
        ci95_percent=found.ci95_percent,
        ci95_new_images_percent=found.ci95_new_images_percent,
        p_value=p_value,
        looks=looks,
        direction=(1 if found.change_percent > 0 else -1) if is_claimed else 0,
    )


def words(history: History, count: int) -> Sequence[str]:
    """The word at each of the last `count` evaluations of the held-out images, oldest first."""
    clocks = sorted(history.get(HELD_OUT, {}))[-count:] if count else []
    return [
        judge(
            {name: {k: x for k, x in of.items() if k <= clock} for name, of in history.items()}
        ).word
        for clock in clocks
    ]
