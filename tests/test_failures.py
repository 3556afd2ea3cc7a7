"""What ends a run from outside: memory and disk, each with a message and a checkpoint to go on."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdprep.errors import UserError
from sdtrain import checkpoint, trainer, update
from sdtrain.course import Course, look_back
from sdtrain.recipe import load_train_recipe
from sdtrain.run_folder import RunFolder
from sdtrain.trackers.jsonl import JsonlTracker
from tests import mini_family

torch.set_num_threads(1)

MINI = (
    *("data.resolution_px=32", "train.samples=16", "checkpoint.every_samples=4"),
    *("schedule.type=constant", "schedule.warmup_samples=0"),
)


@pytest.fixture
def train(
    train_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., trainer.Outcome]:
    """Trains the mini family for 16 samples, with a checkpoint at each step."""
    monkeypatch.setattr("sdtrain.setup.open_model", mini_family.open_mini)
    monkeypatch.setattr("sdtrain.hand_over.open_model", mini_family.open_mini)
    path = train_recipe()
    return lambda *more: trainer.train(load_train_recipe(path, [*MINI, *more]))


def after(calls: int, error: BaseException, original: Callable[..., Any]) -> Callable[..., Any]:
    """The original for so many calls, then the error."""
    left = [calls]

    def called(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return original(*arguments, **options)

    return called


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore\nlines"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: tried 9 bytes"),
        MemoryError(),
    ],
    ids=["torch", "cpu", "python"],
)
def test_out_of_memory_says_what_to_do_and_where_it_goes_on(
    train: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        failing = after(0, error, original := update.denoising_loss)
        begun = tmp_path / "run" / "checkpoints" / "8"
        patch.setattr(
            update,
            "denoising_loss",
            lambda *each: failing(*each) if begun.is_dir() else original(*each),
        )
        with pytest.raises(UserError) as caught:
            train()
    assert "cpu is out of memory after 8 samples" in caught.value.message
    assert "\n" not in caught.value.message
    assert "data.micro_batch_size = 1 (it is 2; the result stays the same)" in caught.value.hint
    assert "model.gradient_checkpointing = true" in caught.value.hint
    newest = tmp_path / "run" / "checkpoints" / "8"
    assert f"The newest checkpoint is {newest}" in caught.value.hint
    checkpoint.read(newest)
    assert train("data.micro_batch_size=1").is_finished


def test_out_of_memory_before_the_first_checkpoint(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = after(0, torch.OutOfMemoryError("out of memory"), update.denoising_loss)
    monkeypatch.setattr(update, "denoising_loss", failing)
    with pytest.raises(UserError, match="There is no checkpoint yet") as caught:
        train("data.micro_batch_size=1", "adapter.type=full", "model.gradient_checkpointing=true")
    assert "micro_batch_size" not in caught.value.hint  # it cannot be smaller
    assert "gradient_checkpointing" not in caught.value.hint


def test_an_error_of_another_kind_keeps_its_traceback(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = after(1, RuntimeError("shapes differ"), update.denoising_loss)
    monkeypatch.setattr(update, "denoising_loss", failing)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train()


def test_a_loss_that_is_no_number_names_the_checkpoint(
    train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = update.denoising_loss

    def broken(family: Any, batch: Any, loss: Any) -> torch.Tensor:
        losses = original(family, batch, loss)
        has_begun = (tmp_path / "run" / "checkpoints" / "8").is_dir()
        return losses * float("nan") if has_begun else losses

    with monkeypatch.context() as patch:
        patch.setattr(update, "denoising_loss", broken)
        with pytest.raises(update.DivergedError) as caught:
            train()
    assert "after 8 samples" in caught.value.message
    assert str(tmp_path / "run" / "checkpoints" / "8") in caught.value.hint
    assert "the same command goes on" not in caught.value.hint  # it would end there again
    assert "--accept-change" in caught.value.hint
    assert train().is_finished


def test_weights_that_are_no_numbers_are_not_saved(
    train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The last update before a checkpoint spoils them, which no loss has seen yet."""
    original = update._update

    def spoil(run: Any, ids: Any) -> float:
        norm = original(run, ids)
        if run.samples_seen == 8:
            next(iter(run.trained.values())).data.view(-1)[0] = float("inf")
        return norm

    with monkeypatch.context() as patch:
        patch.setattr(update, "_update", spoil)
        with pytest.raises(update.DivergedError, match="after 12 samples 1 of") as caught:
            train()
    kept = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in kept] == ["4", "8"]
    assert str(kept[-1]) in caught.value.hint
    assert train().is_finished


