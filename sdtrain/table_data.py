"""Train on a table under curation as it stands, without a second copy of the pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdprep.errors import DataError
from sdprep.images import ImageRejected, open_image
from sdtrain.dataset import Splits
from sdtrain.ids import Ids
from sdtrain.repeats import whole_repeats
from sdtrain.text_columns import digest_sum, total

if TYPE_CHECKING:
    from PIL import Image

    from sdprep.prompt_policy import PromptPolicy
    from sdprep.table import PhotoTable

_DIGEST_ROWS = 65_536
BOXES = ".boxes"
"""How the columns end that hold the list of one detector."""


def is_curated(path: Path) -> bool:
    """Whether a .lance folder is a table of sdprep, not one split of a published data set."""
    import lance

    metadata = lance.dataset(str(path)).schema.metadata or {}
    return "schema_version" in json.loads(metadata.get(b"sdprep", b"{}"))


class TableRows:
    """One split of a curated table.

    Args:
        path: the table; reopened in every process that reads pictures.
        rows: id, width, height, image_uri, the columns that prompts are made of, and perhaps
            `boxes_*.boxes`.
    """

    def __init__(self, path: Path, rows: pa.Table) -> None:
        self._path = path
        boxes = [name for name in rows.column_names if name.endswith(BOXES)]
        self._is_linked = np.array(rows["image_uri"].is_valid())
        self._boxes, self._text = rows.select(boxes), rows.drop_columns([*boxes, "image_uri"])
        self._table: PhotoTable | None = None
        self.ids = Ids(rows["id"].chunks)
        self.repeats = _repeats(rows, self.ids, path)
        self.sizes_hw = np.stack([rows["height"].to_numpy(), rows["width"].to_numpy()], 1)
        self.sizes_hw = self.sizes_hw.astype(np.int64)
        self.refused: dict[int, str] = {}

    def __len__(self) -> int:
        return self._text.num_rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}  # an open table does not travel

    def digest_sum(self) -> np.ndarray:
        """Of the texts, ids and sizes, whatever their order."""
        batches = self._text.to_batches(max_chunksize=_DIGEST_ROWS)
        return total(digest_sum(batch) for batch in batches)

    def records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The composed columns of some rows, as they would be published."""
        from sdprep.prompt_rows import prompt_row

        found = self._text.take(list(rows)).to_pylist() if len(rows) else []
        return [prompt_row(row, row.get("score")) for row in found]

    def boxes(self, rows: Sequence[int]) -> list[list[dict[str, Any]]]:
        """What all detectors found on some rows, one after the other."""
        if not len(rows) or not self._boxes.num_columns:
            return [[] for _ in rows]
        found = self._boxes.take(list(rows)).to_pylist()
        return [[box for boxes in row.values() for box in boxes or []] for row in found]

    def image(self, row: int) -> Image.Image:
        """The upright RGB picture of one row."""
        id_ = self.ids[row]
        try:
            return open_image(self._bytes(id_), first_frame=True).image
        except ImageRejected as error:
            raise DataError(f"{self._path}: image {id_} does not decode: {error}") from error

    def source_digest(self, row: int) -> str:
        """The id, which is a digest of the file.

        Raises:
            DataError: the file is linked, and gone or changed.
        """
        if self._is_linked[row]:
            self._bytes(self.ids[row])  # refuses what changed, as decoding would
            self._is_linked[row] = False  # once in each process
        return self.ids[row]

    def _bytes(self, id_: str) -> bytes:
        return self._opened().image_bytes([id_])[id_]

    def sources(self, rows: Sequence[int]) -> list[str | None]:
        """The first source of some rows, named as publishing names it."""
        from sdprep.prepared_rows import source_name

        if not len(rows):
            return []
        ids = ", ".join(f"'{self.ids[row]}'" for row in rows)  # hex, so nothing needs quoting
        found = self._opened().read(["id", "sources"], f"id IN ({ids})")
        names = {each["id"]: source_name(each["sources"]) for each in found.to_pylist()}
        return [names.get(self.ids[row]) for row in rows]

    def _opened(self) -> PhotoTable:
        from sdprep.table import PhotoTable

        if self._table is None:
            self._table = PhotoTable.open(self._path)
        return self._table


