"""Rows that are no data set: pictures at hand, and a folder of them with texts beside."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from sdprep.console import warn
from sdprep.errors import DataError
from sdprep.images import ImageRejected, open_image
from sdprep.schema import MANIFEST
from sdprep.seeding import digest
from sdtrain.ids import Ids
from sdtrain.text_columns import digest_sum, total

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl")
TEXTS = (".caption", ".txt")
_OF_A_DATA_SET = (
    *(MANIFEST, "dataset_dict.json", "state.json", "_versions"),
    *("metadata.jsonl", "metadata.csv", "metadata.parquet"),
)
_DATA_FILES = (".parquet", ".arrow", ".tar")


class PictureRows:
    """Pictures in memory, each with a prompt that is also its only tag. See `Rows`.

    Args:
        pictures: upright RGB.
        prompts: one each.
    """

    def __init__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> None:
        self._pictures, self._prompts = list(pictures), list(prompts)
        found: dict[str, int] = {}
        ids: list[str] = []
        for picture, prompt in zip(pictures, prompts, strict=True):
            id_ = digest("picture", picture.size, picture.tobytes().hex(), prompt)
            found[id_] = found.get(id_, 0) + 1
            ids.append(id_ if found[id_] == 1 else f"{id_}#{found[id_]}")
        self.ids = Ids.of(ids)
        self.sizes_hw = np.array([(p.height, p.width) for p in pictures], np.int64).reshape(-1, 2)
        self.refused: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def repeats(self) -> np.ndarray:
        """Once each; such rows are not trained on."""
        return np.ones(len(self), np.int64)

    def digest_sum(self) -> np.ndarray:
        """Of the ids and texts."""
        return total([digest_sum(pa.Table.from_pylist(self.records(range(len(self)))))])

    def records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The prompts as captions and tags."""
        return [
            {
                "id": self.ids[row],
                "caption": self._prompts[row],
                "captions": [{"text": self._prompts[row], "source": "prompt"}],
                "tags": [{"name": self._prompts[row]}],
            }
            for row in rows
        ]

    def boxes(self, rows: Sequence[int]) -> list[list[dict[str, Any]]]:
        """None."""
        return [[] for _ in rows]

    def sources(self, rows: Sequence[int]) -> list[str | None]:
        """Not known."""
        return [None] * len(rows)

    def image(self, row: int) -> Image.Image:
        """The picture."""
        return self._pictures[row]

    def source_digest(self, row: int) -> str:
        """The id: there is no file."""
        return self.ids[row]


class FolderRows:
    """Image files of a folder. See `Rows`.

    Args:
        root: the folder; files of its subfolders have the subfolder's name as their source.
        files: sorted.
        texts: one each.
    """

    def __init__(self, root: Path, files: Sequence[Path], texts: Sequence[str]) -> None:
        self._root, self._files, self._texts = root, list(files), list(texts)
        self.sizes_hw = np.zeros((len(files), 2), np.int64)
        self.refused: dict[int, str] = {}
        ids: list[str] = []
        for row, file in enumerate(files):
            ids.append(self._look_at(row, file, ids))
        self.ids = Ids.of(ids)

    def _look_at(self, row: int, file: Path, before: Sequence[str]) -> str:
        data = b""
        try:
            data = file.read_bytes()
            info = open_image(data).info
            self.sizes_hw[row] = info.height, info.width
        except (ImageRejected, OSError) as error:
            self.refused[row] = f"{error} ({file.name})"
        id_ = blake2b(data or str(file).encode(), digest_size=16).hexdigest()
        if id_ in before:
            self.refused[row] = f"same_bytes: {file.name} is there under another name"
            id_ = f"{id_}#{row}"
        return id_

    def __len__(self) -> int:
        return len(self._files)

    @property
    def repeats(self) -> np.ndarray:
        """Once each; such rows are not trained on."""
        return np.ones(len(self), np.int64)

    def digest_sum(self) -> np.ndarray:
        """Of the ids and texts."""
        return total([digest_sum(pa.Table.from_pylist(self.records(range(len(self)))))])

    def records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The texts as captions."""
        return [
            {
                "id": self.ids[row],
                "caption": self._texts[row],
                "captions": [{"text": self._texts[row], "source": "file"}],
                "tags": [],
            }
            for row in rows
        ]

    def boxes(self, rows: Sequence[int]) -> list[list[dict[str, Any]]]:
        """None."""
        return [[] for _ in rows]

    def sources(self, rows: Sequence[int]) -> list[str | None]:
        """The subfolder of each file; None at the top."""
        parents = [self._files[row].parent.relative_to(self._root).as_posix() for row in rows]
        return [None if parent == "." else parent for parent in parents]

    def source_digest(self, row: int) -> str:
        """Digest of the file as it was when the folder was opened."""
        return self.ids[row].split("#")[0]

    def image(self, row: int) -> Image.Image:
        """The upright RGB picture of one file."""
        try:
            return open_image(self._files[row].read_bytes(), first_frame=True).image
        except (ImageRejected, OSError) as error:
            raise DataError(f"{self._files[row]} does not decode: {error}") from error


def is_picture_folder(path: Path) -> bool:
    """Whether a path is a folder of image files and nothing that a data set is made of."""
    if not path.is_dir() or any((path / name).exists() for name in _OF_A_DATA_SET):
        return False
    found = [file.suffix.lower() for file in path.rglob("*") if file.is_file()]
    has_data = any(ending in _DATA_FILES for ending in found)
    return not has_data and any(ending in ENDINGS for ending in found)


def read_folder(path: Path) -> FolderRows:
    """All images below a folder, each with the text of its `.caption` or `.txt` file."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in ENDINGS)
    texts = [_text(file) for file in files]
    silent = sum(not text for text in texts)
    if silent:
        warn(f"{silent} of {len(files)} images of {path} have no text beside them: empty prompt")
    return FolderRows(path, files, texts)


def _text(image: Path) -> str:
    for ending in TEXTS:
        file = image.with_suffix(ending)
        if file.is_file():
            return file.read_text(encoding="utf-8-sig", errors="replace").strip()
    return ""
