"""The captioner `openai` against a real server on the loopback that fails in every way."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdprep.annotate import ColumnReport, annotate
from sdprep.caption_prompts import REFERENCE_MIX, Template, draw_prompt, draw_words
from sdprep.captioners.openai import Config, data_uri
from sdprep.cli import main
from sdprep.errors import DataError, RecipeError, UserError
from sdprep.recipe import options
from sdprep.stages import compose_stage
from sdprep.table import PhotoTable
from tests.caption_table import caption_table
from tests.chat_server import ChatServer, chat_server

KEY = "sk-very-secret-0123456789"
COLUMN = "caption_openai"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as running:
        yield running


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TEST_CHAT_KEY", KEY)
    return "TEST_CHAT_KEY"


def config(server: ChatServer, **given: Any) -> Config:
    given = {"backoff_s": 0.01, "retries": 3, "timeout_s": 60.0, "prompt": "Describe."} | given
    return Config(base_url=server.url, model="tiny", **given)


def caption(table: PhotoTable, config: Config, **how: Any) -> ColumnReport:
    [report] = annotate(table, {COLUMN: config.build()}, **how)
    return report


def rows_of(table: PhotoTable) -> list[dict[str, Any]]:
    return table.read([COLUMN])[COLUMN].to_pylist()


def test_passing_failures_are_waited_for(tmp_path: Path, server: ChatServer, key: str) -> None:
    table = caption_table(tmp_path, [None] * 5)  # 72 to 76 px wide
    server.plan = {
        72: ["busy", "503", "ok"],
        73: ["slow", "parts"],
        74: ["garbled", "cut", "ok"],
        75: ["empty", "ok"],
        76: ["loop", "ok"],
    }
    # on a busy machine other answers than the slow one may come too late as well
    patient = config(server, api_key_env=key, timeout_s=1.2, retries=9)
    report = caption(table, patient)
    assert (report.done, report.failed) == (5, 0), report.first_error
    rows = rows_of(table)
    for width, row in zip(range(72, 77), rows, strict=True):
        assert row["text"] == f"A picture of {width} pixels lies on a table."
        assert (row["prompt"], row["finish_reason"]) == ("Describe.", "stop")
        assert row["attempt"] == 0
        sent = [entry["body"]["seed"] for entry in server.of_width(width)]
        assert row["seed"] == sent[-1]
        # a lost answer is asked for again as it was, a malformed one with the next seed
        assert len(set(sent)) == (2 if width in (75, 76) else 1)
    assert len({row["seed"] for row in rows}) == 5
    assert server.most_at_once > 1
    assert {entry["path"] for entry in server.asked} == {"/v1/chat/completions"}
    assert server.asked[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    assert server.asked[0]["body"]["max_tokens"] == 256


def test_lasting_failures_stay_with_their_row(tmp_path: Path, server: ChatServer, key: str) -> None:
    table = caption_table(tmp_path, [None] * 5)
    server.plan = {72: ["500"] * 4, 73: ["refusal"] * 2, 74: ["400"], 75: ["none"] * 2}
    report = caption(table, config(server, api_key_env=key))
    assert (report.done, report.failed) == (1, 4)
    errors = [row["error"] for row in rows_of(table)]
    assert "HTTP 500" in errors[0]
    assert "4 times" in errors[0]
    assert "refusal" in errors[1]
    assert "HTTP 400" in errors[2]
    assert "***" in errors[2]  # the server repeats the key, we do not
    assert "empty" in errors[3]
    assert errors[4] is None
    assert [len(server.of_width(width)) for width in range(72, 77)] == [4, 2, 1, 2, 1]

    assert caption(table, config(server, api_key_env=key)).skipped == 5
    before = {entry["body"]["seed"] for entry in server.asked}
    again = caption(table, config(server, api_key_env=key), retry_failed=True)
    assert (again.done, again.failed, again.skipped) == (4, 0, 1)
    rows = rows_of(table)
    assert [row["attempt"] for row in rows] == [1, 1, 1, 1, 0]
    assert not {row["seed"] for row in rows[:4]} & before
    for path in table.path.parent.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def test_what_concerns_all_images_stops_the_run(
    tmp_path: Path, server: ChatServer, key: str
) -> None:
    table = caption_table(tmp_path, [None] * 3)
    for step in ("401", "404", "redirect"):
        server.plan = {width: [step] for width in (72, 73, 74)}
        with pytest.raises(UserError) as stop:
            caption(table, config(server, api_key_env=key))
        assert "refuses" in str(stop.value)
        assert KEY not in str(stop.value)
    assert server.stolen == []
    with pytest.raises(UserError, match="TEST_OTHER_KEY is not set"):
        caption(table, config(server, api_key_env="TEST_OTHER_KEY"))
    gone = config(server, retries=1).model_copy(update={"base_url": "http://127.0.0.1:9/v1"})
    with pytest.raises(UserError, match="cannot reach"):
        caption(table, gone)
    server.plan.clear()
    assert caption(table, config(server)).done == 3


def test_the_picture_is_small_upright_and_bare(
    tmp_path: Path, server: ChatServer, shared_data: Any
) -> None:
    photo = next(iter(sorted(shared_data("dreambooth").rglob("*.jpg"))))
    with Image.open(photo) as image:
        exif = image.getexif()
        exif[274] = 6
        exif[271] = "SecretCamera"
        image.save(tmp_path / "turned.jpg", exif=exif)
        size = image.size
    uri = data_uri((tmp_path / "turned.jpg").read_bytes(), 200, 90)
    import base64
    import io

    data = base64.b64decode(uri.partition(",")[2])
    sent = Image.open(io.BytesIO(data))
    assert max(sent.size) == 200
    assert (sent.width < sent.height) == (size[0] > size[1])
    assert not sent.getexif()
    assert b"SecretCamera" not in data
    assert "icc_profile" not in sent.info


def test_the_estimate_comes_first(
    tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    table = caption_table(tmp_path, [None] * 6)
    priced = {"input_price": 1.0, "output_price": 2.0, "concurrency": 1}
    with pytest.raises(UserError, match="more than max_cost"):
        caption(table, config(server, **priced, max_cost=0.001))
    assert server.asked == []
    with pytest.raises(UserError, match="needs input_price"):
        caption(table, config(server, max_cost=1.0))
    capsys.readouterr()
    # 40 + 1024² // 750 tokens read and 256 written for each of six images
    expected = 6 * (1438 * 1.0 + 256 * 2.0) / 1e6
    caption(table, config(server, **priced))
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("6 images to tiny")
    assert f"at most about {expected:,.2f}" in told
    assert "measured" in told
    assert "the other 2" in told


def test_the_command_line_runs_it_and_keeps_no_key(
    tmp_path: Path,
    server: ChatServer,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = caption_table(tmp_path, [None] * 3)
    settings = [f"base_url={server.url}", "prompt=Describe it.", f"api_key_env={key}"]
    arguments = ["caption", str(table.path), "--with", "openai", "--model", "tiny", "--json"]
    for setting in settings:
        arguments += ["--set", setting]
    monkeypatch.setattr(sys, "argv", ["sdprep", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert stop.value.code == 0, captured.err
    assert json.loads(captured.out)["done"] == 3
    assert KEY not in captured.out + captured.err
    table.refresh()
    compose_stage(table, None)
    captions = table.read(["captions"])["captions"].to_pylist()
    assert captions[0] == [{"text": "A picture of 72 pixels lies on a table.", "source": "openai"}]
    assert KEY not in json.dumps(table.notes(COLUMN))


def test_addresses_and_keys_in_the_wrong_place_are_refused() -> None:
    for url in ("https://me:pw@host/v1", "https://host/v1?key=1", "ftp://host", "host:8000"):
        with pytest.raises(RecipeError, match="base_url"):
            options(Config, [f"base_url={url}", "model=m"])
    with pytest.raises(RecipeError, match="api_key_env"):
        options(Config, [f"api_key_env={KEY}", "model=m"])


# --- prompts --------------------------------------------------------------------------------------


def test_prompts_follow_the_reference_mix() -> None:
    ids = [f"{n:032x}" for n in range(6000)]
    drawn = [draw_prompt(REFERENCE_MIX, 0, id_, {}) for id_ in ids]
    styles = Counter(at // 3 for at, _ in drawn)
    for style, weight in enumerate((6, 1, 2, 1)):
        p = weight / 10
        assert abs(styles[style] / 6000 - p) < 4 * (p * (1 - p) / 6000) ** 0.5
    thirds = Counter(at % 3 for at, _ in drawn)
    assert all(abs(thirds[part] / 6000 - 1 / 3) < 0.025 for part in range(3))
    assert not any("{" in text for _, text in drawn)
    assert drawn == [draw_prompt(REFERENCE_MIX, 0, id_, {}) for id_ in ids]
    assert drawn != [draw_prompt(REFERENCE_MIX, 1, id_, {}) for id_ in ids]


def test_word_counts_are_truncated_and_not_clamped() -> None:
    counts = [draw_words(0, f"{n:032x}") for n in range(8000)]
    assert (min(counts), max(counts)) >= (20, 100)
    assert max(counts) <= 170
    at_twenty = counts.count(20) / len(counts)
    assert at_twenty < 0.03  # a clamp would put a fifth of them there
    # mean of a normal(45, 30) truncated to [20, 171), less half a word for the integer part
    from scipy.stats import truncnorm

    mean = truncnorm((20 - 45) / 30, (171 - 45) / 30, 45, 30).mean() - 0.5
    assert abs(sum(counts) / len(counts) - mean) < 4 * 22 / len(counts) ** 0.5


def test_tags_fill_the_prompt_and_are_needed_where_it_wants_them() -> None:
    wants = [Template(prompt="Use {tags}.")]
    both = [*wants, Template(prompt="Say {length}.")]
    names = [("blue_hair", "general"), ("highres", "meta"), ("1girl", "general")]
    row = {"tags": [{"name": name, "category": category} for name, category in names]}
    assert draw_prompt(wants, 0, "a", row) == (0, "Use blue hair, 1girl.")
    beside = {"text": {"tags": [{"name": "old_car", "category": None}]}}
    assert draw_prompt(wants, 0, "a", beside)[1] == "Use old car."
    with pytest.raises(DataError, match="no"):
        draw_prompt(wants, 0, "a", {})
    assert {draw_prompt(both, 0, str(n), {})[0] for n in range(20)} == {1}
    assert {draw_prompt(both, 0, str(n), row)[0] for n in range(20)} == {0, 1}
    assert draw_prompt([Template(prompt='Give {"a": 1}')], 0, "a", {})[1] == 'Give {"a": 1}'
    for setting in ("prompt={colour} car", 'templates=[{prompt="a {colour} car"}]'):
        with pytest.raises(RecipeError, match="no placeholder"):
            options(Config, [setting, "model=m"])
