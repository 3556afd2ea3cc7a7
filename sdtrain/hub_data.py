"""Data sets that the `datasets` library opens: prepared ones, and any with pictures and text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sdprep.console import progress, talk
from sdprep.errors import DataError
from sdprep.images import ImageRejected, open_image
from sdprep.schema import MANIFEST, read_manifest
from sdprep.seeding import digest
from sdtrain.dataset import Splits
from sdtrain.hub_columns import NO_TEXT, columns_of
from sdtrain.ids import Ids
from sdtrain.repeats import whole_repeats
from sdtrain.text_columns import RECORD_COLUMNS, canonical, digest_sum, total

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

    from sdtrain.recipe import DataSection

VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
_SCAN_ROWS = 64
_DIGEST_ROWS = 65_536


class HubRows:
    """One split of a `datasets` data set.

    Args:
        dataset: with `image_column` not decoded.
        text: the columns that prompts are made of, as Arrow.
        image_column: a struct of bytes and path.
        caption_column: None for prepared sets, whose rows are records as they are.
    """

    def __init__(self, dataset: Dataset, image_column: str, caption_column: str | None) -> None:
        self._image_column, self._caption_column = image_column, caption_column
        self._pictures = dataset.select_columns([image_column])
        names = [caption_column] if caption_column else _record_columns(dataset)
        self._text = dataset.select_columns(names).with_format("arrow")
        has_boxes = caption_column is None and "boxes" in dataset.features
        self._boxes = dataset.select_columns(["boxes"]).with_format("arrow") if has_boxes else None
        has_source = caption_column is None and "source" in dataset.features
        self._source = dataset.select_columns(["source"]) if has_source else None
        self.ids = Ids([])
        self.repeats = np.ones(len(dataset), np.int64)
        self.sizes_hw = np.zeros((len(dataset), 2), np.int64)
        self.refused: dict[int, str] = {}
        self._digests: np.ndarray | None = None  # (n, 16) uint8, zeros where not known yet

    def __len__(self) -> int:
        return len(self._text)

    def digest_sum(self) -> np.ndarray:
        """Of the texts, ids and sizes, whatever their order."""
        return total(self._digest_sums())

    def _digest_sums(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), _DIGEST_ROWS):
            end = min(start + _DIGEST_ROWS, len(self))
            table = self._text[start:end]
            for name, column in (
                ("id", self.ids[start:end]),
                ("height", self.sizes_hw[start:end, 0]),
                ("width", self.sizes_hw[start:end, 1]),
            ):
                if name in table.column_names:
                    table = table.drop_columns([name])
                table = table.append_column(name, pa.array(column))
            yield digest_sum(canonical(table) if self._caption_column is None else table)

    def records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Prepared columns by name; of other sets `id`, `caption` and `captions`."""
        found = self._text[list(rows)].to_pylist() if len(rows) else []
        if self._caption_column is None:
            return found
        texts = (record[self._caption_column] for record in found)
        return [_record(self.ids[row], text) for row, text in zip(rows, texts, strict=True)]

    def boxes(self, rows: Sequence[int]) -> list[list[dict[str, Any]]]:
        """What detectors found on some rows of a prepared set; other sets have none."""
        if self._boxes is None or not len(rows):
            return [[] for _ in rows]
        return [boxes or [] for boxes in self._boxes[list(rows)]["boxes"].to_pylist()]

    def sources(self, rows: Sequence[int]) -> list[str | None]:
        """The source of some rows of a prepared set; other sets do not say."""
        if self._source is None or not len(rows):
            return [None] * len(rows)
        return list(self._source[list(rows)]["source"])

    def image(self, row: int) -> Image.Image:
        """The upright RGB picture of one row."""
        try:
            return open_image(self.source(row), first_frame=True).image
        except ImageRejected as error:
            raise DataError(f"row {row} ({self.ids[row]}) does not decode: {error}") from error

    def source_digest(self, row: int) -> str:
        """Digest of the file of one row; ids of prepared sets are those of the unstripped files."""
        if self._caption_column is not None:
            return self.ids[row].split("#")[0]  # made on opening
        if self._digests is None:
            self._digests = np.zeros((len(self), 16), np.uint8)
        if not self._digests[row].any():
            source = self.source(row)
            data = source if isinstance(source, bytes) else _bytes_of(source)
            self._digests[row] = np.frombuffer(bytes.fromhex(_digest(data)), np.uint8)
        return self._digests[row].tobytes().hex()

    def source(self, row: int) -> bytes | Path:
        """The file of one row as it is stored."""
        return _source(self._pictures[row][self._image_column])


