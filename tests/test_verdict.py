"""A verdict is a word with its evidence, and chance alone does not make one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sdtrain.best import find_best
from sdtrain.course import StopSection, followed, look_back, point_to_best
from sdtrain.verdict import Verdict, judge, words

CLOCKS = tuple(range(0, 90, 10))


def curve(
    changes: Sequence[float], *, n: int = 12, m: int = 4, spread: float = 0.002, seed: int = 0
) -> dict[int, np.ndarray]:
    """Matrices whose mean moves by these shares of the start, images differing by `spread`."""
    rng = np.random.default_rng(seed)
    base = rng.gamma(20, 0.05, (n, 1)) * np.exp(-np.linspace(0, 2, m))
    own = rng.standard_normal((len(changes), n, 1)) * spread
    return {
        clock: base * (1 + change + (own[k] + spread * rng.standard_normal((n, m))) * (k > 0))
        for k, (clock, change) in enumerate(zip(CLOCKS, changes, strict=False))
    }


FALLING = [0, *(-0.01 * k for k in range(1, 9))]
SETTLED = [0, -0.03, -0.05, -0.06, -0.065, -0.067, -0.068, -0.0685, -0.0685]
TURNING = [0, -0.03, -0.05, -0.05, -0.03, -0.01, 0.01, 0.03, 0.05]
RISING = [0, *(0.02 * k for k in range(1, 9))]
STILL = [0.0] * 9


def found(held: Any, seen: Any = None, outside: Any = None) -> Verdict:
    history = {"validation": held, "train_probe": seen, "forgetting": outside}
    return judge({name: of for name, of in history.items() if of is not None})


@pytest.mark.parametrize(
    ("held", "seen", "word"),
    [
        (FALLING, FALLING, "learning"),
        (FALLING, None, "learning"),
        (SETTLED, SETTLED, "finished"),
        (TURNING, FALLING, "overfitting"),
        (TURNING, SETTLED, "overfitting"),
        (TURNING, None, "damaged"),  # worse than the start, and nothing says it is by heart
        (RISING, FALLING, "overfitting"),
        (RISING, RISING, "damaged"),
        (RISING, None, "damaged"),
        (TURNING, TURNING, "damaged"),
        (STILL, STILL, "cannot tell"),
        (STILL, FALLING, "cannot tell"),
    ],
)
def test_the_word_follows_both_curves(held: Any, seen: Any, word: str) -> None:
    verdict = found(curve(held), None if seen is None else curve(seen, seed=1))
    assert verdict.word == word, verdict.sentence
    if word != "cannot tell":
        assert verdict.evidence[0].direction
        assert verdict.evidence[0].p_value is not None
        assert verdict.evidence[0].p_value <= 0.05
        assert str(verdict.evidence[0].looks) in verdict.sentence


def test_what_is_missing_is_said() -> None:
    assert "No held-out images" in judge({}).reason
    assert "No held-out images" in found(None, curve(FALLING)).reason
    assert "Only the base model" in found(curve(FALLING[:1])).reason
    assert "too few" in found(curve(FALLING, n=2)).reason
    assert "too few evaluations" in found(curve([0, -0.05])).reason
    for history in (found(None), found(curve(FALLING, n=1)), found(curve(FALLING, n=2))):
        assert history.word == "cannot tell"


def test_forgetting_is_told_beside_the_word() -> None:
    verdict = found(curve(SETTLED), curve(SETTLED, seed=1), curve(RISING, seed=2))
    assert (verdict.word, verdict.forgets) == ("finished", True)
    assert "It forgets" in verdict.reason
    assert verdict.evidence[-1].set == "forgetting"
    assert found(curve(SETTLED), None, curve(STILL, seed=2)).forgets is False
    assert found(curve(SETTLED)).forgets is None


def test_many_looks_at_nothing_are_called_cannot_tell() -> None:
    """Forty evaluations that differ by chance: the lowest of them is no best, the last no rise."""
    wrong = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        base = rng.gamma(20, 0.05, (8, 1)) * np.ones((8, 3))
        matrices = {k: base * (1 + 0.01 * rng.standard_normal((8, 1))) for k in range(40)}
        wrong += found(matrices, matrices).word != "cannot tell"
    assert wrong <= 6


def test_a_change_that_another_seed_makes_too_is_none() -> None:
    tiny = curve([0, *([-0.0002] * 8)], spread=1e-6)
    assert found(tiny).word == "cannot tell"
    assert found(curve([0, *([-0.0006] * 8)], spread=1e-6)).word == "finished"


# --- the best evaluation -------------------------------------------------------------------------


def test_the_best_is_the_lowest_with_all_that_may_be_as_good() -> None:
    best = find_best(curve(TURNING))
    assert best.samples_seen in (20, 30)
    assert {20, 30} <= set(best.ties)
    assert not {0, 10, 60, 70, 80} & set(best.ties)
    assert best.change_percent == pytest.approx(-5, abs=0.3)
    same = curve(STILL, spread=0.0)
    assert find_best(same).samples_seen == 0, "of equals the earliest"
    assert find_best(same).ties == CLOCKS
    assert find_best(curve(TURNING, n=2)).p_values is None
    assert find_best(curve(TURNING, n=2)).ties == CLOCKS


def test_the_best_of_many_equals_is_rarely_called_better_than_any() -> None:
    wrong = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        base = rng.gamma(20, 0.05, (6, 1)) * np.ones((6, 2))
        matrices = {k: base * (1 + 0.01 * rng.standard_normal((6, 1))) for k in range(12)}
        wrong += len(find_best(matrices).ties) < 12
    assert wrong <= 14  # expected 5 to 7


def test_more_evaluations_than_are_compared_at_once() -> None:
    rng = np.random.default_rng(0)
    base = rng.gamma(20, 0.05, (6, 1)) * np.ones((6, 2))
    matrices = {k: base * (1 - 0.001 * (k if k < 60 else 120 - k)) for k in range(100)}
    matrices = {k: x * (1 + 1e-5 * rng.standard_normal((6, 2))) for k, x in matrices.items()}
    best = find_best(matrices)
    assert best.samples_seen == 60
    assert best.p_values is not None
    assert best.p_values[99] < 0.05


# --- stopping, and the file that names the best ---------------------------------------------------


class Seen:
    """What `look_back` reads of a probe set."""

    def __init__(self, name: str, history: dict[int, np.ndarray]) -> None:
        n, m = next(iter(history.values())).shape
        u = (np.arange(n)[:, None] / n + np.arange(m)) / m
        self.probe = type("Named", (), {"name": name, "u": lambda _: u})()
        self.history = history


def course(changes: Sequence[float], patience: int | None = 2) -> Any:
    stop = None if patience is None else StopSection(patience=patience)
    sets: Any = [
        Seen("validation", curve(changes)),
        Seen("train_probe", curve(FALLING[: len(changes)], seed=1)),
    ]
    return look_back(sets, stop)


def test_stopping_waits_for_its_patience_and_for_evidence() -> None:
    history = {"validation": curve(TURNING), "train_probe": curve(FALLING, seed=1)}
    assert words(history, 9)[0] == "cannot tell"
    first = list(words(history, 9)).index("overfitting")
    assert course(TURNING[: first + 1]).stop is None
    assert course(TURNING[: first + 2]).stop == "overfitting at 2 evaluations in a row"
    assert course(TURNING[: first + 1], 1).stop == "overfitting at 1 evaluation in a row"
    assert course(TURNING, 9).stop is None
    assert course(TURNING, None).stop is None
    assert course(FALLING).stop is None
    assert course(FALLING).is_best
    assert not course(TURNING).is_best
    assert look_back([], StopSection()).verdict.word == "cannot tell"


def test_the_file_best_names_a_checkpoint_that_is_there(tmp_path: Any) -> None:
    verdict = found(curve(TURNING), curve(FALLING, seed=1))
    assert verdict.best is not None
    point_to_best(tmp_path, verdict)
    assert not (tmp_path / "best").exists()
    place = tmp_path / str(verdict.best.samples_seen)
    place.mkdir()
    point_to_best(tmp_path, verdict)
    assert followed(tmp_path / "best") == place
    assert followed(place) == place
    place.rmdir()
    point_to_best(tmp_path, verdict)
    assert not (tmp_path / "best").exists()
    (tmp_path / "best").write_text("torn", encoding="utf-8")
    assert followed(tmp_path / "best") == tmp_path / "best"


def test_few_images_that_all_got_better_are_not_called_learnt_by_heart() -> None:
    rng = np.random.default_rng(4)
    start = 1 + 0.01 * rng.standard_normal((4, 8))
    gains = np.array([0.01, 0.05, 0.3, 0.9])[:, None]  # so unlike that new images are in doubt
    held = {0: start, 8: start - gains, 16: start - gains}
    found = judge({"validation": held, "train_probe": held})
    assert found.word == "cannot tell"
    assert "These held-out images got better" in found.reason
    assert "by heart" not in found.reason
