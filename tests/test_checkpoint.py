"""Checkpoints: whole or absent, bit for bit, and never continued under other conditions."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdprep.errors import DataError, UserError
from sdtrain import checkpoint
from sdtrain.checkpoint import Snapshot
from sdtrain.conditions import refuse_changes
from sdtrain.trackers.jsonl import JsonlTracker, read_metrics


def snapshot(samples_seen: int, value: float = 1.0) -> Snapshot:
    state = {"format_version": checkpoint.FORMAT_VERSION, "samples_seen": samples_seen}
    tensors = {"unet.a": torch.full((2, 3), value), "unet.b": torch.tensor(0.1)}
    return Snapshot(state, tensors, {"unet.a/exp_avg": torch.randn(2, 3)})


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    saved = snapshot(8)
    path = checkpoint.write(tmp_path / "some where" / "Büro", saved, keep=3)
    found = checkpoint.read(path)
    assert found.state == saved.state
    for mine, theirs in ((found.trained, saved.trained), (found.optimizer, saved.optimizer)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    names = sorted(file.name for file in path.iterdir())
    assert names == ["optimizer.safetensors", "state.json", "trained.safetensors"]


def test_only_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    for samples in (8, 16, 96, 104):
        checkpoint.write(tmp_path, snapshot(samples), keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["96", "104"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["104", "96"]


def test_saving_again_replaces(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, snapshot(8, 1.0), keep=3)
    path = checkpoint.write(tmp_path, snapshot(8, 2.0), keep=3)
    assert float(checkpoint.read_trained(path)["unet.a"][0, 0]) == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["8"]


def test_what_a_kill_left_is_cleared_or_mended(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, snapshot(8), keep=3)
    checkpoint.write(tmp_path, snapshot(16), keep=3)
    (tmp_path / ".writing-24-99").mkdir()
    (tmp_path / "16").rename(tmp_path / ".replaced-16")  # killed between two renames
    checkpoint.clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["16", "8"]


def test_a_kill_while_an_old_one_is_removed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.write(tmp_path, snapshot(8), keep=1)

    def killed_at(path: Path, **options: Any) -> None:
        (path / "trained.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed_at)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.write(tmp_path, snapshot(16), keep=1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["16"]
    checkpoint.clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["16"]


def test_one_that_its_run_removed_meanwhile_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (checkpoint.write(tmp_path, snapshot(n), keep=2) for n in (8, 16))
    shutil.rmtree(second)
    with pytest.raises(DataError, match=r"16 is no checkpoint: it is not there, or not any more"):
        checkpoint.read_trained(second)
    monkeypatch.setattr(checkpoint, "why_changed", lambda file, _: shutil.rmtree(file.parent))
    with pytest.raises(
        DataError, match=r"8 is no checkpoint: it is not there, or not any more"
    ) as caught:
        checkpoint.read_trained(first)
    assert "start anew" not in caught.value.hint


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, snapshot(8), keep=3)
    trained = path / checkpoint.TRAINED
    trained.write_bytes(trained.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"trained\.safetensors is missing or damaged"):
        checkpoint.read(path)
    (path / checkpoint.STATE).write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"state\.json is damaged"):
        checkpoint.read(path)
    with pytest.raises(DataError, match="is no checkpoint"):
        checkpoint.read(tmp_path)
    (path / checkpoint.STATE).write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="format version None"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (checkpoint.TRAINED, "cut", r"it has \d+ bytes, \d+ were written"),
        (checkpoint.OPTIMIZER, "flip", "its checksum is not that of what was written"),
        (checkpoint.OPTIMIZER, "delete", "No such file"),
        (checkpoint.STATE, "cut", "is damaged"),
        (checkpoint.STATE, "delete", "has no state.json"),
    ],
)
def test_a_damaged_newest_one_names_the_next_whole_one(
    tmp_path: Path, file: str, change: str, words: str
) -> None:
    for samples in (8, 16, 24):
        checkpoint.write(tmp_path, snapshot(samples), keep=5)
    damage(tmp_path / "24" / file, change)
    with pytest.raises(DataError, match=words) as caught:
        checkpoint.read(tmp_path / "24")
    assert str(tmp_path / "24") in caught.value.message
    assert f"--resume {tmp_path / '16'}" in caught.value.hint
    damage(tmp_path / "16" / checkpoint.TRAINED, "flip")
    with pytest.raises(DataError) as caught:
        checkpoint.read(tmp_path / "24")
    assert f"--resume {tmp_path / '8'}" in caught.value.hint
    damage(tmp_path / "8" / checkpoint.TRAINED, "delete")
    with pytest.raises(DataError) as caught:
        checkpoint.read(tmp_path / "24")
    assert "no older checkpoint" in caught.value.hint


def damage(file: Path, change: str) -> None:
    data = bytearray(file.read_bytes())
    if change == "delete":
        file.unlink()
    elif change == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[-1] ^= 1  # a bit of the last tensor, which safetensors would not notice
        file.write_bytes(data)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, snapshot(8), keep=3)
    (path / checkpoint.STATE).write_text(json.dumps({"format_version": 99}), encoding="utf-8")
    with pytest.raises(DataError, match="format version 99"):
        checkpoint.read(path)


def test_a_disk_that_does_not_take_it_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write checkpoint"):
        checkpoint.write(tmp_path / "file", snapshot(8), keep=3)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_a_disk_that_fills_up_in_the_middle_of_a_tensor(tmp_path: Path) -> None:
    import resource

    checkpoint.write(tmp_path, snapshot(8), keep=3)
    big = Snapshot(snapshot(16).state, {"unet.a": torch.zeros(1 << 16)}, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))  # safetensors meets it
    try:
        with pytest.raises(UserError, match="cannot write checkpoint") as caught:
            checkpoint.write(tmp_path, big, keep=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "space" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["8"]


def test_newer_checkpoints_are_set_aside_when_going_back(tmp_path: Path) -> None:
    for samples in (8, 16, 24):
        checkpoint.write(tmp_path, snapshot(samples), keep=5)
    checkpoint.set_aside_newer(tmp_path, 8)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["8"]
    assert len(list(tmp_path.iterdir())) == 3


# --- the optimizer --------------------------------------------------------------------------------


def stepped() -> tuple[nn.Linear, torch.optim.AdamW, dict[int, str]]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    groups: list[dict[str, Any]] = [
        {"params": [layer.weight], "lr": 0.1, "name": "w"},
        {"params": [layer.bias], "lr": 0.2, "name": "b"},
    ]
    optimizer = torch.optim.AdamW(groups)
    names = {id(layer.weight): "part.weight", id(layer.bias): "part.bias"}
    return layer, optimizer, names


def take_steps(layer: nn.Linear, optimizer: torch.optim.Optimizer, count: int) -> None:
    for number in range(count):
        layer(torch.full((4, 3), 1.0 + number)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_an_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    layer, optimizer, names = stepped()
    take_steps(layer, optimizer, 3)
    tensors, plain = checkpoint.optimizer_state(optimizer, names)
    assert set(tensors) == {
        f"part.{name}/{key}"
        for name in ("weight", "bias")
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    saved = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    other, again, other_names = stepped()
    other.load_state_dict(saved)
    plain = json.loads(json.dumps(plain))
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    checkpoint.restore_optimizer(again, other_names, tensors, plain)
    take_steps(layer, optimizer, 3)
    take_steps(other, again, 3)
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)


def test_rates_come_from_the_recipe_not_from_the_checkpoint() -> None:
    layer, optimizer, names = stepped()
    take_steps(layer, optimizer, 1)
    tensors, plain = checkpoint.optimizer_state(optimizer, names)
    _, again, other_names = stepped()
    again.param_groups[0]["lr"] = 0.7
    checkpoint.restore_optimizer(again, other_names, tensors, plain)
    assert again.param_groups[0]["lr"] == 0.7


# --- changes --------------------------------------------------------------------------------------

BEFORE = {"seed": 1, "data": {"batch_size": 4, "path": "a", "workers": 0}, "train": {"rules": [1]}}


def test_differences_are_all_listed_with_both_values() -> None:
    after = {
        "seed": 2,
        "data": {"batch_size": 8, "path": "b", "workers": 2},
        "train": {"rules": []},
        "model": {"path": "elsewhere"},
    }
    with pytest.raises(UserError) as caught:
        refuse_changes(Path("c/8"), BEFORE, after, [])
    message = str(caught.value)
    assert "seed: 1 -> 2" in message
    assert "data.batch_size: 4 -> 8" in message
    assert "train.rules: [1] -> []" in message
    assert "--accept-change seed" in message
    assert "data.path" not in message  # the fingerprint speaks for the data
    assert "model.path" not in message  # and for the model
    assert "workers" not in message


def test_accepted_differences_are_taken_by_key_or_table() -> None:
    after = {**BEFORE, "seed": 2, "data": {**BEFORE["data"], "batch_size": 8}}  # type: ignore[dict-item]
    assert refuse_changes(Path("c"), BEFORE, after, ["seed", "data"]) == [
        "data.batch_size: 4 -> 8",
        "seed: 1 -> 2",
    ]
    with pytest.raises(UserError, match=r"data\.batch_size"):
        refuse_changes(Path("c"), BEFORE, after, ["seed", "data.batch"])
    assert refuse_changes(Path("c"), BEFORE, BEFORE, []) == []


# --- metrics --------------------------------------------------------------------------------------


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path, None)
    for seen in (4, 8, 8, 12):
        tracker.log({"kind": "train", "samples_seen": seen, "loss": 0.1, "bad": float("nan")})
    tracker.close()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "samp')  # killed in the middle of a line
    tracker = JsonlTracker(path, 8)
    tracker.log({"kind": "train", "samples_seen": 12, "loss": 0.2})
    tracker.close()
    lines = read_metrics(path)
    assert [line["samples_seen"] for line in lines] == [4, 8, 8, 12]
    assert lines[-1]["loss"] == 0.2
    assert lines[0]["bad"] is None
    JsonlTracker(path, None).close()
    assert read_metrics(path) == []


def test_metrics_may_hold_every_character_and_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path, None)
    prompt = "a dog\u2028a cat\u0085a bird"  # line ends to str.splitlines, not to JSON
    tracker.log({"kind": "variety", "samples_seen": 4, "prompt": prompt})
    tracker.close()
    assert [line["prompt"] for line in read_metrics(path)] == [prompt]
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "tr\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl is damaged in line 2"):
        read_metrics(path)
