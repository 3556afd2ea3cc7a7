"""The command line keeps its contract: names, JSON keys, exit statuses, one clear message."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdprep.cli import main

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "tools" / "demo_photos" / "photos"

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sdprep", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def report(call: Call, *arguments: object) -> dict[str, Any]:
    status, out, err = call(*arguments, "--json")
    assert status == 0, err
    return json.loads(out)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve different pictures with text, one copy and one broken file."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    known = [path for path in PHOTOS.glob("*/*.jpg") if path.parent.name != "found_again"]
    sources = sorted(known)[::6][:12]
    for number, source in enumerate(sources):
        with Image.open(source) as image:
            image.resize((160 + number, 128)).save(folder / f"{number:02d}.jpg", quality=90)
        (folder / f"{number:02d}.txt").write_text("photo, sea, red theme", encoding="utf-8")
        (folder / f"{number:02d}.caption").write_text(f"picture {number}", encoding="utf-8")
    (folder / "copy.jpg").write_bytes((folder / "03.jpg").read_bytes())
    (folder / "broken.jpg").write_bytes((folder / "04.jpg").read_bytes()[:900])
    return folder


def test_every_step_by_hand_reports_the_promised_keys(
    call: Call, photos: Path, tmp_path: Path
) -> None:
    table = tmp_path / "photos.lance"
    found = report(call, "ingest", photos, table)
    assert (found["found"], found["added"], found["already_present"]) == (14, 12, 1)
    assert found["rejects"] == [{"source_key": "broken.jpg", "reason": "truncated"}]
    assert found["ignored"] == 0
    again = report(call, "ingest", photos, table)
    assert (again["added"], again["rejected"]) == (0, 1)

    scored = report(call, "score", table, "--with", "technical")
    assert scored["column"] == "score_technical"
    assert (scored["done"], scored["skipped"], scored["failed"]) == (12, 0, 0)
    assert scored["images_per_second"] > 0

    aliases = ROOT / "recipes" / "tiny" / "aliases.csv"
    tagged = report(
        call, "tag", table, "--with", "sidecar", "--with", "attributes", "--aliases", aliases
    )
    assert {"added", "aliased", "implied", "blacklisted"} <= tagged["tags"].keys()
    assert tagged["tags"]["aliased"] == 12  # sea is another name of ocean
    assert [a["column"] for a in tagged["annotators"]] == ["tags_sidecar", "tags_attributes"]
    counted = report(call, "tags", "stats", table)["tags"]
    assert {"name": "ocean", "count": 12} in counted

    grouped = report(call, "dedup", table)
    assert {"exact_groups", "near_groups", "images_in_groups"} <= grouped.keys()
    selected = report(call, "select", table, "--where", "width > 161", "--reason", "narrow")
    assert (selected["kept"], selected["rejected"]) == (10, 2)
    divided = report(call, "split", table, "--validation-count", 2)
    assert (divided["train"], divided["validation"]) == (8, 2)
    assert divided["groups"] == 10
    assert divided["certificate"]["digests"]
    assert report(call, "split", table, "--verify")["ok"] is True

    shown = report(call, "prompts", table, "--count", 2)["prompts"]
    assert [sorted({"id", "text", "tags", "tokens", "chunks"} - p.keys()) for p in shown] == [
        []
    ] * 2
    histograms = report(call, "prompts", table, "--stats", "--to", tmp_path / "stats.png")
    assert histograms["images"] == 10
    assert Image.open(tmp_path / "stats.png").width > 500

    published = report(call, "publish", table, "--to", tmp_path / "prepared")
    assert (published["train"], published["validation"]) == (8, 2)
    assert Path(published["path"]) == tmp_path / "prepared"
    assert published["repo"] is None
    assert report(call, "split", tmp_path / "prepared", "--verify")["ok"] is True

    state = report(call, "status", table)
    assert state["images"] == 13
    assert state["kept"] == 10
    assert state["rejected"] == {"ingest": {"truncated": 1}, "select": {"narrow": 2}}
    names = [entry["name"] for entry in report(call, "history", table)["stages"]]
    assert names == ["ingest", "score", "tags", "tags", "dedup", "select", "split"]

    one = report(call, "show", table, "05.jpg", "--to", tmp_path / "one.png")
    assert one["caption"] == "picture 5"
    assert Image.open(tmp_path / "one.png").size == (165, 128)
    report(call, "show", table, "--to", tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width > 1000

    assert report(call, "undo", table, "reject_select")["stage"] == "select"
    assert report(call, "status", table)["kept"] == 12


def test_what_the_user_can_fix_is_one_message_and_status_2(
    call: Call, photos: Path, tmp_path: Path
) -> None:
    table = tmp_path / "photos.lance"
    report(call, "ingest", photos, table)
    cases = {
        ("score", tmp_path / "none.lance", "--with", "technical"): "there is no table",
        ("score", table, "--with", "technicl"): "did you mean technical",
        ("score", table, "--with", "technical", "--set", "gamma=2"): "unknown key",
        ("score", table, "--with", "technical", "--model", "x"): "model",
        ("ingest", tmp_path / "nowhere", table): "does not exist",
        ("select", table, "--where", "widht > 3"): "width",
        ("select", table, "--where", "width >"): "width >",
        ("split", table, "--validation", "1.5"): "must be < 1",
        ("split", table, "--validation", "0.1", "--validation-count", "3"): "exclude each other",
        ("split", table, "--verify"): "",
        ("dedup", table, "--keep", "worst"): "best",
        ("undo", table, "splt"): "no stage changed splt",
        ("show", table, "nothing.jpg"): "has no image",
        ("publish", table, "--to", photos): "",
        ("run", tmp_path / "none.toml"): "there is no recipe",
        ("tags", "lint", tmp_path / "none.csv"): "none.csv",
    }
    for arguments, expected in cases.items():
        status, out, err = call(*arguments)
        assert status == 2, (arguments, status, err)
        assert "Traceback" not in err
        assert expected in err, (arguments, err)
        assert out == ""


def test_strict_turns_failures_into_status_3(call: Call, photos: Path, tmp_path: Path) -> None:
    status, out, _ = call("ingest", photos, tmp_path / "t.lance", "--strict", "--json")
    assert status == 3
    assert json.loads(out)["rejected"] == 1


def test_a_source_that_is_mostly_broken_stops_and_still_reports(call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(b"")
    status, out, err = call("ingest", folder, tmp_path / "t.lance", "--json")
    assert status == 2
    assert json.loads(out)["rejected"] == 4
    assert "4 empty_file" in err
    status, _, _ = call("ingest", folder, tmp_path / "t.lance", "--max-rejected", "1.0")
    assert status == 0


def test_plugins_are_listed_with_their_options(call: Call) -> None:
    found = report(call, "plugins")
    assert {"source", "scorer", "tagger", "detector", "captioner"} <= found.keys()
    folder = next(entry for entry in found["source"] if entry["name"] == "folder")
    path = next(option for option in folder["options"] if option["key"] == "path")
    assert path["required"]
    assert path["description"]


def test_lint_counts_the_published_numbers(call: Call, shared_data: Callable[[str], Path]) -> None:
    found = report(call, "tags", "lint", shared_data("tags") / "danbooru.csv")
    assert found["rows"] == 140_782
    kinds = {problem["kind"] for problem in found["problems"]}
    assert {"shortcut", "conflict", "chain"} <= kinds
