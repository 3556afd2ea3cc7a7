"""Taggers with real models, through the command line, offline, from folders with spaces."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdprep.cli import main
from sdprep.table import PhotoTable
from tests import test_tagger_joytag as joytag
from tests import test_tagger_wd as wd

PHOTOS = Path(__file__).resolve().parent.parent / "tools" / "demo_photos" / "photos" / "cat"


def wd_folder(path: Path) -> Path:
    path.mkdir()
    wd.write_tags(path)
    wd.write_onnx(path)
    return path


MODELS: dict[str, Callable[[Path], Path]] = {"joytag": joytag.folder_of, "wd": wd_folder}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_in_its_published_layout_tags_photos(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos, table = tmp_path / "my photos", tmp_path / "photos.lance"
    shutil.copytree(PHOTOS, photos)
    model = MODELS[name](tmp_path / "a model")

    def call(*arguments: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["sdprep", *map(str, arguments), "--json"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        return json.loads(capsys.readouterr().out)

    found = call("ingest", photos, table)
    tagged = call("tag", table, "--with", name, "--model", model, "--device", "cpu")
    assert (tagged["done"], tagged["failed"]) == (found["added"], 0)
    again = call("tag", table, "--with", name, "--model", model, "--device", "cpu")
    assert (again["done"], again["skipped"]) == (0, found["added"])
    stored = PhotoTable.open(table).read([f"tags_{name}.tags"])[f"tags_{name}.tags"].to_pylist()
    assert all(tags for tags in stored), "every photo has tags above the storing threshold"
