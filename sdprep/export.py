"""Export: the images and their text, in a folder laid out for another trainer.

Images leave as they do when published, without private metadata; where that changes nothing, the
file is byte for byte the one that came in, and reading the export back finds the same id.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdprep.console import progress, say, warn
from sdprep.errors import DataError
from sdprep.exif import orientation_of
from sdprep.export_item import ExportConfig, Exporter, SplitWriter, item_of
from sdprep.file_names import Stems
from sdprep.images import open_image
from sdprep.prepared_rows import Losses, check_rows, score_column, split_of, stripped_rows
from sdprep.schema import SPLITS
from sdprep.strip import image_extension
from sdprep.table import PhotoTable
from sdprep.target_folder import check_disk, files_there, mend, scratch_beside, swap

MANIFEST = "sdprep-export.json"


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Args:
        path: the folder.
        format: of it.
        train: images.
        validation: images.
        left_out: reason -> kept images of the table that could not be exported.
        repacked: images stored as upright RGB in PNG, because readers of the layout do not know
            their format or do not turn them.
        without_text: images that have neither tags nor caption.
    """

    path: Path
    format: str
    train: int
    validation: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    repacked: int = 0
    without_text: int = 0

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        written = {"written": self.train + self.validation}
        return {**written, **self.__dict__, "path": str(self.path), "left_out": dict(self.left_out)}


def export(table: PhotoTable, to: Path, config: ExportConfig) -> ExportReport:
    """Write the kept images of a table into a folder, `train` and `validation` below it.

    The same table gives the same bytes. The folder is replaced as a whole; files in it that are
    not ours, such as a trainer's caches, stay.

    Args:
        table: only read.
        to: missing, empty, or an earlier export of ours.
        config: the `Config` of a layout in `sdprep.exports`.

    Raises:
        DataError: nothing to export, images without split, disk too small, folder not ours.
        UserError: the score named is not in the table.
    """
    to = Path(to).resolve()
    mend(to)
    there = files_there(table, to, MANIFEST)
    earlier = {MANIFEST, *_files_of(to)} if there else set()
    check_rows(table)
    check_disk(table, to)
    with scratch_beside(to) as scratch:
        losses, report = _write(table, to, scratch, config)
        if losses.left_out:
            warn(f"left out of the export: {losses.said()}")
        if not report.train + report.validation:
            raise DataError(f"nothing of {table.path} can be exported", losses.said())
        (scratch / MANIFEST).write_text(_manifest(report, config, scratch), "utf-8", newline="\n")
        swap(scratch, to, [Path(name) for name in there if name not in earlier])
    if report.repacked:
        say(f"{report.repacked} images are stored as upright PNG: {report.format} readers need it")
    if report.without_text:
        warn(f"{report.without_text} images have neither tags nor caption")
    return report


def _write(
    table: PhotoTable, to: Path, scratch: Path, config: ExportConfig
) -> tuple[Losses, ExportReport]:
    exporter, stems, losses = config.build(), Stems(by_key=config.names == "key"), Losses()  # type: ignore[attr-defined]
    score = score_column(table, config.score)
    written, repacked, without_text = dict.fromkeys(SPLITS, 0), 0, 0
    with ExitStack() as stack:
        bar = stack.enter_context(progress("exporting", table.count(table.kept_predicate())))
        writers: dict[str, SplitWriter] = {}
        for found, row in stripped_rows(table, score, config.license, losses):
            split = split_of(found)
            try:
                image, extension, is_repacked = _image(row["image"]["bytes"], exporter)
            except DataError as error:
                losses.leave_out("not_decodable", f"image {row['id']}: {error.message}")
                continue
            sources = found["sources"] or [{"key": None}]
            item = item_of(
                found,
                row,
                split=split,
                stem=stems.take(row["id"], sources[0]["key"]),
                image=image,
                extension=extension,
                style=config.tag_style,
            )
            if split not in writers:
                (scratch / split).mkdir()
                writer = exporter.writer(scratch / split)
                writers[split] = stack.enter_context(closing(writer))
            writers[split].add(item)
            written[split] += 1
            repacked += is_repacked
            without_text += not item.text
            bar.advance()
    left_out = dict(sorted(losses.left_out.items()))
    name = config.type  # type: ignore[attr-defined]
    train, validation = (written[split] for split in SPLITS)
    return losses, ExportReport(to, name, train, validation, left_out, repacked, without_text)


def _image(data: bytes, exporter: Exporter) -> tuple[bytes, str, bool]:
    """The file to write, its extension, and whether it had to become another one."""
    extension = image_extension(data)
    is_known = exporter.extensions is None or extension in exporter.extensions
    if is_known and (exporter.reads_orientation or orientation_of(data) == 1):
        return data, extension, False
    packed = io.BytesIO()  # the picture as every stage and our own trainer see it
    open_image(data, first_frame=True).image.save(packed, "PNG")
    return packed.getvalue(), "png", True


def _files_of(folder: Path) -> list[str]:
    """Files of an earlier export, as its manifest lists them."""
    try:
        return list(json.loads((folder / MANIFEST).read_text("utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{folder / MANIFEST} is damaged, so what in the folder is ours is not known",
            "Choose another folder, or empty this one yourself.",
        ) from None


def _manifest(report: ExportReport, config: ExportConfig, scratch: Path) -> str:
    files = sorted(
        path.relative_to(scratch).as_posix() for path in scratch.rglob("*") if path.is_file()
    )
    facts = {key: value for key, value in report.to_json().items() if key != "path"}
    content = {**facts, "options": json.loads(config.model_dump_json()), "files": files}
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
