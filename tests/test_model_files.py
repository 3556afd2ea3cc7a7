"""Where models come from, what tells them apart, and where they run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdprep.devices import FittingBatches, batch_on, is_out_of_memory, torch_device
from sdprep.errors import DataError, UserError
from sdprep.model_files import ModelFolder, fingerprint, model_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = ("config.json", "model*.safetensors")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """A cache as huggingface_hub lays it out, holding one model with the branch main and a tag."""
    model = tmp_path / "hub" / "models--someone--tagger"
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}", encoding="utf-8")
    (model / "refs").mkdir()
    for name in ("main", "v1"):
        (model / "refs" / name).write_text(COMMIT, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_a_model_of_the_hub_is_known_by_its_commit(hub_cache, revision):
    folder = model_folder("someone/tagger", revision, FILES)
    assert folder.path == hub_cache
    assert folder.identity == f"someone/tagger@{COMMIT}"
    assert folder.read_json("config.json") == {}


def test_a_model_that_is_nowhere_says_where_it_was_looked_for(hub_cache):
    with pytest.raises(UserError, match=r"not in the Hub's cache .*, and HF_HUB_OFFLINE is") as no:
        model_folder("someone/other", None, FILES)
    assert str(hub_cache.parents[2]) in no.value.message
    assert "hf download someone/other" in no.value.hint
    with pytest.raises(UserError, match=r"someone/tagger \(revision v2\)"):
        model_folder("someone/tagger", "v2", FILES)
    for name in ("no such folder", "../nowhere/at/all", "/nowhere", "C:\\models\\x", "joytag"):
        with pytest.raises(UserError, match="there is no folder .* no id on the Hub"):
            model_folder(name, None, FILES)


def test_a_folder_goes_before_the_hub_and_has_no_revision(hub_cache, tmp_path):
    (tmp_path / "someone" / "tagger").mkdir(parents=True)
    assert model_folder("someone/tagger", None, FILES).identity.startswith("blake2b:")
    with pytest.raises(UserError, match="is a folder, and revision = 'v1' is for the Hub"):
        model_folder("someone/tagger", "v1", FILES)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(DataError, match="is a file"):
        model_folder(str(tmp_path / "model.safetensors"), None, FILES)


def test_a_folder_is_known_by_the_bytes_of_the_files_that_count(tmp_path):
    def identity(name: str, **files: str) -> str:
        (tmp_path / name).mkdir()
        for file, text in files.items():
            file = file.replace("_", ".")
            (tmp_path / name / file).write_text(text, encoding="utf-8")
        return model_folder(str(tmp_path / name), None, FILES).identity

    first = identity("a", config_json="{}", model_safetensors="1")
    assert identity("ä b", config_json="{}", model_safetensors="1", README_md="x") == first
    assert identity("c", config_json="{}", model_safetensors="2") != first
    assert identity("d", config_json="{}1", model_safetensors="") != first
    assert identity("e", config_json="{}") != first


def test_damaged_files_are_named(tmp_path):
    folder = ModelFolder(tmp_path, "mine", "")
    for text, message in (("{", "is no JSON"), ("[1]", "holds a list, expected an object")):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            folder.read_json("config.json")
    with pytest.raises(DataError, match=r"model mine has no model\.safetensors; found: config"):
        folder.read_weights()
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    assert folder.read_weights()["a"].shape == (100,)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for part in (b"", whole[:50], whole[:-8]):
        (tmp_path / "model.safetensors").write_bytes(part)
        with pytest.raises(DataError, match="no whole safetensors file"):
            folder.read_weights()


def test_fingerprint_does_not_depend_on_the_order_of_options(tmp_path):
    folder = ModelFolder(tmp_path, "mine", "someone/tagger@1")
    first = fingerprint("x", 1, folder, a=1, b=["ä"])
    assert first == fingerprint("x", 1, folder, b=["ä"], a=1)
    expected = {"name": "x", "version": 1, "model": "someone/tagger@1", "a": 1, "b": ["ä"]}
    assert json.loads(first) == expected


def test_the_best_device_is_taken_and_said_and_none_is_replaced(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert torch_device("auto", "x") == "cpu"
    assert "x runs on cpu" in capsys.readouterr().err
    for device in ("cuda", "cuda:0", "mps"):
        with pytest.raises(UserError, match=f"device {device} is not there; .* sees cpu$"):
            _first_line(torch_device, device)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert torch_device("auto", "x") == torch_device("mps", "x") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [torch_device(name, "x") for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        *("cuda", "cuda", "cuda:1", "cpu")
    ]
    with pytest.raises(UserError, match=r"cuda:2 is not there; .* cpu, cuda:0, cuda:1, mps"):
        torch_device("cuda:2", "x")


def _first_line(call, device: str):
    try:
        return call(device, "x")
    except UserError as error:
        raise UserError(error.message) from None


def test_batches_are_halved_until_they_fit(capsys):
    batches, sizes = FittingBatches("x"), []

    def work(part):
        sizes.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return np.array(part) * 10

    assert batches.run(work, list(range(9))) == [10 * number for number in range(9)]
    assert sizes == [9, 4, 2, 2, 2, 2, 1]
    assert batches.run(work, [1, 2, 3]) == [10, 20, 30]
    assert sizes[7:] == [2, 1]
    assert batches.run(work, []) == []
    assert capsys.readouterr().err.count("out of memory") == 2


def test_a_cpu_takes_one_image_at_a_time_and_a_gpu_all():
    assert [batch_on(name, 8) for name in ("cpu", "cuda", "cuda:1", "mps")] == [1, 8, 8, 8]
    assert batch_on("cuda", 0) == 1


def test_what_is_too_little_memory_and_what_is_not():
    cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    assert is_out_of_memory(cpu)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(ValueError, match="mine"):
        FittingBatches("x").run(_raise, [1, 2])


def _raise(part):
    raise ValueError("mine")
