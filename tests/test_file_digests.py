"""Digests that are remembered must never be those of other bytes."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from sdprep import file_digests
from sdprep.file_digests import file_digest


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "my cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "my cache"))
    monkeypatch.setattr(file_digests.sys, "platform", "linux")
    monkeypatch.setattr(file_digests, "LEAST_BYTES", 8)
    monkeypatch.setattr(file_digests, "SETTLED_S", -1.0)
    path = tmp_path / "model ü.safetensors"
    path.write_bytes(b"0123456789")
    return path


def plain(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def reads(monkeypatch) -> list[Path]:
    found: list[Path] = []
    real = file_digests._computed

    def counted(path: Path) -> str:
        found.append(path)
        return real(path)

    monkeypatch.setattr(file_digests, "_computed", counted)
    return found


def test_a_file_is_read_once_and_again_after_any_change(weights, monkeypatch):
    seen = reads(monkeypatch)
    assert file_digest(weights) == file_digest(weights) == plain(weights)
    assert len(seen) == 1
    stat = weights.stat()
    time.sleep(0.01)
    weights.write_bytes(b"9876543210")  # the same size,
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # and the old time put back
    assert file_digest(weights) == plain(weights)
    assert len(seen) == 2
    other = weights.with_name("other")
    other.write_bytes(b"abcdefghij")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, weights)
    assert file_digest(weights) == plain(weights)
    assert len(seen) == 3
    assert file_digest(weights) == plain(weights)
    assert len(seen) == 3


def test_what_was_just_written_is_not_remembered(weights, monkeypatch):
    monkeypatch.setattr(file_digests, "SETTLED_S", 3600.0)
    seen = reads(monkeypatch)
    assert file_digest(weights) == file_digest(weights)
    assert len(seen) == 2


def test_small_files_leave_no_trace_and_a_damaged_cache_is_an_empty_one(weights, monkeypatch):
    cache = file_digests._cache_file()
    monkeypatch.setattr(file_digests, "LEAST_BYTES", 100)
    file_digest(weights)
    assert not cache.exists()
    monkeypatch.setattr(file_digests, "LEAST_BYTES", 8)
    for content in ("{", "[1]", '{"x": 3}'):
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(content, encoding="utf-8")
        assert file_digest(weights) == plain(weights)
    assert file_digest(weights) == plain(weights)


def test_without_a_place_to_remember_in_it_is_read_each_time(weights, monkeypatch):
    (weights.parent / "my cache").write_text("a file", encoding="utf-8")
    seen = reads(monkeypatch)
    assert file_digest(weights) == file_digest(weights) == plain(weights)
    assert len(seen) == 2
