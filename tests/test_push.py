"""Pushing to a Hub on the loopback: nothing twice, nothing half, and nothing said too much."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants, get_session
from PIL import Image

import sdprep.hub_access
import sdprep.prepared_files
import sdprep.push
from sdprep.commands.text import publish_preview_text, publish_text
from sdprep.errors import DataError, RecipeError, UserError
from sdprep.hub_access import repo_name
from sdprep.publish import PublishConfig, publish
from sdprep.push import IN_FLIGHT, push, push_preview
from sdprep.recipe import validate
from sdprep.seeding import integer
from sdprep.stages import publish_preview, publish_stage
from sdprep.table import PhotoTable
from tests.hub_repository import Entry, Repository
from tests.hub_server import TOKEN, HubServer
from tests.test_publish import add, contents, core_row, split_by_number

REPO = "user/name"
SHARD_BYTES = 120_000  # one picture of noise and the columns beside it


def noise(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (180, 180, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `first` (20 shards of one picture), `grown` (26), `lance`, and the table."""
    root = tmp_path_factory.mktemp("sets with blanks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdprep.prepared_files, "MEGABYTE", 200_000)
        table = PhotoTable.open(root / "photos.lance", create=True)
        config = PublishConfig(shard_megabytes=1, title="noise")
        for name, numbers in (("first", range(20)), ("grown", range(20, 26))):
            add(table, [core_row(noise(number)) for number in numbers])
            split_by_number(table)
            publish(table, root / name, config=config)
            if name == "first":
                publish(table, root / "lance", config=PublishConfig(format="lance"))
    shards = sorted((root / "first/data").iterdir())
    assert len(shards) == 20
    assert max(path.stat().st_size for path in shards) < SHARD_BYTES
    return root


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub for this process; the library reads its address and options once, at import."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda s: None))
    monkeypatch.setattr(sdprep.hub_access, "WAITS_S", (0.0,) * 4)
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{")
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "".join(template[1:])
        )
        yield server


def environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HF_HUB_OFFLINE", "HF_DATASETS_CACHE")
    }
    return kept | own | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def data_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.startswith("data/")}


def without_attributes(hub: HubServer) -> dict[str, bytes]:
    return {n: data for n, data in hub.files(REPO).items() if n != ".gitattributes"}


def check_every_commit(hub: HubServer) -> None:
    """No reader ever meets a card whose data is missing or another's."""
    cards = 0
    for _, _, files in hub.repositories[REPO].commits:
        assert ("README.md" in files) == ("sdprep.json" in files)
        if "sdprep.json" in files:
            listed = json.loads(files["sdprep.json"].content)["files"]
            assert set(listed) <= set(files)
            cards += 1
    assert cards


# --- what arrives ---------------------------------------------------------------------------------

LOAD = """
import datasets, hashlib, json, sys
found = {}
for streaming in (False, True):
    loaded = datasets.load_dataset(sys.argv[1], streaming=streaming)
    found[str(streaming)] = {
        split: [[row["id"], hashlib.sha256(row["image"].tobytes()).hexdigest()] for row in rows]
        for split, rows in loaded.items()
    }
print(json.dumps(found))
"""


@pytest.mark.slow
def test_what_was_pushed_can_be_loaded(hub: HubServer, sets: Path, tmp_path: Path) -> None:
    report = push(sets / "first", REPO)
    assert without_attributes(hub) == contents(sets / "first")
    assert (report.repo, report.uploaded, report.already_there) == (REPO, 24, 0)
    assert report.revision == hub.repositories[REPO].head
    assert report.url == f"{hub.url}/datasets/{REPO}"
    assert report.num_bytes_sent == sum(map(len, contents(sets / "first").values()))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, REPO],
        env=environment(hub, tmp_path),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert loaded["False"] == loaded["True"]
    assert {split: len(rows) for split, rows in loaded["True"].items()} == {
        "train": 16,
        "validation": 4,
    }
    table = PhotoTable.open(sets / "photos.lance")
    originals = table.image_bytes([id_ for rows in loaded["True"].values() for id_, _ in rows])
    from hashlib import sha256

    for rows in loaded["True"].values():
        for id_, digest in rows:
            assert sha256(Image.open(io.BytesIO(originals[id_])).tobytes()).hexdigest() == digest


