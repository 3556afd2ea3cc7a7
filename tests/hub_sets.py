"""A published data set on a Hub on the loopback, for the tests of streaming."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from sdprep.prepared_files import ShardWriter
from sdtrain import hub_files, hub_shards
from tests.hub_repository import Entry, Repository
from tests.hub_server import LARGE, TOKEN, HubServer
from tests.train_data import prepared_row, write_prepared

REPO = "user/photos"
SIZES = ((400, 300), (120, 120), (300, 400), (350, 350))


def noise_row(number: int, **changed: object) -> dict[str, object]:
    """A row whose picture is noise, of 360 kB or of 40 kB: far more than its words."""
    width, height = SIZES[number % len(SIZES)]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return prepared_row(number, data=file.getvalue(), size=(width, height), **changed)


def write_noise(folder: Path, train: int = 22, validation: int = 4) -> Path:
    """A published folder with pictures of noise, in small shards and smaller row groups."""
    write_prepared(folder, [])
    for split, numbers in (
        ("train", range(train)),
        ("validation", range(100, 100 + validation)),
    ):
        writer = ShardWriter(folder / "data", split, 3)
        writer.group_bytes = 1_000_000  # about four pictures
        for number in numbers:
            writer.add(noise_row(number))
        writer.close()
    return folder


def put(hub: HubServer, folder: Path, message: str = "publish") -> str:
    """Commit a folder as it is; returns the commit."""
    files = {
        file.relative_to(folder).as_posix(): Entry(file.read_bytes(), file.suffix in LARGE)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    repository = hub.repositories.setdefault(REPO, Repository(private=True))
    return repository.commit(message, files)


@contextmanager
def streaming_hub(cache: Path) -> Iterator[HubServer]:
    """A Hub for this process and those it starts; the library reads its options at import.

    Args:
        cache: empty; what is fetched goes there.
    """
    import datasets

    with pytest.MonkeyPatch.context() as patch, HubServer() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{")
        for name, value in (
            ("ENDPOINT", server.url),
            ("HUGGINGFACE_CO_URL_TEMPLATE", server.url + "".join(template[1:])),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
            ("HF_HUB_CACHE", str(cache / "hub")),
            ("HF_TOKEN_PATH", str(cache / "no token")),
        ):
            patch.setattr(constants, name, value)
        for name, text in (
            ("HF_ENDPOINT", server.url),
            ("HF_TOKEN", TOKEN),
            ("HF_HUB_OFFLINE", "0"),
            ("HF_HUB_DISABLE_XET", "1"),
        ):
            patch.setenv(name, text)
        assert os.environ["HF_TOKEN"] == TOKEN
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
        patch.setattr(hub_files, "WAITS_S", (0.0,) * 4)
        patch.setattr(hub_files, "time", SimpleNamespace(sleep=lambda seconds: None))
        patch.setattr(hub_shards, "LEAVE_FREE_BYTES", 0)
        yield server


def num_fetched(hub: HubServer) -> int:
    """Bytes of shards that were sent."""
    return sum(end - start for path, start, end in hub.ranges if path.endswith(".parquet"))
