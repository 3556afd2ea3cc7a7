"""Two evaluations are compared only on one probe, and the words say what the intervals say."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdprep.errors import DataError
from sdtrain.compare import compare_measured, compare_paths, text
from sdtrain.lattice import FLAT
from sdtrain.matrices import Measured, differences, find
from sdtrain.paired import compare, holm
from sdtrain.probe import LossMatrix, Probe, ProbeImage
from sdtrain.wording import percent, sentence, span

IMAGES = tuple(ProbeImage(f"id{k}", f"prompt {k}", (64, 64)) for k in range(8))
PROBE = Probe("validation", 1, IMAGES, 4, FLAT, "tiny", "epsilon", "no", "hash")


def matrix(change: float, noise: float = 0.001, shape: tuple[int, int] = (8, 4)) -> LossMatrix:
    rng = np.random.default_rng(0)
    level = np.exp(-3 * PROBE.u())[: shape[0], : shape[1]] * rng.gamma(50, 0.02, shape)
    spread = np.random.default_rng(int(1e6 * abs(change))).standard_normal(shape)
    loss = level * (1 + change + noise * spread)
    return LossMatrix(loss.astype(np.float32), PROBE.u()[: shape[0], : shape[1]], np.ones(shape))


def written(folder: Path, probe: Probe = PROBE, **changes: float) -> Path:
    """`validation/` of a run with one matrix for each clock: `at8 = -0.02`."""
    place = probe.save(folder / "validation")
    for clock, change in changes.items():
        matrix(change).save(place / f"{clock.removeprefix('at')}.npz", [i.id for i in IMAGES])
    return folder


def test_a_run_alone_is_compared_with_its_start(tmp_path: Path) -> None:
    run = written(tmp_path / "run", at0=0.0, at8=-0.01, at16=-0.02)
    (pair,) = compare_paths([run])
    assert pair.a.endswith("run@0")
    assert pair.b.endswith("run@16")
    stored = [LossMatrix.load(run / "validation" / PROBE.probe_id / f"{c}.npz") for c in (0, 16)]
    expected = 100 * (stored[1].mean / stored[0].mean - 1)
    assert pair.found.change_percent == pytest.approx(expected)
    assert pair.found.change_percent == pytest.approx(-2, abs=0.1)
    assert pair.to_json()["verdict"] == "better"
    assert "B is better than A" in pair.sentence
    assert "new images of this kind too" in pair.sentence


def test_files_folders_and_runs_all_name_matrices(tmp_path: Path) -> None:
    run = written(tmp_path / "a run", at0=0.0, at8=-0.02)
    place = run / "validation" / PROBE.probe_id
    for path in (run, run / "validation", place, place / "8.npz"):
        (pair,) = compare_paths([place / "0.npz", path])
        assert pair.found.change_percent == pytest.approx(-2, abs=0.1)
        assert len(pair.bins_percent) == 10
    json.dumps(pair.to_json())
    assert "least" in text([pair])


def test_a_checkpoint_stands_for_the_evaluation_at_its_clock(evaluated_run: Path) -> None:
    pairs = compare_paths([evaluated_run / "checkpoints" / str(clock) for clock in (8, 12)])
    assert [pair.name for pair in pairs] == ["validation", "train_probe"]
    assert pairs[0].a.endswith("@8")
    whole = compare_paths([evaluated_run])
    lines = (evaluated_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [json.loads(x) for x in lines if '"validation", "samples_seen": 12' in x]
    for line, pair in zip(last, whole, strict=True):
        assert pair.name == line["set"]
        assert pair.found.change_percent == pytest.approx(line["change_percent"], rel=1e-12)
        assert list(pair.found.ci95_percent or ()) == line["ci95_percent"]


def test_a_future_that_was_given_up_is_not_the_newest(evaluated_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run, ignore=shutil.ignore_patterns("checkpoints", "model"))
    kept = [
        line
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if json.loads(line)["samples_seen"] <= 8
    ]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    assert {each.path.stem for each in find(run).values()} == {"8"}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (replace(PROBE, seed=2), "seed: 1 and 2"),
        (replace(PROBE, precision="bf16"), "precision: no and bf16"),
        (replace(PROBE, images=IMAGES[::-1]), "the same in another order"),
        (replace(PROBE, images=(*IMAGES[:7], ProbeImage("new", "", (64, 64)))), "7 in common"),
        (
            replace(PROBE, images=(*IMAGES[:7], replace(IMAGES[7], prompt="red"))),
            "such as id7, whose prompt is 'prompt 7' and 'red'",
        ),
    ],
)
def test_two_probes_are_refused_with_what_differs(tmp_path: Path, other: Probe, words: str) -> None:
    a, b = written(tmp_path / "a", at0=0.0), written(tmp_path / "b", other, at0=0.0)
    with pytest.raises(DataError) as caught:
        compare_paths([a, b])
    assert words in caught.value.message
    assert differences(PROBE, PROBE) == []


def test_what_holds_no_evaluation_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no evaluation"):
        find(tmp_path)
    matrix(0.0).save(tmp_path / "5.npz", ["a"])
    with pytest.raises(DataError, match="has no probe.json beside it"):
        find(tmp_path / "5.npz")
    place = PROBE.save(tmp_path / "v")
    matrix(0.0, shape=(7, 4)).save(place / "0.npz", ["a"])
    with pytest.raises(DataError, match="holds .* losses, its probe has"):
        compare_paths([place / "0.npz", place / "0.npz"])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"loss": float("nan")}, r"32 of 32 losses are no numbers, the first of id0 at u = 0\."),
        ({"loss": 0.0}, "the mean loss is 0, and nothing can be said in percent"),
        ({"u": 0.5}, "was measured at other noise levels than probe.json beside it says"),
    ],
)
def test_a_matrix_that_no_comparison_can_use_is_named(
    tmp_path: Path, changed: dict[str, float], words: str
) -> None:
    run = written(tmp_path / "run", at0=0.0, at8=-0.02)
    file = run / "validation" / PROBE.probe_id / "8.npz"
    whole = matrix(-0.02)
    fields = {key: np.full_like(getattr(whole, key), value) for key, value in changed.items()}
    replace(whole, **fields).save(file, [i.id for i in IMAGES])
    with pytest.raises(DataError, match=words) as caught:
        compare_paths([run])
    assert str(file) in caught.value.message


def test_a_file_of_another_kind_is_not_advised_to_be_unpickled(tmp_path: Path) -> None:
    run = written(tmp_path / "run", at0=0.0)
    (run / "validation" / PROBE.probe_id / "8.npz").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"8\.npz is no loss matrix: no \.npz archive") as caught:
        compare_paths([run])
    assert "pickle" not in str(caught.value)


def test_one_evaluation_alone_says_what_it_lacks(tmp_path: Path) -> None:
    run = written(tmp_path / "run", at0=0.0)
    with pytest.raises(DataError, match="is the only evaluation of validation, at sample 0"):
        compare_paths([run])
    place = run / "validation" / PROBE.probe_id
    (place / "0.npz").rename(place / "8.npz")
    with pytest.raises(DataError, match="has no evaluation at sample 0 beside it"):
        compare_paths([run])


def test_words_follow_the_intervals() -> None:
    a = matrix(0.0, 0.0).weighted
    worse, same = matrix(0.02).weighted, matrix(0.00001, 0.01).weighted
    assert "B is worse than A" in sentence(compare(a, worse))
    assert sentence(compare(a, same)).startswith("Cannot tell A and B apart")
    assert "one image" in sentence(compare(a[:1], worse[:1]))
    assert "one noise level" in sentence(compare(a[:, :1], worse[:, :1]))
    tiny = compare(a, a * (1 - 1e-4))
    assert "Another training seed changes as much" in sentence(tiny)
    mixed = a * (1 + 0.02 * np.where(np.arange(8) < 6, -1, 1)[:, None])
    assert "could go either way" in sentence(compare(a, mixed))


def test_many_comparisons_are_corrected_by_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_looking_often_does_not_find_a_winner(tmp_path: Path) -> None:
    """Twenty copies of A with noise: alone one may look better, together none does."""
    place = PROBE.save(tmp_path)
    matrix(0.0, 0.0).save(place / "0.npz", ["a"])
    for clock in range(1, 21):
        matrix(clock * 1e-6, 0.01).save(place / f"{clock}.npz", ["a"])
    measured = [Measured(place / f"{clock}.npz", PROBE) for clock in range(21)]
    pairs = compare_measured([(measured[0], each) for each in measured[1:]])
    assert {pair.direction for pair in pairs} == {0}
    assert all(pair.p_value is not None for pair in pairs)


def test_numbers_are_read_easily() -> None:
    assert percent(-1.1749) == "-1.17 %"
    assert percent(0.0312) == "+0.031 %"
    assert percent(0.0) == "0 %"
    assert percent(None) == percent(float("nan")) == "unknown"
    assert span((-1.5, 0.25)) == "-1.50 to +0.25 %"
    assert span(None) == "no interval"