def _record(id_: str, text: Any) -> dict[str, Any]:
    captions = [text] if isinstance(text, str) else [t for t in text or [] if isinstance(t, str)]
    captions = [caption for caption in captions if caption.strip()]
    return {
        "id": id_,
        "caption": captions[0] if captions else None,
        "captions": [{"text": caption, "source": "data set"} for caption in captions],
        "tags": [],
    }


def _record_columns(dataset: Dataset) -> list[str]:
    return [name for name in RECORD_COLUMNS if name in dataset.features]


def _source(cell: Any) -> bytes | Path:
    if cell is None:
        raise ImageRejected("missing_file", "the row has no picture")
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    return Path(cell["path"] or "")


# --- opening ------------------------------------------------------------------------------------


def manifest(section: DataSection) -> dict[str, Any] | None:
    """`sdprep.json` of a published data set; None if this is none.

    Raises:
        DataError: no such data set, or one of a schema version that this release does not know.
    """
    folder = Path(section.path)
    if folder.exists():
        file = folder / MANIFEST
        if not file.is_file():
            return None
    else:
        found = _from_hub(section)
        if found is None:
            return None
        file = Path(found)
    return read_manifest(file)


def _from_hub(section: DataSection) -> str | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
    from huggingface_hub.errors import LocalEntryNotFoundError as NotAtHand

    try:
        found = hf_hub_download(
            section.path, MANIFEST, repo_type="dataset", revision=section.revision
        )
        return str(found)
    except NotAtHand:
        raise _missing(section.path, "no such folder, and the Hub cannot be reached") from None
    except EntryNotFoundError:
        return None
    except HFValidationError:
        raise _missing(section.path, "no such folder, and no Hub id either") from None
    except HfHubHTTPError as error:
        raise _missing(section.path, f"no such folder, and the Hub says: {error}") from None


def _missing(path: str, why: str) -> DataError:
    return DataError(
        f"data.path = {path!r}: {why}",
        "Give a prepared folder, a .lance table, or the id of a data set on the Hub.",
    )


def open_splits(section: DataSection, *, is_published: bool, needs_text: bool = True) -> Splits:
    """Open the splits of a data set.

    Args:
        section: the recipe's.
        is_published: whether its rows are as `sdprep publish` writes them.
        needs_text: whether a set that is not published must have a column of texts.

    Raises:
        DataError: it cannot be read, or its columns cannot be told apart.
    """
    loaded = _load(section)
    if "train" not in loaded:
        raise DataError(
            f"{section.path} has no split called train; there are: {', '.join(loaded) or 'none'}"
        )
    names = ["train", *[name for name in VALIDATION_SPLITS if name in loaded][:1]]
    notes: list[str] = []
    if is_published:
        columns: tuple[str, str | None] = ("image", None)
        _require_prepared(loaded["train"], section.path)
    else:
        columns = columns_of(loaded["train"], section, notes, needs_text)
        if columns[1] == NO_TEXT:
            loaded = {name: s.add_column(NO_TEXT, [""] * len(s)) for name, s in loaded.items()}
        ignored = [name for name in loaded if name not in names]
        if ignored:
            notes.append(f"splits not used: {', '.join(ignored)}")
    rows = [_open_split(loaded[name], name, columns, notes, needs_text) for name in names]
    is_here = Path(section.path).exists()  # a revision then says nothing about it
    revision = None if is_here else section.revision or _revision(loaded["train"])
    return Splits(rows[0], rows[1] if len(rows) > 1 else None, revision, notes)


def _load(section: DataSection) -> dict[str, Dataset]:
    from datasets import Dataset, DatasetDict, disable_progress_bars, load_dataset, load_from_disk

    if not talk.is_terminal:
        disable_progress_bars()
    path = Path(section.path)
    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    try:
        if is_saved:
            loaded = load_from_disk(str(path))
        else:
            loaded = load_dataset(
                section.path, revision=section.revision, cache_dir=_cache_folder(path)
            )
    except Exception as error:  # the library raises its own, the Hub's, pyarrow's and more
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{section.path} cannot be opened as a data set: {reason[0]}") from error
    if isinstance(loaded, Dataset):
        return {"train": loaded}
    assert isinstance(loaded, DatasetDict)
    return {str(name): split for name, split in loaded.items()}


