"""Grids: every model's own pictures, networks loaded once, a page that is whole in one file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sdprep.errors import DataError, UserError
from sdtrain import in_turn, variety
from sdtrain.cli import app
from sdtrain.contact_sheet import grid as picture_grid
from sdtrain.follow import Follower, follow
from sdtrain.grid import Axes, Row, draw_grid, write_grid
from sdtrain.in_turn import InTurn, candidates
from sdtrain.run_folder import RunFolder
from sdtrain.sampling import Style, load_checkpoint, pictures_of
from sdtrain.trackers.jsonl import read_metrics
from tests.tiny import load_tiny

AXES = Axes(["red car", ""], seeds=(1, 2), num_inference_steps=2)


def values(picture: Image.Image | Path) -> np.ndarray:
    opened = Image.open(picture) if isinstance(picture, Path) else picture
    return np.asarray(opened.convert("RGB")).astype(int)


def newest(run: Path) -> Any:
    return load_checkpoint(run / "checkpoints" / "12")


class Page(HTMLParser):
    """What a page fetches, and its words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.labels: list[str] = []
        self.words = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            assert not name.startswith("on"), "no code in attributes"
            if name in ("src", "href"):
                self.sources.append(value or "")
            if name == "aria-label" and tag == "button":
                self.labels.append(value or "")

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_grid_has_a_row_a_model_and_a_column_a_seed(evaluated_run: Path, tmp_path: Path) -> None:
    paths = [Path("base"), evaluated_run / "checkpoints" / "8", evaluated_run]
    found = draw_grid(paths, AXES, tmp_path / "new" / "grid.png")
    assert found["rows"] == ["base", "run @ 8", "run @ 12"]
    assert found["columns"] == [
        *("red car, seed 1", "red car, seed 2"),
        *("(empty prompt), seed 1", "(empty prompt), seed 2"),
    ]
    assert Image.open(found["path"]).size[0] > 4 * 192
    assert not list((tmp_path / "new").glob(".*")), "nothing half written is left"
    rows = found["variety"]["rows"]
    assert [row["row"] for row in rows] == found["rows"]
    assert [group["relative"] for group in rows[0]["groups"]] == [1.0, 1.0]
    last = rows[2]["groups"][0]
    assert last["relative"] == last["spread"] / rows[0]["groups"][0]["spread"] != 1.0
    page = Page(tmp_path / "new" / "grid.html")
    assert len(page.sources) == 12
    assert all(source.startswith("data:image/") for source in page.sources)
    assert "run @ 12: (empty prompt), seed 2" in page.labels
    assert f"{rows[2]['mean_relative']:.3f}" in page.words