def open_table(path: Path, *, with_boxes: bool = False, needs_split: bool = True) -> Splits:
    """Open the kept rows of a table, by its own split; with the boxes of detectors if asked.

    Raises:
        DataError: there is no such table, or it has no split and needs one.
    """
    from sdprep.prepared_rows import score_column
    from sdprep.table import PhotoTable

    table = PhotoTable.open(path)
    score = score_column(table, None)
    also = [
        name for name in ("caption", "captions", "tags", "split", "group_id") if table.has(name)
    ]
    ranks = [f"{score}.score"] if score else []
    boxes = _box_columns(table) if with_boxes else []
    rows = table.kept(["id", "width", "height", "image_uri", "text", *also, *boxes, *ranks])
    if score:
        rows = rows.rename_columns([*rows.column_names[:-1], "score"])
    notes = [f"table version {table.version}; rejected rows stay out; score: {score or 'none'}"]
    policy = _policy(table, rows)
    validation = None
    if "split" in also:
        is_validation = pc.fill_null(pc.equal(rows["split"], "validation"), False)
        validation = _split(path, rows.filter(is_validation))
        rows = rows.filter(pc.invert(is_validation))
    elif needs_split:
        raise DataError(
            f"{path} has no split: nothing says which images are held out for validation",
            f"Run: sdprep split {path} --validation 0.05. Or train on all of it: "
            'data.splits = "all".',
        )
    else:
        notes.append("the table has no split: all of it is taken")
    train = _split(path, rows)
    if train is None:
        raise DataError(f"{path} has no kept image to train on", "See: sdprep status TABLE")
    return Splits(train, validation, str(table.version), notes, policy)


def _policy(table: PhotoTable, rows: pa.Table) -> PromptPolicy | None:
    """The policy of the recipe that was last run on the table, as it would be published."""
    from sdprep.prompt_rows import spellings
    from sdprep.table_policy import policy_of

    policy = policy_of(table)
    known = spellings(table) if policy is not None else None
    if policy is None or known is None:
        return policy
    lists = [rows["tags"]] if "tags" in rows.column_names else []
    silent = rows.filter(pc.is_null(rows["tags"])) if lists else rows
    texts = silent["text"].combine_chunks()
    if pa.types.is_struct(texts.type) and texts.type.get_field_index("tags") >= 0:
        lists.append(pc.struct_field(texts, "tags"))  # what came with the image stands in
    names = [pc.struct_field(pc.list_flatten(tags), "name").unique() for tags in lists]
    return policy.with_aliases(known, (name for some in names for name in some.to_pylist()))


def _repeats(rows: pa.Table, ids: Ids, path: Path) -> np.ndarray:
    """What the text beside the images asks for."""
    texts = rows["text"].combine_chunks()
    if not pa.types.is_struct(texts.type) or texts.type.get_field_index("repeats") < 0:
        return np.ones(rows.num_rows, np.int64)
    asked = pc.struct_field(texts, "repeats")
    return whole_repeats(pa.table({"repeats": asked}), ids, str(path))


def _box_columns(table: PhotoTable) -> list[str]:
    detected = [field for field in table.schema if field.name.startswith("boxes_")]
    fields = [f.name for f in detected if f.type.get_field_index("boxes") >= 0]
    return [f"{name}{BOXES}" for name in fields]


def _split(path: Path, rows: pa.Table) -> TableRows | None:
    if not rows.num_rows:
        return None
    found = TableRows(path, rows)
    if "split" in rows.column_names:
        for row in np.flatnonzero(rows["split"].is_null().to_numpy()).tolist():
            found.refused[row] = f"no_split: {found.ids[row]} came after the last sdprep split"
    scores = rows["score"].to_pylist() if "score" in rows.column_names else []
    for row, rank in enumerate(scores):
        if rank is not None and rank < 1:  # publishing leaves these out as well
            found.refused[row] = f"score_zero: {found.ids[row]} has score {rank}"
    return found