@pytest.mark.parametrize("where", ["metrics", "checkpoint"])
def test_a_full_disk_leaves_the_last_checkpoint(
    train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        if where == "metrics":
            patch.setattr(JsonlTracker, "log", after(2, full, JsonlTracker.log))
        else:
            patch.setattr(checkpoint, "_sync_folder", after(4, full, checkpoint._sync_folder))
        with pytest.raises(UserError, match="No space left on device") as caught:
            train()
    assert "space" in caught.value.hint
    kept = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in kept] == ["4", "8"]
    checkpoint.read(kept[-1])
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing-*"))
    assert train().is_finished


def test_a_full_disk_that_fails_again_at_closing(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that could not be flushed tries once more when it is closed."""
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(JsonlTracker, "log", after(2, full, JsonlTracker.log))
    monkeypatch.setattr(JsonlTracker, "close", after(0, full, JsonlTracker.close))
    with pytest.raises(UserError, match="is full after 12 samples"):
        train()


def test_a_full_disk_at_the_very_end(
    train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As safetensors says it: an error of its own, with the system's number in the text."""
    from safetensors import SafetensorError

    from sdtrain.adapters.full import Full

    def half(adapter: Any, family: Any, path: Path) -> None:
        path.mkdir()
        (path / "part").write_bytes(b"x")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(Full, "save", half)
        with pytest.raises(UserError, match="is full after 16 samples") as caught:
            train()
    assert str(tmp_path / "run" / "checkpoints" / "16") in caught.value.hint
    assert not list((tmp_path / "run").glob("*model*"))
    assert train().model == str(tmp_path / "run" / "model")


def test_a_kill_after_the_last_checkpoint_changes_neither_model_nor_page(
    train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The evaluations end the run at its very last step, and the best checkpoint is an earlier."""

    def stopped(*arguments: Any) -> Course:
        found = look_back(*arguments)
        return replace(found, stop="overfitting") if 16 in arguments[0][0].history else found

    def best_is_8(checkpoints: Path, verdict: Any) -> None:
        (checkpoints / "best").write_text('{"checkpoint": "8"}', encoding="utf-8")

    monkeypatch.setattr(trainer, "look_back", stopped)
    monkeypatch.setattr(trainer, "point_to_best", best_is_8)
    judged = ("validation.images=3", "validation.every_samples=8")
    whole, killed = tmp_path / "whole", tmp_path / "run"
    train("output=" + whole.as_posix(), *judged)
    with monkeypatch.context() as patch:
        last = after(3, KeyboardInterrupt(), trainer.page.refresh)
        patch.setattr(trainer.page, "refresh", last)
        with pytest.raises(KeyboardInterrupt):
            train(*judged)
    assert (killed / "checkpoints" / "16").is_dir()
    assert 'http-equiv="refresh"' in (killed / "report.html").read_text(encoding="utf-8")
    train(*judged)
    assert 'http-equiv="refresh"' not in (killed / "report.html").read_text(encoding="utf-8")
    ours, its = whole / "model", killed / "model"
    names = [str(each.relative_to(ours)) for each in ours.rglob("*.safetensors")]
    assert names
    assert all((ours / name).read_bytes() == (its / name).read_bytes() for name in names)


def test_a_second_writer_is_told_which_folder_and_who(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "two.b")
    with (
        folder.writing(),
        pytest.raises(UserError, match=r"run folder \S+two\.b is being written by process \d+"),
        RunFolder(folder.path).writing(),
    ):
        pass


def test_a_second_writer_by_another_name_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.writing():
        (tmp_path / "newest").symlink_to(folder.path, target_is_directory=True)
        other = RunFolder(tmp_path / "newest")
        with pytest.raises(UserError, match="is being written by"), other.writing():
            pass
        assert other.is_claimed
    assert not folder.is_claimed


def test_an_interrupted_step_is_replayed_whole(
    train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Asked twice to stop, in the middle of a step: what it had gathered is thrown away."""
    train("output=" + (tmp_path / "whole").as_posix())
    with monkeypatch.context() as patch:
        failing = after(5, KeyboardInterrupt(), update.denoising_loss)
        patch.setattr(update, "denoising_loss", failing)
        with pytest.raises(KeyboardInterrupt):
            train()
    assert train().is_finished
    ends = [
        checkpoint.read_trained(tmp_path / name / "checkpoints" / "16") for name in ("whole", "run")
    ]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
