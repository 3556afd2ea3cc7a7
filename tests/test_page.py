"""The page is whole in one file, escapes every text, and says what the numbers say."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdprep.errors import DataError, UserError
from sdtrain import page
from sdtrain.page_figures import limits_of, loss_figure, running_mean
from sdtrain.page_parts import typeset
from sdtrain.page_plan import duration
from sdtrain.recipe import load_train_recipe
from sdtrain.run_folder import RunFolder
from sdtrain.trackers.jsonl import has_stopped_early
from sdtrain.trainer import train

VOID = {"meta", "img", "br", "link", "input"}


class Outline(HTMLParser):
    """Tags that are open, and what is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def outline(path: Path) -> Outline:
    found = Outline()
    found.feed(path.read_text(encoding="utf-8"))
    assert found.open == []
    assert all(source.startswith("data:") for source in found.sources)
    return found


@pytest.fixture
def run(evaluated_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may change; its name needs escaping."""
    copy = tmp_path / "run & <script>"
    shutil.copytree(evaluated_run, copy, ignore=shutil.ignore_patterns("checkpoints", "model"))
    return copy


def test_a_finished_run_leaves_its_page(evaluated_run: Path) -> None:
    found = outline(evaluated_run / page.PAGE)
    lines = [json.loads(x) for x in (evaluated_run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "validation"][-2]
    assert f"{last['change_percent']:+.2f} %".replace("-", "\N{MINUS SIGN}") in found.words
    assert f"{last['mean']:.6f}" in found.words
    for words in ("Plan against reality", "The whole run:", "Held-out images, ", "Passes over"):
        assert words.rstrip(", ") in found.words
    html = (evaluated_run / page.PAGE).read_text(encoding="utf-8")
    assert "http-equiv" not in html, "a finished page stays as it is"
    for words in ("12 of 12 samples (finished)", "unet.**", "frozen", "Held-out images: loss"):
        assert words in found.words
    # two sets, ten bins, raw and debiased loss, learning rates; two prompts, drawn twice
    assert len(found.sources) == 6 + 4
    kinds = [source.split(";")[0] for source in found.sources]
    assert kinds.count("data:image/svg+xml") == 6
    assert kinds.count("data:image/png") == 4


def test_every_text_is_escaped(run: Path) -> None:
    facts = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    facts |= {"origin": "<img src=x onerror=alert(1)>", "device": "</dd><script>"}
    (run / "environment.json").write_text(json.dumps(facts), encoding="utf-8")
    found = outline(page.write_page(run))
    assert "<img src=x onerror=alert(1)>" in found.words
    assert "run & <script>" in found.words
    assert "a photo of a dog <b>" in found.words  # in the recipe


def test_the_page_is_the_same_bytes_every_time(run: Path) -> None:
    first = page.write_page(run).read_bytes()
    assert page.write_page(run).read_bytes() == first


def test_while_it_trains_the_page_loads_itself_anew_and_says_so(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["samples_seen"] <= 8]
    (run / "metrics.jsonl").write_text("".join(f"{x}\n" for x in kept), encoding="utf-8")
    found = outline(page.write_page(run, is_running=True))
    assert "8 of 12 samples (in training)" in found.words
    html = (run / page.PAGE).read_text(encoding="utf-8")
    assert '<meta http-equiv="refresh" content="60">' in html


def test_plan_and_reality_stand_side_by_side(run: Path) -> None:
    (run / "pace.jsonl").write_text(
        '{"session": "a", "seconds": 0.0, "samples_seen": 0}\n'
        '{"session": "a", "seconds": 60.0, "samples_seen": 8}\n'
        '{"session": "b", "seconds": 1.0, "samples_seen": 8}\n'
        '{"session": "b", "seconds": 41.0, "samples_seen": 12}\n',
        encoding="utf-8",
    )
    words = outline(page.write_page(run)).words
    # planned, due by now, done: at 0, 8 and 12 samples
    assert "Evaluations333" in words
    assert "Sets of pictures222" in words
    assert "Optimizer steps33" in words
    assert "everything included0.1" in words
    assert "Timenone left2 min" in words
    assert duration(20) == "20 s"
    assert duration(3 * 3600 + 300) == "3 h 05 min"
    assert duration(86400 * 3.5) == "3.5 days"


def test_a_run_that_went_on_after_an_early_stop_has_not_stopped_early() -> None:
    stopped = {"kind": "verdict", "samples_seen": 8, "stopped_early": "overfitting"}
    ended = {"kind": "verdict", "samples_seen": 12, "stopped_early": None}
    step, pictures = {"kind": "train", "samples_seen": 12}, {"kind": "variety", "samples_seen": 8}
    assert not has_stopped_early([])
    assert has_stopped_early([step, stopped, pictures])
    assert not has_stopped_early([step, stopped, step, ended])
    assert not has_stopped_early([stopped, step, step, step, step])


def test_a_run_that_stopped_early_has_no_time_left(run: Path) -> None:
    (run / "pace.jsonl").write_text(
        '{"session": "a", "seconds": 0.0, "samples_seen": 0}\n'
        '{"session": "a", "seconds": 60.0, "samples_seen": 8}\n',
        encoding="utf-8",
    )
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    half = [line for line in lines if line["samples_seen"] <= 8 and line["kind"] != "verdict"]
    file.write_text("".join(json.dumps(line) + "\n" for line in half), encoding="utf-8")
    assert "Time30 s left60 s" in outline(page.write_page(run)).words.replace("1 min", "60 s")
    verdict = {**lines[-1], "kind": "verdict", "samples_seen": 8, "stopped_early": "it was enough"}
    with file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(verdict) + "\n")
    assert "none left" in outline(page.write_page(run)).words


def test_variety_is_drawn_and_figures_follow_the_readers_colours(run: Path) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for clock, share in ((0, 1.0), (12, 0.5)):
            entry = {"prompt": "a $x_{ <b>", "relative": share}
            line = {"kind": "variety", "samples_seen": clock, "prompts": [entry]}
            file.write(json.dumps(line) + "\n")
    found = outline(page.write_page(run))
    assert "Variety between seeds" in found.words
    svg = [x for x in found.sources if "svg" in x]
    for picture in svg:
        assert b"prefers-color-scheme: dark" in base64.b64decode(picture.split(",")[1])


def test_it_is_renewed_at_most_once_a_minute_and_at_the_end(run: Path) -> None:
    path, folder = run / page.PAGE, RunFolder(run)
    path.write_text("old", encoding="utf-8")
    page.refresh(folder)
    assert path.read_text(encoding="utf-8") == "old"
    page.refresh(folder, is_last=True)
    assert path.read_text(encoding="utf-8") != "old"


def test_a_page_that_cannot_be_drawn_ends_no_training(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "environment.json").write_text("{", encoding="utf-8")
    page.refresh(RunFolder(run), is_last=True)
    assert "could not be drawn" in capsys.readouterr().err


def shortened(run: Path, keep: Any) -> Outline:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if keep(json.loads(line))]
    (run / "metrics.jsonl").write_text("".join(f"{x}\n" for x in kept), encoding="utf-8")
    return outline(page.write_page(run))


def test_a_run_that_has_just_begun_has_a_page(run: Path) -> None:
    found = shortened(run, lambda line: line["samples_seen"] == 0)
    assert "Just begun" in found.words
    assert "0 of 12 samples (in progress, or stopped)" in found.words
    assert len(found.sources) == 2  # the samples; a curve of one point says nothing


def test_a_run_that_diverges_says_so_on_its_page(train_recipe: Callable[..., Path]) -> None:
    recipe = load_train_recipe(
        train_recipe(), ("train.samples=8", "train.rules=[]", "train.lr=1e6")
    )
    with pytest.raises(UserError, match=r"no number|not finite"):
        train(recipe)
    path = recipe.output / page.PAGE
    found = outline(path)
    assert "Ended by an error" in found.words
    assert "(ended by an error)" in found.words
    assert "Just begun" not in found.words
    assert "http-equiv" not in path.read_text(encoding="utf-8"), "nothing more will come"
    last = json.loads((recipe.output / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert last["kind"] == "error"
    assert last["message"] in found.words
    with (recipe.output / "metrics.jsonl").open("a", encoding="utf-8") as file:  # it has gone on
        file.write('{"kind": "train", "samples_seen": 8, "step": 2, "loss": 1.0, "lr": {}}\n')
    assert "Ended by an error" not in outline(page.write_page(recipe.output)).words


def test_tables_of_words_fold_on_a_phone(run: Path) -> None:
    html = page.write_page(run).read_text(encoding="utf-8")
    assert '<section class="card plan">' in html
    assert ".plan td, td:first-child { white-space: normal }" in html


def test_a_run_without_evaluation_has_a_page(run: Path) -> None:
    found = shortened(run, lambda line: line["kind"] == "train")
    assert "Not evaluated" in found.words
    (run / "metrics.jsonl").unlink()
    (run / "environment.json").unlink()
    shutil.rmtree(run / "samples")
    assert outline(page.write_page(run)).sources == []
    with pytest.raises(DataError, match="is no run folder"):
        page.write_page(run.parent)


def test_a_loss_that_did_not_move_is_told_so(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    still = {"change_percent": 0.0, "ci95_percent": [0, 0], "ci95_new_images_percent": [0, 0]}
    still |= {"resolves_percent": None, "resolves_new_images_percent": None}
    changed = [
        json.dumps(line | (still if line["kind"] == "validation" else {}))
        for line in map(json.loads, lines)
    ]
    (run / "metrics.jsonl").write_text("\n".join(changed) + "\n", encoding="utf-8")
    assert "not one loss has changed since the start" in outline(page.write_page(run)).words


def test_sets_without_an_interval_are_drawn(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    without = []
    for line in map(json.loads, lines):
        if line["kind"] == "validation":
            line |= {
                "ci95_percent": None,
                "ci95_new_images_percent": None,
                "resolves_percent": None,
            }
        without.append(json.dumps(line) + "\n")
    (run / "metrics.jsonl").write_text("".join(without), encoding="utf-8")
    found = outline(page.write_page(run))
    assert "gives no interval" in found.words
    assert "cannot tell: no interval" in found.words


def test_a_getting_worse_after_the_best_is_said(run: Path) -> None:
    from sdtrain.probe import LossMatrix

    for file in (run / "validation").glob("*/12.npz"):
        matrix = LossMatrix.load(file)
        LossMatrix(matrix.loss * 1.5, matrix.u, matrix.density).save(file, ["x"] * 3)
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["samples_seen"] == 12 and line["kind"] == "validation":
            line["mean"] *= 1.5
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    words = outline(page.write_page(run)).words
    assert "The newest is worse than the best evaluation (8 samples)" in words


def test_tags_and_sources_are_listed(run: Path) -> None:
    group = {
        **{"name": "<car>", "images": 4, "mean": 1.0, "change_percent": -1.5, "differs": True},
        **{"ci95_percent": [-2.0, -1.0], "ci95_new_images_percent": [-3.0, 0.0]},
    }
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "validation":
            line["tags"] = [group]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    words = outline(page.write_page(run)).words
    assert "By tag and source" in words
    assert "<car>" in words


def test_pieces() -> None:
    assert typeset("a-1 -2.5 % <b>") == "a-1 \N{MINUS SIGN}2.5 % &lt;b&gt;"
    assert running_mean(np.arange(5.0)).tolist() == [0.5, 1.0, 2.0, 3.0, 3.5]
    line = {"change_percent": 0.0, "ci95_percent": None, "ci95_new_images_percent": (-2.0, 1.0)}
    low, high = limits_of([line])
    assert low < -2
    assert high > 1
    assert limits_of([{**line, "ci95_new_images_percent": None}]) == (-0.05, 0.05)
    spiked = [
        {"samples_seen": k, "loss": 100.0 if k == 0 else 1 + 0.1 * (k % 3)} for k in range(30)
    ]
    svg = base64.b64decode(loss_figure(spiked, "loss", "loss", "#000000").split(",")[1]).decode()
    assert not re.search(r"<!-- 100 -->", svg), "a first spike must not set the scale"


def test_a_run_whose_every_sample_was_masked_has_a_page(run: Path) -> None:
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line["kind"] == "train":
            line |= {"loss": None, "loss_debiased": None}
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    found = outline(page.write_page(run))
    assert "Learning rates" in found.words
    assert "Training loss" not in found.words
