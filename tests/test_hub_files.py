"""Parts of files on a Hub on the loopback: tried again, told clearly, and no token astray."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from sdprep.errors import DataError, UserError
from sdtrain import hub_files
from sdtrain.data_section import DataSection
from sdtrain.hub_files import HubFile, list_files, pinned
from tests.hub_repository import Entry, Repository
from tests.hub_server import TOKEN, HubServer
from tests.hub_sets import REPO, streaming_hub

CONTENT = bytes(range(256)) * 40
PATH = "data/train-00000.parquet"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with streaming_hub(tmp_path) as server:
        server.repositories[REPO] = made = Repository(private=True)
        made.commit("first", {PATH: Entry(CONTENT, True), "data/notes.txt": Entry(b"small", False)})
        yield server


def section(**options: str) -> DataSection:
    return DataSection(path=REPO, streaming=True, **options)  # type: ignore[arg-type]


def the_file() -> HubFile:
    return list_files(pinned(section()), "data")[1]


def test_any_part_of_any_file_of_a_commit_can_be_read(hub: HubServer) -> None:
    small, large = list_files(pinned(section()), "data")
    assert (small.path, large.path, large.size) == ("data/notes.txt", PATH, len(CONTENT))
    assert large.read(5, 300) == CONTENT[5:300]
    assert small.read(1, 3) == b"ma"
    hub.repositories[REPO].commit("second", {PATH: Entry(b"other", True)})
    assert large.read(0, 5) == CONTENT[:5]  # still of its commit
    assert list_files(pinned(section()), "nothing") == []
    assert pickle.loads(pickle.dumps(large)).read(7, 8) == CONTENT[7:8]


def test_a_revision_becomes_a_commit(hub: HubServer) -> None:
    first = hub.repositories[REPO].head
    hub.repositories[REPO].commit("second", {})
    assert pinned(section()).revision == hub.repositories[REPO].head
    assert pinned(section(revision=first)).revision == first
    with pytest.raises(DataError, match="no revision 'v9'"):
        pinned(section(revision="v9"))


def test_the_storage_is_asked_directly_and_never_gets_the_token(hub: HubServer) -> None:
    hub.has_storage = True
    file = the_file()
    hub.requests.clear()
    for start in (0, 10, 20):
        assert file.read(start, start + 9) == CONTENT[start : start + 9]
    asked = [request.split("/")[1] for request in hub.requests]
    assert asked == ["datasets", "storage", "storage", "storage"]
    hub.signature = "another"  # the one that is known has expired
    assert file.read(30, 39) == CONTENT[30:39]
    assert [request.split("/")[1] for request in hub.requests[4:]] == [
        *("storage", "datasets", "storage")
    ]
    assert len(hub.sent_to_storage) == 5
    assert TOKEN not in repr(hub.sent_to_storage)
    assert b"Signature" not in pickle.dumps(file)


def test_what_may_pass_is_tried_again(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, left = the_file(), 2
    waits: list[float] = []
    monkeypatch.setattr(hub_files.time, "sleep", waits.append)
    monkeypatch.setattr(hub_files, "WAITS_S", (1.0, 2.0))

    def cut(path: str) -> bool:
        nonlocal left
        left -= 1
        return left >= 0

    hub.cut_answer = cut
    assert file.read(3, 4000) == CONTENT[3:4000]
    assert waits == [1.0, 2.0]
    told = capsys.readouterr().err
    assert told.count("trying again in") == 2
    assert f"{PATH} of {REPO} at" in told
    assert "SECRET" not in told
    refusals = iter([429, 503])
    hub.answer = lambda method, path: next(refusals, None)
    hub.retry_after = "7"
    waits.clear()
    assert file.read(3, 9) == CONTENT[3:9]
    assert waits == [8.0, 8.0]


@pytest.mark.parametrize(
    ("status", "words", "num_asked"),
    [(500, "cannot be fetched", 5), (403, "does not let you read", 1), (404, "is gone", 1)],
)
def test_what_does_not_pass_is_told(
    hub: HubServer, status: int, words: str, num_asked: int
) -> None:
    file = the_file()
    hub.requests.clear()
    hub.answer = lambda method, path: status
    with pytest.raises(DataError, match=words) as found:
        file.read(0, 5)
    assert len(hub.requests) == num_asked
    assert f"{PATH} of {REPO} at {file.revision[:12]}" in str(found.value)
    assert "SECRET" not in str(found.value)


def test_a_hub_that_is_not_there_is_told(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "http://127.0.0.1:9"
    file = replace(the_file(), url=f"{nowhere}/datasets")
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    with pytest.raises(DataError, match="cannot be fetched") as found:
        file.read(0, 5)
    assert "newest checkpoint" in found.value.hint
    with pytest.raises(DataError, match="the Hub says"):
        pinned(section())


def test_a_server_without_parts_is_refused(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    file = the_file()
    monkeypatch.setattr(hub, "knows_parts", False)
    with pytest.raises(DataError, match="parts of files") as found:
        file.read(0, 5)
    assert "data.streaming" in found.value.hint


def test_what_cannot_be_streamed_is_said_at_once(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="lies on this machine already"):
        pinned(DataSection(path=str(tmp_path), streaming=True))
    for path in ("nobody/nothing", "a/b/c", "no such folder"):
        with pytest.raises(DataError, match="data.path = "):
            pinned(DataSection(path=path, streaming=True))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        pinned(section())
