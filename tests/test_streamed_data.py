"""Training on a published set on the Hub, not downloaded first: the same run, bit for bit."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from sdprep.errors import DataError, RecipeError, UserError
from sdprep.prompt_policy import PromptPolicy
from sdtrain.ahead import expect
from sdtrain.cli import app
from sdtrain.data_section import DataSection
from sdtrain.dataset import TrainingData, open_data
from sdtrain.loader import load
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import open_setup
from sdtrain.streamed_data import StreamedRows
from sdtrain.trackers.jsonl import read_metrics
from sdtrain.trainer import train
from tests.hub_server import HubServer
from tests.hub_sets import REPO, noise_row, num_fetched, put, streaming_hub, write_noise
from tests.train_data import write_prepared, write_recipe

STREAM, NOTHING = ["data.streaming=true"], "data.stream_keep_gb=0"
EVALUATED = [
    *("validation.images=3", "validation.train_probe_images=2"),
    *("validation.timesteps_per_image=2", "validation.every_samples=22"),
]
CENTRE = ["data.crop=centre", "cache.latents=true"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise(tmp_path_factory.mktemp("sets") / "noise")


@pytest.fixture
def hub(folder: Path, tmp_path: Path) -> Iterator[HubServer]:
    with streaming_hub(tmp_path / "cache") as server:
        put(server, folder)
        yield server


def opened(path: Path | str = REPO, **options: Any) -> TrainingData:
    if path == REPO:
        options = {"streaming": True, **options}
    return open_data(DataSection(path=str(path), **options), PromptPolicy(), with_boxes=True)


# --- rows -----------------------------------------------------------------------------------------


def test_a_streamed_set_is_the_set(hub: HubServer, folder: Path) -> None:
    streamed, local = opened(), opened(folder)
    assert num_fetched(hub) < sum(f.stat().st_size for f in folder.rglob("*.parquet")) / 6
    assert streamed.fingerprint == local.fingerprint
    assert streamed.policy == local.policy
    assert streamed.provenance["revision"] == hub.repositories[REPO].head
    assert any("streamed from the Hub at commit" in note for note in streamed.notes)
    for one, other in (
        (streamed.train, local.train),
        (streamed.validation, local.validation),
        (opened(splits="all").train, opened(folder, splits="all").train),
    ):
        assert one is not None
        assert other is not None
        rows = range(len(other))
        assert (list(one.ids), one.sizes_hw.tolist()) == (list(other.ids), other.sizes_hw.tolist())
        assert one.records(rows) == other.records(rows)
        assert one.boxes(rows) == other.boxes(rows)
        assert one.sources(rows) == other.sources(rows)
        expect(one, rows)
        assert [one.image(r).tobytes() for r in rows] == [other.image(r).tobytes() for r in rows]
        assert len({one.source_digest(row) for row in rows}) == len(rows)


def test_pictures_that_are_expected_come_together_and_once(hub: HubServer) -> None:
    rows = opened(stream_keep_gb=0).train
    together = threading.Barrier(4, timeout=120)  # breaks if they come one by one
    hub.ranges.clear()
    hub.answer = lambda method, path: together.wait() and None
    expect(rows, [0, 4, 8, 12])
    found = [rows.image(row).size for row in (0, 4, 8, 12)]
    assert found == [(400, 300)] * 4
    assert len(hub.ranges) == 4
    hub.answer = lambda method, path: None
    expect(rows, [12, 16])
    assert len(hub.ranges) <= 5
    assert rows.image(12).size == (400, 300)
    rows.image(16)
    assert len(hub.ranges) == 5


def test_a_lost_picture_names_its_row(hub: HubServer) -> None:
    rows = opened().train
    hub.answer = lambda method, path: 503 if "/resolve/" in path else None
    for announced in ([], [3]):
        expect(rows, announced)
        with pytest.raises(DataError) as found:
            rows.image(3)
        assert f"row 3 ({rows.ids[3]}) of data/train-00000.parquet of {REPO} at" in str(found.value)
        assert "cannot be fetched" in str(found.value)


def test_growth_reads_only_new_shards_and_goes_on_with_the_old_pictures(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    first = opened()
    assert isinstance(first.train, StreamedRows)
    for row in range(len(first.train)):
        first.train.image(row)
    put(hub, write_noise(tmp_path / "grown", train=26), "grown")
    hub.ranges.clear()
    second = opened()
    assert len(second.train) == 26
    assert second.fingerprint != first.fingerprint
    assert {path for path, _, _ in hub.ranges} == {"data/train-00002.parquet"}
    hub.ranges.clear()
    second.train.image(0)
    assert not hub.ranges
    assert opened(revision=first.provenance["revision"]).fingerprint == first.fingerprint


def test_what_cannot_be_streamed_is_told_apart(hub: HubServer, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    (bare / "data").mkdir(parents=True)
    (bare / "data" / "train-00000.parquet").write_bytes(b"")
    put(hub, bare, "not ours")
    with pytest.raises(DataError, match=r"has no sdprep\.json") as found:
        opened()
    assert "sdprep" in found.value.hint
    put(hub, write_prepared(tmp_path / "lance", [], format="lance"), "lance")
    with pytest.raises(DataError, match=r"has no data/train-\*\.parquet .*as lance"):
        opened()
    usual = write_prepared(tmp_path / "usual", [noise_row(0)])  # type: ignore[list-item]
    put(hub, usual, "compressed")
    with pytest.raises(DataError, match=r"cannot be streamed: its pictures are compressed"):
        opened()
    with pytest.raises(DataError, match="lies on this machine already"):
        opened(tmp_path, streaming=True)


# --- runs -----------------------------------------------------------------------------------------


Run = Callable[..., dict[str, Any]]


def trained(path: Path, *settings: str) -> dict[str, Any]:
    """Train a recipe; what came out of it, but for the name of the data set."""
    recipe = load_train_recipe(path, [*EVALUATED, *settings])
    outcome = train(recipe)
    lines = read_metrics(recipe.output / "metrics.jsonl")
    assert outcome.checkpoint is not None
    files = [Path(outcome.checkpoint) / f"{name}.safetensors" for name in ("trained", "optimizer")]
    return {
        "losses": [line["loss"] for line in lines if line["kind"] == "train"],
        "means": [line["mean"] for line in lines if line["kind"] == "validation"],
        "tensors": {k: v.numpy().tobytes() for f in files for k, v in load_file(f).items()},
        "samples": outcome.samples_seen,
    }


@pytest.fixture
def run(train_recipe: Callable[..., Path], hub: HubServer) -> Run:
    """Train from the Hub; takes the name of the output and settings."""

    def streamed(output: str, *settings: str) -> dict[str, Any]:
        return trained(train_recipe(output=output, data=Path(REPO)), *STREAM, *settings)

    return streamed


@pytest.fixture(scope="module")
def local(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path], folder: Path
) -> dict[str, Any]:
    """The same, trained from the folder."""
    root = tmp_path_factory.mktemp("local")
    recipe = write_recipe(
        root / "local.toml",
        model=tiny_model("sd15"),
        data=folder,
        output=root / "local",
        family="sd15",
    )
    return trained(recipe)


def test_streamed_and_local_are_one_run_bit_for_bit(run: Run, local: dict[str, Any]) -> None:
    assert (local["samples"], len(local["losses"]), len(local["means"])) == (22, 6, 4)
    assert run("streamed") == local


@pytest.mark.slow
def test_workers_fetch_for_themselves(run: Run, hub: HubServer, local: dict[str, Any]) -> None:
    hub.has_storage = True
    assert run("streamed", "data.workers=2", NOTHING) == local
    assert len(hub.sent_to_storage) > 30  # words are sent for once


def test_training_starts_after_the_first_pictures(
    train_recipe: Callable[..., Path], hub: HubServer, folder: Path
) -> None:
    recipe = load_train_recipe(train_recipe(data=Path(REPO)), STREAM)
    setup = open_setup(recipe)
    words = num_fetched(hub)
    whole = sum(file.stat().st_size for file in folder.rglob("*.parquet"))
    assert words < whole / 6
    hub.ranges.clear()
    micro, batch = next(iter(load(setup.reader(), setup.micro_batches(), 0)))
    assert len(hub.ranges) == len(batch) == len(micro.slots)
    assert words + num_fetched(hub) < whole / 3


@pytest.mark.slow
def test_an_interrupted_network_changes_nothing(
    run: Run, hub: HubServer, local: dict[str, Any]
) -> None:
    asked = iter(range(10**6))
    hub.cut_answer = lambda path: next(asked) % 3 == 1
    assert run("streamed", NOTHING) == local
    assert next(asked) > 30


@pytest.mark.slow
def test_a_run_goes_on_after_the_network_was_gone(
    run: Run, hub: HubServer, local: dict[str, Any], tmp_path: Path
) -> None:
    first = tmp_path / "run" / "checkpoints" / "8"
    hub.answer = lambda method, path: 503 if first.exists() else None
    with pytest.raises(DataError, match=r"row \d+ .*cannot be fetched"):
        run("run", NOTHING)
    assert first.is_dir()
    hub.answer = lambda method, path: None
    again = run("run", NOTHING)
    assert (again["tensors"], again["losses"][-3:]) == (local["tensors"], local["losses"][-3:])


@pytest.mark.slow
def test_with_cached_latents_a_picture_is_fetched_once(
    run: Run, hub: HubServer, train_recipe: Callable[..., Path], folder: Path
) -> None:
    none = ("validation.images=0", "validation.train_probe_images=0")
    more = (*none, "train.samples=44")
    run("first", *CENTRE, *none, NOTHING)  # 22 samples: each of the 22 pictures once
    hub.ranges.clear()
    longer = run("second", *CENTRE, *more, NOTHING)
    assert not [path for path, _, _ in hub.ranges if path.startswith("data/train")]
    assert longer["samples"] == 44
    from_folder = trained(train_recipe(output="third", data=folder), "data.crop=centre", *more)
    assert longer == from_folder


@pytest.mark.slow
def test_a_set_that_moved_on_is_refused_and_its_commit_named(
    run: Run, hub: HubServer, tmp_path: Path
) -> None:
    old = hub.repositories[REPO].head
    run("run")
    put(hub, write_noise(tmp_path / "grown", train=26), "grown")
    with pytest.raises(UserError, match="data_fingerprint") as found:
        run("run")
    assert f'data.revision = "{old}"' in found.value.hint
    assert run("run", f"data.revision={old}")["samples"] == 22


# --- commands -------------------------------------------------------------------------------------


def call(*arguments: str | Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.exception
    return dict(json.loads(result.stdout))


def test_check_inspect_and_cache_work_from_afar(
    train_recipe: Callable[..., Path], hub: HubServer, tmp_path: Path
) -> None:
    recipe = train_recipe(data=Path(REPO))
    settings = [word for each in (*STREAM, *CENTRE) for word in ("--set", each)]
    found = call("check", recipe, *settings)
    assert found["data"]["splits"]["train"]["kept"] == 22
    assert "streamed from the Hub" in " ".join(found["data"]["notes"])
    call("inspect", recipe, "--to", tmp_path / "look", *settings)
    assert list((tmp_path / "look").glob("**/*.png"))
    assert call("cache", recipe, *settings)["latents"]["encoded"] == 22


def test_keeping_without_streaming_is_refused(train_recipe: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="stream_keep_gb does nothing"):
        load_train_recipe(train_recipe(), ["data.stream_keep_gb=3"])