def test_models_in_turn_draw_what_each_draws_alone(
    evaluated_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = in_turn.open_model

    def counted(*args: Any) -> Any:
        opened.append(1)
        return real(*args)

    monkeypatch.setattr(in_turn, "open_model", counted)
    paths = [evaluated_run, Path("base"), evaluated_run / "checkpoints" / "8"]
    models, style = InTurn(), Style(7, 32, 2, 2.0)
    in_turns = [pictures_of(models.family(each), ["a"], style)[0] for each in candidates(paths)]
    assert len(opened) == 1, "networks are loaded once"
    recipe, _, _ = newest(evaluated_run)
    base = load_tiny(Path(recipe.model.path))
    alone = [
        pictures_of(load_checkpoint(evaluated_run / "checkpoints" / "12")[1], ["a"], style)[0],
        pictures_of(base, ["a"], style)[0],
        pictures_of(load_checkpoint(paths[2])[1], ["a"], style)[0],
    ]
    for ours, theirs in zip(in_turns, alone, strict=True):
        assert np.array_equal(values(ours), values(theirs))
    assert not np.array_equal(values(alone[0]), values(alone[1]))


def test_a_diffusers_folder_is_a_row_and_another_base_model_is_refused(
    evaluated_run: Path, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    axes = Axes(["red car"], num_inference_steps=2)
    paths = [evaluated_run / "model", evaluated_run]
    found = draw_grid(paths, axes, tmp_path / "a.png", has_page=False)
    assert found["rows"] == ["run/model", "run @ 12"]
    assert found["page"] is None
    assert found["variety"] is None
    copy = tmp_path / "run"
    shutil.copytree(evaluated_run / "checkpoints" / "12", copy / "checkpoints" / "12")
    state = json.loads((copy / "checkpoints" / "12" / "state.json").read_text(encoding="utf-8"))
    state["conditions"]["model_fingerprint"] = "another"
    (copy / "checkpoints" / "12" / "state.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(DataError, match="was trained from another model"):
        draw_grid([copy], axes, tmp_path / "b.png")
    with pytest.raises(UserError, match="no checkpoint of a run among them"):
        draw_grid([Path("base")], axes, tmp_path / "b.png")
    with pytest.raises(UserError, match="run @ 12 is given twice"):
        draw_grid([evaluated_run, evaluated_run], axes, tmp_path / "b.png")


def test_every_axis_is_labelled_and_mistakes_are_told_before_drawing(
    evaluated_run: Path, tmp_path: Path
) -> None:
    recipe, _, _ = newest(evaluated_run)
    axes = Axes(["a"], guidance_scales=(1.0, 7.5), samplers=("ddim", "euler")).filled(recipe)
    assert axes.columns == [
        *("a, ddim, CFG 1", "a, ddim, CFG 7.5"),
        *("a, euler, CFG 1", "a, euler, CFG 7.5"),
    ]
    assert axes.fixed == "2 steps, seed 7"
    for wrong, match in (
        (Axes(["a"], seeds=(1, 1)), "seeds: 1 is given twice"),
        (Axes(["a"], samplers=("eular",)), "no sampler 'eular'"),
    ):
        with pytest.raises(UserError, match=match):
            wrong.filled(recipe)
    with pytest.raises(UserError, match="no picture's name"):
        draw_grid([evaluated_run], AXES, tmp_path / "grid")


def test_guidance_and_sampler_reach_the_pictures(evaluated_run: Path, tmp_path: Path) -> None:
    axes = Axes(["a"], guidance_scales=(1.0, 9.0), samplers=("ddim", "euler_a"))
    (candidate,) = candidates([evaluated_run])
    from sdtrain.grid import draw_row

    filled = replace(axes.filled(candidate.recipe), num_inference_steps=3)
    family = InTurn().family(candidate)
    pictures, spreads = draw_row(family, candidate, filled, variety.latent_spread)
    assert spreads == [None] * 4
    assert len({picture.tobytes() for picture in pictures}) == 4
    style = replace(Style.of(candidate.recipe, family), num_inference_steps=3)
    style = replace(style, guidance_scale=9.0, sampler="ddim")
    assert pictures_of(family, ["a"], style)[0].tobytes() == pictures[1].tobytes()


def test_texts_are_escaped_and_large_pictures_keep_their_size(tmp_path: Path) -> None:
    axes = Axes(["<script>alert(1)</script>"], (1,), (5.0,), (None,), 2)
    pictures = [Image.new("RGB", (300, 200), "red"), Image.new("RGB", (64, 64), "blue")]
    rows = [Row(f'"><b>{k}', [picture], [None]) for k, picture in enumerate(pictures)]
    write_grid(rows, axes, tmp_path / "a b.png", variety.LATENTS, refresh_seconds=60)
    page = Page(tmp_path / "a b.html")
    assert "<script>alert(1)</script>" in page.words
    assert [source.split(";")[0] for source in page.sources] == [
        *("data:image/jpeg", "data:image/png"),
    ]
    assert 'data-refresh="60"' in (tmp_path / "a b.html").read_text(encoding="utf-8")


def test_numbers_below_the_pictures_make_room_for_themselves() -> None:
    rows = [("a", [Image.new("RGB", (64, 64))])]
    plain = picture_grid(rows, ["x"], "model")
    with_numbers = picture_grid(rows, ["x"], "model", ("variety", [("a", {0: "1.00"})]))
    assert with_numbers.height > plain.height
    below = values(with_numbers)[plain.height :]
    assert (below < 128).any(), "something is written there"


# --- following a run -----------------------------------------------------------------------------


@pytest.fixture
def run(evaluated_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    copy = tmp_path / "a run"
    shutil.copytree(evaluated_run, copy, ignore=shutil.ignore_patterns("model", "tensorboard"))
    return copy


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(folder.rglob("*"))
    }


SHORT = Axes(["red car"], seeds=(1, 2), num_inference_steps=2)


def test_following_draws_each_checkpoint_once_and_only_reads_the_run(
    run: Path, tmp_path: Path
) -> None:
    shutil.move(run / "checkpoints" / "12", tmp_path / "later")
    to = tmp_path / "look here"
    follower = Follower(run, SHORT, to)
    assert not follower.is_finished
    before = files_of(run)
    assert follower.look(lambda: False) == ["base", "8"]
    assert files_of(run) == before
    first = files_of(to / "rows")
    shutil.move(tmp_path / "later", run / "checkpoints" / "12")
    fresh = Follower(run, SHORT, to)  # such as after a restart
    assert fresh.is_finished
    found = follow(fresh, 0.1)
    assert found["rows"] == ["base", "a run @ 8", "a run @ 12"]
    assert found["run_is_finished"]
    again = files_of(to / "rows")
    assert {key: again[key] for key in first if key != "."} == first, "drawn rows stay"
    assert len(Page(to / "grid.html").sources) == 6
    assert "data-refresh" not in (to / "grid.html").read_text(encoding="utf-8").split("<script>")[0]
    alone = pictures_of(
        newest(run)[1], ["red car"], replace(style_of(run), seed=1, num_inference_steps=2)
    )
    assert np.array_equal(values(alone[0]), values(to / "rows" / "12" / "000.png"))


def style_of(run: Path) -> Style:
    recipe, family, _ = newest(run)
    return Style.of(recipe, family)


def test_a_checkpoint_that_goes_while_it_is_read_is_left_out_with_a_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    follower = Follower(run, SHORT, tmp_path / "out")
    real = in_turn.checkpoint.read_trained

    def gone(path: Path) -> Any:
        if path.name == "8":
            shutil.rmtree(path)  # keep-last-k of the run, just now
        return real(path)

    monkeypatch.setattr(in_turn.checkpoint, "read_trained", gone)
    assert follower.look(lambda: False) == ["base", "12"]
    assert "checkpoint 8 is left out (it was removed meanwhile)" in capsys.readouterr().err
    assert [row.label for row in follower.rows()] == ["base", "a run @ 12"]


def test_a_damaged_checkpoint_is_told_once_and_a_fresh_one_of_that_clock_is_drawn(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "checkpoints" / "8" / "trained.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    follower = Follower(run, SHORT, tmp_path / "out")
    assert follower.look(lambda: False) == ["base", "12"]
    assert follower.look(lambda: False) == []
    assert capsys.readouterr().err.count("checkpoint 8 is left out") == 1
    file.write_bytes(whole)
    state = run / "checkpoints" / "8" / "state.json"
    state.write_text(state.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert follower.look(lambda: False) == ["8"]


def test_a_checkpoint_that_is_half_removed_is_left_out_with_a_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints" / "8" / "state.json").unlink()
    follower = Follower(run, SHORT, tmp_path / "out")
    assert follower.look(lambda: False) == ["base", "12"]
    assert "checkpoint 8 is left out (it was removed meanwhile)" in capsys.readouterr().err


def test_following_goes_on_after_a_kill_between_a_row_and_its_place(
    run: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "out" / "rows"
    assert Follower(run, SHORT, tmp_path / "out").look(lambda: False) == ["base", "8", "12"]
    (rows / "8").rename(rows / ".8.new")
    shutil.rmtree(run / "checkpoints" / "8")  # which nobody can draw again
    again = Follower(run, SHORT, tmp_path / "out")
    assert again.look(lambda: False) == []
    assert [row.label for row in again.rows()] == ["base", "a run @ 12"]


def test_following_ends_when_the_run_died_of_an_error_and_not_when_it_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints" / "12")
    kept = [line for line in read_metrics(run / "metrics.jsonl") if line["samples_seen"] <= 8]
    error = {"kind": "error", "samples_seen": 8, "message": "the loss is no number"}
    text = "".join(json.dumps(line) + "\n" for line in [*kept, error])
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    follower = Follower(run, SHORT, tmp_path / "out")
    with RunFolder(run).writing():
        assert follower.error is None  # it is going on, and has not come to its first step
    monkeypatch.setattr("sdtrain.follow.time.sleep", lambda _: pytest.fail("it waits for more"))
    found = follow(follower, 1000)
    assert found["rows"] == ["base", "a run @ 8"]
    assert (found["run_is_finished"], found["run_error"]) == (False, "the loss is no number")
    assert "ended by an error: the loss is no number" in " ".join(capsys.readouterr().err.split())


def test_other_columns_are_drawn_anew_and_a_stop_ends_after_a_row(
    run: Path, tmp_path: Path
) -> None:
    to = tmp_path / "out"
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 1

    assert Follower(run, SHORT, to).look(stop) == ["base"]
    other = Follower(run, replace(SHORT, prompts=["blue car"]), to)
    assert other.rows() == []
    assert other.look(lambda: False) == ["base", "8", "12"]


def test_a_long_prompt_leaves_room_for_the_pictures(evaluated_run: Path, tmp_path: Path) -> None:
    prompt = "a dog, " * 200
    axes = Axes([prompt], (1, 2), (3.0,), (), 1)
    draw_grid([evaluated_run], axes, tmp_path / "grid.png")
    html = (tmp_path / "grid.html").read_text(encoding="utf-8")
    heads = re.findall(r"<th[^>]*>([^<]*)</th>", html)
    assert max(map(len, heads)) < 140
    assert [head for head in heads if head.startswith("a dog, ") and head.endswith("seed 2")]
    assert f'title="{prompt.strip()}' in html or f'title="{prompt}' in html  # the whole is there


def test_another_run_followed_into_the_same_folder_is_not_mixed_in(
    run: Path, tmp_path: Path
) -> None:
    other, to = tmp_path / "other run", tmp_path / "out"
    shutil.copytree(run, other)
    shutil.rmtree(other / "checkpoints" / "8")
    assert Follower(run, SHORT, to).look(lambda: False) == ["base", "8", "12"]
    second = Follower(other, SHORT, to)
    assert second.look(lambda: False) == ["base", "12"]  # its base may be another model
    assert [row.label for row in second.rows()] == ["base", "other run @ 12"]


def test_what_cannot_be_followed_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lies inside the run"):
        Follower(run, SHORT, run / "samples" / "mine")
    with pytest.raises(DataError, match="is no run folder"):
        Follower(tmp_path / "nothing", SHORT, tmp_path / "out")


def test_the_command_takes_every_axis_and_says_what_does_not_go_together(
    evaluated_run: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red car\n\n", encoding="utf-8")

    def call(*more: str | Path) -> Any:
        words = ["grid", "--prompts", prompts, "--to", tmp_path / "x.png", "--steps", "1", *more]
        return CliRunner().invoke(app, [str(word) for word in words])

    found = call(
        *("base", evaluated_run, "--seed", "1", "--guidance", "1", "--guidance", "3"),
        *("--sampler", "euler", "--no-page", "--device", "cpu", "--json"),
    )
    assert found.exit_code == 0, found.exception
    said = json.loads(found.stdout)
    assert said["rows"] == ["base", "run @ 12"]
    assert said["columns"][:2] == ["red car, CFG 1", "red car, CFG 3"]
    assert not (tmp_path / "x.html").exists()
    for wrong, words in (
        ((), "either CHECKPOINT… or --follow"),
        ((evaluated_run, "--follow", evaluated_run), "and not both"),
        ((evaluated_run, "--every", "3"), "--every is for --follow"),
        (("--follow", evaluated_run, "--no-page"), "always writes its page"),
        ((evaluated_run, "--sampler", "x"), "no sampler 'x'"),
    ):
        assert words in str(call(*wrong).exception.message)