def test_a_second_push_sends_nothing_and_commits_nothing(hub: HubServer, sets: Path) -> None:
    first = push(sets / "first", REPO)
    hub.requests.clear()
    second = push(sets / "first", REPO)
    assert (second.uploaded, second.num_bytes_sent, second.deleted) == (0, 0, 0)
    assert (second.already_there, second.revision) == (24, first.revision)
    assert not [r for r in hub.requests if r.startswith(("PUT", "POST"))]


def test_data_comes_first_and_the_card_last(hub: HubServer, sets: Path) -> None:
    push(sets / "first", REPO)
    check_every_commit(hub)
    *most, (_, message, files) = hub.repositories[REPO].commits
    assert message == "Publish with sdprep"
    assert len(most) == 1 + 20 // IN_FLIGHT
    assert len([name for name in most[-1][2] if name.startswith("data/")]) == 20
    assert not {"README.md", "sdprep.json"} & set(most[-1][2])


def test_growth_sends_only_new_shards(hub: HubServer, sets: Path) -> None:
    push(sets / "first", REPO)
    before, hub.bytes_received = data_of(sets / "first"), 0
    report = push(sets / "grown", REPO)
    assert without_attributes(hub) == contents(sets / "grown")
    after = data_of(sets / "grown")
    assert len(after) == 26
    assert all(after[name] == data for name, data in before.items())
    fresh = {
        n: d for n, d in contents(sets / "grown").items() if contents(sets / "first").get(n) != d
    }
    assert report.uploaded == len(fresh)
    assert report.num_bytes_sent == sum(map(len, fresh.values()))
    assert hub.bytes_received <= report.num_bytes_sent
    assert not [name for name in fresh if name in before]
    check_every_commit(hub)


def test_what_is_gone_is_deleted_with_the_card_and_other_files_stay(
    hub: HubServer, sets: Path
) -> None:
    push(sets / "grown", REPO)
    repository = hub.repositories[REPO]
    repository.commit("by hand", repository.files | {"NOTES.md": Entry(b"mine", False)})
    before = len(repository.commits)
    report = push(sets / "first", REPO)
    assert report.deleted == 6
    assert without_attributes(hub) == contents(sets / "first") | {"NOTES.md": b"mine"}
    assert len(repository.commits) == before + 1  # names of all data are known: one switch


def test_replaced_data_and_card_change_in_one_commit(
    hub: HubServer, sets: Path, tmp_path: Path
) -> None:
    push(sets / "first", REPO)
    folder = tmp_path / "changed"
    shutil.copytree(sets / "grown", folder)
    for number in range(7):  # as after a rejection that moves all rows
        target = folder / f"data/train-{number:05d}.parquet"
        shutil.copyfile(folder / f"data/train-{number + 1:05d}.parquet", target)
    push(folder, REPO)
    assert without_attributes(hub) == contents(folder)
    *_, (_, _, before), (_, _, after) = hub.repositories[REPO].commits
    first = contents(sets / "first")
    assert all(before[name].content == data for name, data in first.items())
    assert before["data/train-00020.parquet"].content  # new names came earlier
    assert after["data/train-00000.parquet"].content != first["data/train-00000.parquet"]


