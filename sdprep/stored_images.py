"""From a row to the bytes of its file, embedded or linked, and from ids to rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdprep.errors import DataError

if TYPE_CHECKING:
    import lance


def original_bytes(row: Mapping[str, Any]) -> bytes:
    """The file's bytes of one row (`id`, `image`, `image_uri`, `sources`), embedded or linked.

    Raises:
        DataError: the image is rejected, or its linked file is gone or has changed.
    """
    if row["image"] is not None:
        return row["image"]
    if row["image_uri"] is None:
        raise DataError(f"image {row['id']} was rejected at ingest; it has no pixels")
    path = Path(row["image_uri"])
    try:
        stat = path.stat()
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"image {row['id']}: linked file {path}: {error.strerror}") from None
    known = [(source["num_bytes"], source["mtime_ns"]) for source in row["sources"]]
    if (stat.st_size, stat.st_mtime_ns) not in known:
        raise DataError(
            f"image {row['id']}: linked file {path} has changed since it was ingested",
            "Run sdprep ingest again.",
        )
    return data


class StoredOrder:
    """Where the images of one version are stored.

    Half an id is kept, so that the index of 12 million images fits into 200 MB.
    """

    def __init__(self, dataset: lance.LanceDataset) -> None:
        self.version = dataset.version
        stored = dataset.to_table(columns=["id"])["id"]
        keys = np.fromiter((_half(id_.as_py()) for id_ in stored), np.uint64, len(stored))
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def image_bytes(self, dataset: lance.LanceDataset, ids: Sequence[str]) -> dict[str, bytes]:
        """Original bytes of some images.

        Raises:
            DataError: an id is unknown or rejected, or a linked file is gone or has changed.
        """
        wanted = np.fromiter((_half(id_) for id_ in ids), np.uint64, len(ids))
        at = np.searchsorted(self._keys, wanted)
        at[at == len(self._keys)] = 0
        is_there = self._keys[at] == wanted if len(self._keys) else np.zeros(len(ids), bool)
        places = sorted(set(self._order[at[is_there]].tolist())) if len(self._keys) else []
        columns = ["id", "image", "image_uri", "sources"]
        rows = dataset.take(places, columns=columns).to_pylist() if places else []
        found = {row["id"]: row for row in rows}
        for id_ in ids:
            if id_ not in found:
                raise DataError(f"{dataset.uri} has no image {id_}")
        return {id_: original_bytes(found[id_]) for id_ in ids}


def _half(id_: str) -> int:
    """The first 64 bits of an id; 0 for what is none."""
    try:
        return int(id_[:16], 16)
    except ValueError:
        return 0
