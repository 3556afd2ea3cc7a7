"""Results are written whole: an error, Ctrl-C or a kill leaves nothing half, and nothing behind."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdprep.errors import UserError
from sdtrain import cli, export, run_folder
from sdtrain.outputs import is_taken, require_folder, write_text_whole, written_whole
from sdtrain.sample_files import moments, save_pictures
from sdtrain.tiny import write_tiny
from sdtrain.trackers.jsonl import read_metrics
from sdtrain.trackers.pace import PaceTracker

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raising(error: BaseException) -> Callable[..., Any]:
    def called(*arguments: Any, **options: Any) -> Any:
        raise error

    return called


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def write(error: BaseException | None) -> None:
        with written_whole(target) as scratch:
            scratch.mkdir()
            (scratch / "first").write_text("a", encoding="utf-8")
            if error:
                raise error

    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.new").mkdir()  # of a kill
    (tmp_path / ".out.new" / "old").touch()
    assert not is_taken(target)
    write(None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["first"]
    assert is_taken(target)


def test_an_empty_folder_that_is_there_stays_and_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be where somebody stands, or another disk: nothing is renamed across its border."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f".{tmp_path.name}.new").mkdir()  # of a kill
    assert not is_taken(Path())
    before = tmp_path.stat().st_ino
    with written_whole(Path()) as scratch:
        assert scratch.is_relative_to(tmp_path)
        scratch.mkdir()
        (scratch / "first").touch()
    assert tmp_path.stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_a_tiny_model_that_is_interrupted_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sdtrain.formats.diffusers.write_text_encoder", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            write_tiny("sd15", tmp_path / "models" / "tiny")
    assert list((tmp_path / "models").iterdir()) == []
    write_tiny("sd15", tmp_path / "models" / "tiny")
    with pytest.raises(UserError, match="there already"):
        write_tiny("sd15", tmp_path / "models" / "tiny")


def test_a_text_that_does_not_fit_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text_whole(tmp_path / "a.json", "old\n")
    real = Path.write_text

    def half(path: Path, text: str, **options: Any) -> None:
        real(path, text[:2], **options)
        raise FULL

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        write_text_whole(tmp_path / "a.json", "new text\n")
    assert (tmp_path / "a.json").read_bytes() == b"old\n"
    with pytest.raises(OSError, match="No space"):
        save_pictures(tmp_path / "8", ["a dog"], [Image.new("RGB", (8, 8))], "title")
    assert moments(tmp_path) == {}, "half a list of prompts is none"


@pytest.mark.parametrize("form", ["diffusers", "single-file", "lora-kohya"])
def test_an_export_that_is_interrupted_leaves_nothing_and_can_be_repeated(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    to = tmp_path / ("out" if form == "diffusers" else "out.safetensors")
    model: Any = tiny_model("sd15")
    if form == "lora-kohya":
        opened = export.Opened(model, export._family_of(model), 0.0, adapter=Nothing())
        monkeypatch.setattr(export, "_open", lambda *_: opened)
    last = {
        "diffusers": "sdtrain.formats.diffusers.write_text_encoder",
        "single-file": "sdtrain.formats.single_file.write_hash",
        "lora-kohya": "sdtrain.export.write_hash",
    }
    with monkeypatch.context() as patch:
        patch.setattr(last[form], raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            export.export(model, form, to)
    assert list(tmp_path.iterdir()) == []
    assert export.export(model, form, to)["bytes"] > 0
    assert list(tmp_path.iterdir()) == [to]


class Nothing:
    """An adapter without any layer."""

    def kohya_tensors(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FULL, "the disk is full"),
        (RuntimeError("LanceError(IO): No space left on device (os error 28)"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/some/where"), "/some/where may not"),
        (OSError(errno.EROFS, "Read-only file system", "/some/where"), "/some/where may not"),
    ],
)
def test_what_a_disk_refuses_is_one_message_and_status_2(
    error: Exception,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "app", raising(error))
    with pytest.raises(SystemExit) as end:
        cli.run_app(cli._app)
    assert end.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        FileNotFoundError(errno.ENOENT, "gone", "x"),
        PermissionError("said by a server"),
    ):
        monkeypatch.setattr(cli, "app", raising(error))
        with pytest.raises(type(error)):
            cli.run_app(cli._app)


def test_an_output_that_may_not_be_written_is_said_before_anything_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder.RunFolder(tmp_path / "new" / "run").require_ours()
    monkeypatch.setattr("sdtrain.outputs.os.access", lambda *_: False)  # tests may run as root
    with pytest.raises(UserError, match=r"output = \S+run: nothing may be written in"):
        run_folder.RunFolder(tmp_path / "new" / "run").require_ours()
    with pytest.raises(UserError, match="--to"):
        require_folder(tmp_path)


@pytest.mark.parametrize("torn", ['{"session": "a", "sec', '{"session": "a"}\n{"ses', ""])
def test_a_line_of_the_pace_that_was_cut_off_spoils_no_other(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "pace.jsonl"
    path.write_text(torn, encoding="utf-8")
    PaceTracker(path, 8).close()
    lines = read_metrics(path)
    assert lines[-1]["samples_seen"] == lines[-2]["samples_seen"] == 8
    assert len(lines) == 2 + torn.count("\n")
    assert json.dumps(lines[-1]) + "\n" == path.read_text(encoding="utf-8").splitlines(True)[-1]