def test_large_data_sets_take_larger_commits_and_a_large_end_several(
    hub: HubServer, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdprep.push, "MOST_COMMITS", 2)
    monkeypatch.setattr(sdprep.push, "LARGEST_COMMIT", 3)
    push(sets / "first", REPO)
    assert len(hub.repositories[REPO].commits) == 2 + 2
    folder = tmp_path / "changed"
    shutil.copytree(sets / "first", folder)
    for number in range(7):
        with (folder / f"data/train-{number:05d}.parquet").open("ab") as file:
            file.write(b"more")
    push(folder, REPO)
    assert without_attributes(hub) == contents(folder)
    assert len(hub.repositories[REPO].commits) == 4 + 3


def test_formats_replace_each_other(hub: HubServer, sets: Path) -> None:
    push(sets / "first", REPO)
    push(sets / "lance", REPO)
    assert without_attributes(hub) == contents(sets / "lance")
    *_, (_, _, before), _ = hub.repositories[REPO].commits
    assert [name for name in before if "/data/" in name]
    assert not [name for name in before if "_versions" in name]
    push(sets / "first", REPO)
    assert without_attributes(hub) == contents(sets / "first")
    check_every_commit(hub)


def test_private_notes_in_the_folder_stay_at_home(
    hub: HubServer, sets: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "Bilder 日本"
    shutil.copytree(sets / "first", folder)
    (folder / "NOTES.md").write_text("mine")
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("token")
    push(folder, REPO)
    assert without_attributes(hub) == contents(sets / "first")


def test_large_files_may_go_in_parts(hub: HubServer, sets: Path) -> None:
    hub.part_bytes = 50_000
    push(sets / "first", REPO)
    assert without_attributes(hub) == contents(sets / "first")
    assert len([request for request in hub.puts() if "/part/" in request]) >= 60


# --- accidents ------------------------------------------------------------------------------------


def test_cut_connections_are_tried_again(hub: HubServer, sets: Path) -> None:
    cuts: list[str] = []

    def cut(path: str, received: int) -> bool:
        is_now = len(cuts) < 6 and path.startswith("/store/") and received >= 40_000
        if is_now and cuts.count(path) < 2:
            cuts.append(path)
            return True
        return False

    hub.cut = cut
    report = push(sets / "first", REPO)
    assert len(cuts) == 6
    assert without_attributes(hub) == contents(sets / "first")
    assert hub.bytes_received <= report.num_bytes_sent + len(cuts) * SHARD_BYTES
    assert report.uploaded == 24


def test_a_hub_that_stumbles_is_asked_again(
    hub: HubServer, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, int] = {}

    def answer(method: str, path: str) -> int | None:
        """Every route stumbles the first time it is used, the first commit once more."""
        kinds = ("whoami", "create", "tree", "preupload", "batch", "store", "commit")
        route = next((kind for kind in kinds if kind in path), "other")
        asked[route] = asked.get(route, 0) + 1
        return 503 if asked[route] <= 1 + (route == "commit") else None

    hub.answer = answer
    push(sets / "first", REPO)
    assert without_attributes(hub) == contents(sets / "first")
    assert len(hub.repositories[REPO].commits) == 2 + 20 // IN_FLIGHT
    assert len(asked) == 8
    assert "trying again in 0 s" in capsys.readouterr().err


def test_waits_start_anew_whenever_something_arrived(hub: HubServer, sets: Path) -> None:
    asked: list[str] = []

    def answer(method: str, path: str) -> int | None:
        asked.append(path) if path.endswith("commit/main") else None
        return 503 if path.endswith("commit/main") and len(asked) % 2 else None

    hub.answer = answer
    push(sets / "first", REPO)
    assert len(asked) // 2 == 1 + 20 // IN_FLIGHT > len(sdprep.hub_access.WAITS_S)


def test_a_lost_answer_to_a_commit_makes_no_second_one(hub: HubServer, sets: Path) -> None:
    real, lost = hub.commit, []

    def commit(repo: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        made = real(repo, lines)
        if len(lost) < 2:
            lost.append(made)
            raise OSError("the line is cut before the answer")
        return made

    hub.commit = commit  # type: ignore[method-assign]
    push(sets / "first", REPO)
    assert len(lost) == 2
    assert without_attributes(hub) == contents(sets / "first")
    assert len(hub.repositories[REPO].commits) == 2 + 20 // IN_FLIGHT


def test_a_hub_that_is_down_is_said_and_the_rest_goes_later(
    hub: HubServer, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.answer = lambda _, path: 500 if path.endswith("commit/main") and hub.moments > 300 else None
    with pytest.raises(UserError, match=f"no luck with the Hub while working on {REPO}") as caught:
        push(sets / "first", REPO)
    assert "only the rest is sent" in caught.value.hint
    sent, asked = hub.bytes_received, len([r for r in hub.requests if r.endswith("commit/main")])
    assert 0 < asked <= 10
    hub.answer = lambda method, path: None
    push(sets / "first", REPO)
    total = sum(map(len, contents(sets / "first").values()))
    assert sent > 3 * SHARD_BYTES
    assert hub.bytes_received <= total  # the Hub keeps what no commit names yet
    assert "signedSECRET" not in capsys.readouterr().err


def test_a_line_that_is_dead_but_not_closed_is_given_up(
    hub: HubServer, sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdprep.hub_access, "SILENCE_S", 1.5)  # a busy machine is slow to answer
    monkeypatch.setattr(get_session(), "timeout", None)  # what it is set to must not outlast this
    silent: list[str] = []
    turns, is_over = iter(range(2)), threading.Event()

    def answer(method: str, path: str) -> None:
        if method == "PUT" and next(turns, None) is not None:
            silent.append(path)
            is_over.wait(300)

    hub.answer = answer
    push(sets / "first", REPO)
    is_over.set()
    assert len(silent) == 2
    assert all(hub.puts().count(f"PUT {path}") >= 2 for path in silent)
    assert without_attributes(hub) == contents(sets / "first")


def test_another_commit_in_between_is_respected(hub: HubServer, sets: Path) -> None:
    def answer(method: str, path: str) -> None:
        repository = hub.repositories.get(REPO)
        if path.endswith("commit/main") and repository and len(repository.commits) == 3:
            files = repository.files | {"LICENSE": Entry(b"CC0", False)}
            del files["data/train-00000.parquet"]  # a mishap that the push mends
            repository.commit("by hand", files)

    hub.answer = answer
    push(sets / "first", REPO)
    assert without_attributes(hub) == contents(sets / "first") | {"LICENSE": b"CC0"}


def test_a_file_that_changes_meanwhile_stops_it(hub: HubServer, sets: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(sets / "first", folder)

    def on_moment(moment: int) -> None:
        if moment == 150:
            (folder / "data/validation-00003.parquet").write_bytes(b"published anew")

    hub.on_moment = on_moment
    with pytest.raises(DataError, match=r"validation-00003\.parquet changed while it was sent"):
        push(folder, REPO)
    assert "README.md" not in hub.files(REPO)


PUSH = """
import sys
from pathlib import Path
from sdprep.push import push
push(Path(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.slow
def test_ten_kills_cost_no_more_than_what_was_in_flight(
    hub: HubServer, sets: Path, tmp_path: Path
) -> None:
    """kill -9 at ten keyed moments: a request, 8 kB of a body, an answer, a commit."""
    kills = 0
    for number in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", PUSH, str(sets / "grown"), REPO],
            env=environment(hub, tmp_path),
            stderr=subprocess.DEVNULL,
        )
        at = hub.moments + 5 + integer("kill", number) % 110
        hub.on_moment = kill_at(process, at)
        kills += process.wait(300) not in (0, 1)
        if REPO in hub.repositories:
            assert "sdprep.json" not in hub.files(REPO)
    assert kills == 10
    hub.on_moment = lambda moment: None
    done = hub.bytes_received
    assert done > 5 * SHARD_BYTES
    push(sets / "grown", REPO)
    assert without_attributes(hub) == contents(sets / "grown")
    total = sum(map(len, contents(sets / "grown").values()))
    assert hub.bytes_received <= total + kills * IN_FLIGHT * SHARD_BYTES
    check_every_commit(hub)
    stored = [request for request in hub.puts() if "/store/" in request]
    assert len(stored) <= 30 + kills * IN_FLIGHT


def kill_at(process: subprocess.Popen[bytes], at: int) -> Callable[[int], None]:
    return lambda moment: process.kill() if moment >= at else None


# --- who may, and where ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token": None}, "you are not logged in"),
        ({"token": "hf_" + "wrongSECRET"}, "does not accept the token"),
        ({"role": "read"}, "the token of user may only read"),
        ({"repo": "stranger/name"}, "user does not belong to stranger"),
    ],
)
def test_access_is_checked_before_anything_is_sent(
    hub: HubServer,
    sets: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    if change.get("token"):
        monkeypatch.setenv("HF_TOKEN", change["token"])
    elif "token" in change:
        monkeypatch.delenv("HF_TOKEN")
    hub.account["auth"]["accessToken"]["role"] = change.get("role", "write")
    with pytest.raises(UserError, match=message) as caught:
        push(sets / "first", change.get("repo", REPO))
    assert "hf auth login" in caught.value.hint or "push to: user, club" in caught.value.hint
    assert "SECRET" not in str(caught.value)
    assert not [r for r in hub.requests if not r.endswith(("whoami-v2", "agent-harnesses"))]


def test_a_team_and_a_fine_grained_token_may(hub: HubServer, sets: Path) -> None:
    push(sets / "first", "club/name")
    hub.account["auth"]["accessToken"]["role"] = "fineGrained"
    hub.account["orgs"] = []
    assert push(sets / "first", "club/name").uploaded == 0


def test_a_hub_that_knows_no_accounts_is_tried_all_the_same(
    hub: HubServer, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.answer = lambda _, path: 404 if path.endswith("whoami-v2") else None
    assert push(sets / "first", REPO).uploaded == 24
    assert "does not say whose token this is" in capsys.readouterr().err


def test_a_refusal_of_the_hub_is_passed_on(hub: HubServer, sets: Path) -> None:
    hub.answer = lambda _, path: 403 if path.endswith("create") else None
    with pytest.raises(UserError, match=f"does not let you write to {REPO}: the loopback Hub"):
        push(sets / "first", REPO)


def test_addresses_of_the_storage_expire_and_are_not_shown(
    hub: HubServer, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expired: list[str] = []

    def answer(method: str, path: str) -> int | None:
        expired.append(path) if method == "PUT" else None
        return 403 if method == "PUT" and len(expired) in (3, 9) else None

    hub.answer = answer
    push(sets / "first", REPO)
    assert without_attributes(hub) == contents(sets / "first")
    hub.answer = lambda method, _: 403 if method == "PUT" else None
    with pytest.raises(UserError, match=r"data/train-000\d\d\.parquet: .*403 Forbidden") as caught:
        push(sets / "grown", REPO)
    said = capsys.readouterr().err + str(caught.value)
    assert "/store/" in said
    assert "signedSECRET" not in said


def test_offline_mode_is_said(hub: HubServer, sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push(sets / "first", REPO)


@pytest.mark.parametrize("private", [True, False])
def test_the_repository_is_private_unless_said_otherwise(
    hub: HubServer, sets: Path, private: bool
) -> None:
    push(sets / "first", REPO, **({} if private else {"private": False}))
    assert hub.repositories[REPO].private is private


def test_nothing_private_goes_into_a_public_repository(
    hub: HubServer, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.create({"name": "name", "visibility": "public"})
    with pytest.raises(UserError, match=f"{REPO} is public, and the data set should be private"):
        push(sets / "first", REPO)
    assert not hub.puts()
    push(sets / "first", REPO, private=False)
    push(sets / "first", REPO)
    assert "is public and stays so" in capsys.readouterr().err
    hub.repositories[REPO].private = True
    push(sets / "first", REPO, private=False)
    assert "is private and stays so" in capsys.readouterr().err
    assert hub.repositories[REPO].private


def test_files_of_others_are_not_mixed_with_ours(
    hub: HubServer, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"data/train-00000-of-00001.parquet": Entry(b"theirs", True)}
    hub.repositories[REPO] = found = Repository(True)
    found.commit("theirs", other)
    with pytest.raises(UserError, match=r"did not publish: data/train-00000-of-00001\.parquet"):
        push(sets / "first", REPO)
    assert hub.files(REPO) == {"data/train-00000-of-00001.parquet": b"theirs"}
    hub.repositories[REPO] = found = Repository(True)
    found.commit("made on the site", {"README.md": Entry(b"---\nlicense: mit\n---\n", False)})
    push(sets / "first", REPO)
    assert "replaced by the card" in " ".join(capsys.readouterr().err.split())
    assert hub.files(REPO) == contents(sets / "first")


def test_a_data_set_of_another_version_is_left_alone(hub: HubServer, sets: Path) -> None:
    push(sets / "first", REPO)
    found = hub.repositories[REPO]
    newer = found.files["sdprep.json"].content.replace(
        b'"SCHEMA_VERSION": 1', b'"SCHEMA_VERSION": 9'
    )
    extra = {"sdprep.json": Entry(newer, False), "extra.bin": Entry(b"x", False)}
    found.commit("from the future", found.files | extra)
    with pytest.raises(DataError, match=f"{REPO}: sdprep.json has SCHEMA_VERSION 9"):
        push(sets / "first", REPO)


def test_files_that_the_hub_ignores_are_said(hub: HubServer, sets: Path) -> None:
    hub.create({"name": "name", "visibility": "private"})
    found = hub.repositories[REPO]
    found.commit("x", found.files | {".gitignore": Entry(b"data/train-00003.parquet", False)})
    with pytest.raises(UserError, match=r"without data/train-00003\.parquet"):
        push(sets / "first", REPO)


@pytest.mark.parametrize("name", ["user/name", "Org.x/na-me_1.0", "a/" + "b" * 96])
def test_good_names(name: str) -> None:
    assert repo_name(name) == name
    assert validate({"push": name}, PublishConfig, "x").push == name
    assert validate({"push": name}, PublishConfig, "x").private


@pytest.mark.parametrize(
    "name",
    [
        "",
        "name",
        "a/b/c",
        "a/",
        "/b",
        "-a/b",
        "a/b-",
        "a/b..c",
        "a/b--c",
        "a/b.git",
        "a/b ",
        "a/b\n",
    ]
    + ["ü/b", "a/" + "b" * 97, "https://huggingface.co/datasets/a/b"],
)
def test_bad_names(name: str, sets: Path) -> None:
    with pytest.raises(RecipeError, match=r"push = .* must be USER/NAME"):
        validate({"push": name}, PublishConfig, "x")
    with pytest.raises(UserError, match="must be USER/NAME"):
        push(sets / "first", name)


# --- the folder -----------------------------------------------------------------------------------


def test_only_a_whole_data_set_of_ours_is_pushed(
    hub: HubServer, sets: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="No such file"):
        push(tmp_path, REPO)
    folder = tmp_path / "out"
    shutil.copytree(sets / "first", folder)
    manifest = json.loads((folder / "sdprep.json").read_text(encoding="utf-8"))

    def say(**changes: Any) -> None:
        (folder / "sdprep.json").write_text(json.dumps(manifest | changes), encoding="utf-8")

    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    for name in ("../secret.txt", str(secret)):
        say(files=[*manifest["files"], name])
        with pytest.raises(DataError, match="outside the folder"):
            push(folder, REPO)
    say(files=None)
    with pytest.raises(DataError, match="lists no files"):
        push(folder, REPO)
    say(SCHEMA_VERSION=2)
    with pytest.raises(DataError, match="SCHEMA_VERSION 2"):
        push(folder, REPO)
    say()
    (folder / "data/train-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"not whole: data/train-00001\.parquet is missing"):
        push(folder, REPO)
    assert not hub.repositories


def test_a_preview_lists_files_and_sends_none(hub: HubServer, sets: Path) -> None:
    found = push_preview(sets / "first", REPO)
    assert (found["exists"], found["private"], found["already_there"]) == (False, True, 0)
    assert {file["path"] for file in found["send"]} == set(contents(sets / "first"))
    push(sets / "grown", REPO)
    hub.requests.clear()
    found = push_preview(sets / "first", REPO)
    assert found["already_there"] == 20
    assert len(found["delete"]) == 6
    assert "README.md" in [file["path"] for file in found["send"]]
    assert found["num_bytes"] == sum(file["num_bytes"] for file in found["send"])
    assert not [r for r in hub.requests if r.startswith(("PUT", "POST"))]


# --- the command ----------------------------------------------------------------------------------


def test_the_command_publishes_and_pushes(hub: HubServer, sets: Path, tmp_path: Path) -> None:
    table = tmp_path / "my photos.lance"
    shutil.copytree(sets / "photos.lance", table)
    folder = tmp_path / "my photos-prepared"

    def sdprep(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-c", "from sdprep.cli import main; main()", "publish", str(table)]
            + ["--push", REPO, *arguments],
            env=environment(hub, tmp_path),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "SECRET" not in done.stdout + done.stderr
        return done

    planned = json.loads(sdprep("--dry-run", "--json").stdout)
    assert planned == planned | {"dry_run": True, "path": str(folder), "images": 26, "push": None}
    assert not folder.exists()
    assert not hub.repositories
    report = json.loads(sdprep("--json", "--public").stdout)
    assert report["path"] == str(folder)
    assert (report["train"], report["validation"]) == (21, 5)
    assert report["revision"] == hub.repositories[REPO].head
    assert report["url"] == f"{hub.url}/datasets/{REPO}"
    assert report["uploaded"] == len(contents(folder))
    assert not hub.repositories[REPO].private
    assert without_attributes(hub) == contents(folder)
    assert (folder / "README.md").read_text(encoding="utf-8").count("\n# name\n") == 1
    assert f'load_dataset("{REPO}")' in (folder / "README.md").read_text(encoding="utf-8")
    for data in hub.files(REPO).values():
        assert TOKEN.encode() not in data


def test_publishing_and_pushing_again_sends_nothing(
    hub: HubServer, sets: Path, tmp_path: Path
) -> None:
    table = PhotoTable.open(sets / "photos.lance")
    config = PublishConfig(to=tmp_path / "out", push=REPO)
    assert "once it is there" in publish_preview_text(publish_preview(table, config))
    first = publish_stage(table, config, None)
    assert first["uploaded"] == len(contents(tmp_path / "out")) == 6
    assert f"load_dataset('{REPO}')" in publish_text(first)
    hub.requests.clear()
    second = publish_stage(table, config, None)
    assert (second["uploaded"], second["revision"]) == (0, first["revision"])
    assert not [r for r in hub.requests if r.startswith(("PUT", "POST"))]
    text = publish_preview_text(publish_preview(table, config))
    assert f"to {REPO} (private):\nwould send 0 files, 0 kB; 6 are there" in text


def test_a_recipe_says_a_missing_token_before_it_begins(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sdprep.pipeline import run_recipe
    from sdprep.prep_recipe import PrepRecipe

    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "in").mkdir()
    given = {"table": str(tmp_path / "x.lance"), "publish": {"push": REPO}}
    given["source"] = [{"type": "folder", "path": str(tmp_path / "in")}]
    with pytest.raises(UserError, match="not logged in"):
        run_recipe(validate(given, PrepRecipe, "x"))
    assert not (tmp_path / "x.lance").exists()