def _cache_folder(path: Path) -> str | None:
    """A cache of its own for each state of a local folder; None: the library's, for Hub ids.

    The library's key of a folder is its last name and the file patterns in its card, so a set that
    was published again, or another of the same name elsewhere, would be answered with old rows.
    """
    if not path.is_dir():
        return None
    from datasets import config

    stats = [(file, file.stat()) for file in sorted(path.rglob("*")) if file.is_file()]
    state = [f"{file.relative_to(path)} {s.st_size} {s.st_mtime_ns}" for file, s in stats]
    key = digest("data set folder", path.resolve(), *state)
    return str(Path(config.HF_DATASETS_CACHE) / "sdtrain" / key)


def _revision(dataset: Dataset) -> str | None:
    """The commit of a Hub data set, which `datasets` leaves in the origin of its files."""
    checksums = getattr(dataset.info, "download_checksums", None) or {}
    for url in sorted(checksums):
        if url.startswith("hf://") and "@" in url:
            return str(url).split("@")[1].split("/")[0]
    return None


def _require_prepared(dataset: Dataset, path: str) -> None:
    missing = [name for name in ("id", "image", "width", "height") if name not in dataset.features]
    if missing:
        raise DataError(
            f"{path} has {MANIFEST} but no column {missing[0]}; found: "
            f"{', '.join(dataset.column_names)}",
            "Publish the data set again with sdprep.",
        )


def _open_split(
    dataset: Dataset,
    name: str,
    columns: tuple[str, str | None],
    notes: list[str],
    needs_text: bool,
) -> HubRows:
    from datasets import Image as ImageFeature

    image, caption = columns
    dataset = dataset.cast_column(image, ImageFeature(decode=False))
    rows = HubRows(dataset, image, caption)
    if caption is None:
        small = dataset.select_columns(["id", "width", "height"]).with_format("arrow")[:]
        rows.ids = Ids.of(small["id"].to_pylist())
        rows.sizes_hw = np.stack([small["height"].to_numpy(), small["width"].to_numpy()], 1)
        _require_unique(rows.ids, name)
        if "repeats" in dataset.features:
            asked = dataset.select_columns(["repeats"]).with_format("arrow")[:]
            rows.repeats = whole_repeats(asked, rows.ids, f"split {name}")
    else:
        _scan(rows, name)
        silent = sum(record["caption"] is None for record in rows.records(range(len(rows))))
        if silent and needs_text:
            notes.append(f"{silent} of {len(rows)} rows of {name} have no text: empty prompt")
    return rows


def _require_unique(ids: Ids, split: str) -> None:
    twice = ids.first_twice()
    if twice is not None:
        raise DataError(f"split {split} has the id {twice} twice", "Ids must name one row each.")


def _scan(rows: HubRows, split: str) -> None:
    """Read every picture once: its id (a digest of the file), its size, whether it decodes."""
    counts: dict[str, int] = {}
    ids = []
    with progress(f"looking at {split}", len(rows)) as bar, ThreadPoolExecutor() as pool:
        for row, (id_, size_hw, reason) in enumerate(_looked_at(rows, pool)):
            counts[id_] = counts.get(id_, 0) + 1
            # The same file twice is two rows; the second needs an id of its own.
            ids.append(id_ if counts[id_] == 1 else f"{id_}#{counts[id_]}")
            rows.sizes_hw[row] = size_hw
            if reason is not None:
                rows.refused[row] = f"{reason} (row {row} of {split})"
            bar.advance()
    rows.ids = Ids.of(ids)


def _looked_at(rows: HubRows, pool: ThreadPoolExecutor) -> Iterator[Any]:
    for start in range(0, len(rows), _SCAN_ROWS):
        span = range(start, min(start + _SCAN_ROWS, len(rows)))
        yield from pool.map(lambda row: _look_at(rows, row), span)


def _look_at(rows: HubRows, row: int) -> tuple[str, tuple[int, int], str | None]:
    data = b""
    try:
        source = rows.source(row)
        data = source if isinstance(source, bytes) else _bytes_of(source)
        info = open_image(data).info
    except ImageRejected as error:
        return _digest(data or f"row {row}".encode()), (0, 0), str(error)
    return _digest(data), (info.height, info.width), None


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageRejected("missing_file", f"{path}: {error.strerror}") from error


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()
