"""Fixtures that many tests share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["COLUMNS"] = "80"  # how wide the terminal happens to be
for forces_colour in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):  # also where nobody looks
    os.environ.pop(forces_colour, None)
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers are given the environment of this process
    # What the tests cache goes with them; the home folder is not theirs, and may be read-only.
    caches = tempfile.TemporaryDirectory(prefix="sdtrain-tests-")
    os.environ["HF_DATASETS_CACHE"] = caches.name

# A busy machine must not fail a test for being slow, nor a new example for what nobody touched:
# examples are drawn from a key, the test's own code.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

MOST_WORKERS = 8  # each loads torch, about 1 GB


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Share the suite out over the processors; what is named is quicker in one process."""
    options = config.option
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    has_workers = hasattr(options, "numprocesses") and "PYTEST_XDIST_WORKER" not in os.environ
    if is_whole and has_workers and options.numprocesses is None and not options.usepdb:
        options.numprocesses = min(os.cpu_count() or 1, MOST_WORKERS)
        options.dist = "loadfile"


SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Path of one folder of the shared sample data; skips the test where it is absent."""

    def folder(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"sample data {name!r} is not beside the project (../shared/data/{name})")
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model of one family, written once a session; never change it."""
    from tests.tiny import tiny_folder

    root = tmp_path_factory.mktemp("tiny-models")
    return lambda family: tiny_folder(root, family)


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small published data set: 14 images to train on, 4 held out; never change it."""
    from tests.train_data import prepared_row, write_prepared

    rows = [prepared_row(number) for number in range(18)]
    return write_prepared(tmp_path_factory.mktemp("data") / "prepared", rows[:14], rows[14:])


@pytest.fixture
def train_recipe(
    tmp_path: Path, prepared_folder: Path, tiny_model: Callable[[str], Path]
) -> Callable[..., Path]:
    """Writes a training recipe into the test's folder, for one family; output is `run`."""
    from tests.train_data import write_recipe

    def write(family: str = "sd15", output: str = "run", data: Path = prepared_folder) -> Path:
        return write_recipe(
            tmp_path / f"{output}.toml",
            model=tiny_model(family),
            data=data,
            output=tmp_path / output,
            family=family,
        )

    return write


@pytest.fixture(scope="session")
def evaluated_run(
    tmp_path_factory: pytest.TempPathFactory,
    prepared_folder: Path,
    tiny_model: Callable[[str], Path],
) -> Path:
    """A finished run of 12 samples, evaluated at 0, 8 and 12, with pictures; never change it."""
    from tests.evaluated import write_run

    return write_run(tmp_path_factory.mktemp("evaluated"), tiny_model("sd15"), prepared_folder)
