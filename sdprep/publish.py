"""Publish: from the table under curation to a prepared data set in a folder.

Everything is written into a scratch folder beside the target, which then takes its place; so a
reader sees the old data set or the new one, never half of one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow.compute as pc
from pydantic import Field

from sdprep.card import write_card
from sdprep.card_facts import Facts, hide_paths
from sdprep.console import progress, say, warn
from sdprep.errors import DataError, UserError
from sdprep.prepared_files import LanceWriter, RowWriter, ShardWriter, features
from sdprep.prepared_rows import Losses, PromptOf, prepared_rows, score_column
from sdprep.recipe import Section
from sdprep.schema import MANIFEST, SCHEMA_VERSION, SPLITS, read_manifest
from sdprep.table import PhotoTable

if TYPE_CHECKING:
    from sdprep.prompt_policy import PromptPolicy

ANNOTATORS = ("score_", "tags_", "boxes_", "caption_", "embed_")
SPARE_BYTES = 64_000_000
_LANCE = tuple(f"{split}.lance/" for split in SPLITS)


class PublishConfig(Section):
    """How the prepared data set is written."""

    to: Path | None = Field(None, description="Folder of the data set; made, or replaced if ours.")
    format: Literal["parquet", "lance"] = Field(
        "parquet", description="parquet for the Hub and everyone; lance for fast random reads."
    )
    score: str | None = Field(
        None,
        min_length=1,
        description="Scorer whose score is published; else preference, aesthetic, technical, "
        "the first there is.",
    )
    title: str | None = Field(
        None, min_length=1, description="Heading of the card; without it, the folder's name."
    )
    license: str | None = Field(
        None,
        min_length=1,
        description="Licence of images that bring none, such as cc-by-4.0.",
    )
    shard_megabytes: int = Field(
        500, ge=1, le=2000, description="Largest Parquet file, in millions of bytes."
    )
    seed: int | None = Field(
        None, ge=0, description="Seed of the validation prompts; None takes the recipe's, or 0."
    )


@dataclass(frozen=True)
class PublishReport:
    """What was published.

    Args:
        path: the folder.
        repo: name on the Hub, None for a folder only.
        revision: commit on the Hub, None for a folder only.
        train: rows.
        validation: rows.
        left_out: reason -> rows of the table's kept images that could not be published.
        repacked: files stored as PNG, because their format has no lossless way.
    """

    path: Path
    repo: str | None
    revision: str | None
    train: int
    validation: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    repacked: int = 0

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {**self.__dict__, "path": str(self.path), "left_out": dict(self.left_out)}


def publish(
    table: PhotoTable,
    to: Path | None = None,
    *,
    config: PublishConfig | None = None,
    policy: PromptPolicy | None = None,
    spellings: Mapping[str, Iterable[str]] | None = None,
    recipe_text: str | None = None,
) -> PublishReport:
    """Write the prepared data set of a table into a folder.

    The same table gives the same bytes (Parquet); a grown table leaves full shards as they are.

    Args:
        table: only read.
        to: the folder; missing, empty, or an earlier data set of ours, which is replaced. None
            takes it from the config.
        config: options; None takes the defaults.
        policy: prompt policy that travels with the data and renders the validation prompts.
        spellings: other names of tags, from a linted alias list; those of tags that occur travel
            in the policy. None keeps the aliases that the policy has.
        recipe_text: the recipe as the user wrote it, for the card.

    Raises:
        DataError: nothing to publish, images without split, disk too small, folder not ours.
        UserError: no folder is named, or the score named is not in the table.
    """
    from sdprep.prompt_policy import PromptPolicy

    config, policy = config or PublishConfig(), policy or PromptPolicy()
    to = to or config.to
    if to is None:
        raise UserError("publish.to is missing", 'Say where: --to DIR, or to = "DIR" in [publish].')
    to = Path(to).resolve()
    _mend(to)
    foreign = _foreign_files(table, to)
    _check_rows(table)
    _check_disk(table, to)
    score = score_column(table, config.score)
    losses, facts = Losses(), Facts()
    with _scratch(to) as scratch:
        _write_rows(
            table, scratch, config, score, _prompts(policy, config.seed or 0), losses, facts
        )
        if not facts.num_rows:
            raise DataError(f"nothing of {table.path} can be published", _said(losses))
        if spellings is not None:
            policy = policy.with_aliases(spellings, facts.tags)
        manifest = _manifest(table, config, score, policy, losses, facts)
        manifest["certificate"] = _certificate(table, scratch, facts)
        title = config.title or to.name
        write_card(scratch, manifest, facts, title=title, recipe_text=recipe_text)
        manifest["files"] = _own_files(scratch)
        (scratch / MANIFEST).write_text(_json(manifest), encoding="utf-8", newline="\n")
        _swap(scratch, to, foreign)
    if losses.left_out:
        warn(f"left out of the data set: {_said(losses)}")
    if losses.num_repacked:
        say(f"{losses.num_repacked} files of other formats are stored losslessly as PNG")
    train, validation = (facts.rows[split] for split in SPLITS)
    left_out, repacked = dict(losses.left_out), losses.num_repacked
    return PublishReport(to, None, None, train, validation, left_out, repacked)


# --- before ---------------------------------------------------------------------------------------


def _foreign_files(table: PhotoTable, to: Path) -> list[Path]:
    """Files in an earlier data set of ours that are not part of it; they will be carried over."""
    home, target = table.path.resolve(), to.resolve()
    if target == home or home in target.parents or target in home.parents:
        raise DataError(
            f"cannot publish {table.path} to {to}: one lies inside the other",
            "Choose another folder.",
        )
    if not to.exists():
        return []
    if not to.is_dir():
        raise DataError(f"cannot publish to {to}: it is a file", "Choose another name.")
    files = [path for path in sorted(to.rglob("*")) if not path.is_dir() or path.is_symlink()]
    if not files:
        return []
    if not (to / MANIFEST).is_file():
        raise DataError(
            f"{to} is not empty, and no data set of ours: it has no {MANIFEST}",
            "Choose another folder, or empty this one yourself.",
        )
    ours = set(read_manifest(to).get("files", [])) | {MANIFEST}
    names = [path.relative_to(to).as_posix() for path in files]
    return [Path(name) for name in names if name not in ours and not name.startswith(_LANCE)]


def _own_files(folder: Path) -> list[str]:
    """What belongs to the data set; all within the Lance tables does, unlisted."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in files if not name.startswith(_LANCE))


def _check_rows(table: PhotoTable) -> None:
    kept = table.kept_predicate()
    if not table.count(kept):
        raise DataError(
            f"{table.path} has no image to publish: all {table.count()} are rejected",
            f"Ask why: sdprep status {table.path}",
        )
    if not table.has("split"):
        warn(
            f"{table.path} has no split: all images go to train, and nothing can be validated. "
            f"Run first: sdprep split {table.path}"
        )
        return
    stray = table.count(f"{kept} AND (split IS NULL OR split NOT IN ('train', 'validation'))")
    if stray:
        raise DataError(
            f"{stray} kept images of {table.path} have no split yet",
            f"A copy of them may be in validation. Run first: sdprep split {table.path}",
        )


def _check_disk(table: PhotoTable, to: Path) -> None:
    sizes = table.kept(["num_bytes"])["num_bytes"]
    needed = int((pc.sum(sizes).as_py() or 0) * 1.1) + SPARE_BYTES
    folder = to.parent
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder} has {free / 1e9:.1f} GB free; publishing needs about {needed / 1e9:.1f} GB",
            "The old data set stays until the new one is whole. Choose another disk.",
        )


# --- writing --------------------------------------------------------------------------------------


def _prompts(policy: PromptPolicy, seed: int) -> PromptOf:
    from sdprep.prompts import validation_prompt

    return lambda row: validation_prompt(row, policy, seed)


def _write_rows(
    table: PhotoTable,
    folder: Path,
    config: PublishConfig,
    score: str | None,
    prompt_of: PromptOf,
    losses: Losses,
    facts: Facts,
) -> None:
    total = table.count(table.kept_predicate())
    with ExitStack() as stack:
        bar = stack.enter_context(progress("publishing", total))
        writers: dict[str, RowWriter] = {
            split: stack.enter_context(closing(_writer(folder, split, config))) for split in SPLITS
        }
        for split, row in prepared_rows(table, score, config.license, prompt_of, losses):
            writers[split].add(row)
            facts.add(split, row)
            bar.advance()


def _writer(folder: Path, split: str, config: PublishConfig) -> RowWriter:
    if config.format == "lance":
        return LanceWriter(folder, split)
    return ShardWriter(folder / "data", split, config.shard_megabytes)


def _manifest(
    table: PhotoTable,
    config: PublishConfig,
    score: str | None,
    policy: PromptPolicy,
    losses: Losses,
    facts: Facts,
) -> dict[str, Any]:
    columns = [name for name in table.columns() if name.startswith(ANNOTATORS)]
    prints = {name: table.notes(name).get("fingerprint") for name in columns}
    return {
        "SCHEMA_VERSION": SCHEMA_VERSION,
        "format": config.format,
        "rows": dict(facts.rows),
        "left_out": dict(sorted(losses.left_out.items())),
        "repacked_as_png": losses.num_repacked,
        "score": score,
        "policy": json.loads(policy.model_dump_json()),
        "certificate": None,
        "fingerprints": {name: hide_paths(text) for name, text in prints.items() if text},
        "features": features(),
        "files": [],
    }


def _certificate(table: PhotoTable, folder: Path, facts: Facts) -> dict[str, Any] | None:
    """The split's certificate; counted anew where some of its images are not in the folder."""
    text = table.notes("split").get("certificate")
    certificate = json.loads(text) if text else None
    if certificate and certificate.get("counts", facts.rows) != facts.rows:
        from sdprep.certificate import restated

        return restated(certificate, folder)
    return certificate


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _said(losses: Losses) -> str:
    counted = sorted(losses.left_out.items())
    return "; ".join(f"{num} {reason} ({losses.examples[reason]})" for reason, num in counted)


# --- taking its place -----------------------------------------------------------------------------


def _beside(to: Path) -> tuple[Path, Path]:
    return to.parent / f".{to.name}.sdprep-new", to.parent / f".{to.name}.sdprep-old"


def _mend(to: Path) -> None:
    """Undo what a kill left behind: between the two renames of `_swap`, or after them."""
    new, old = _beside(to)
    if old.exists() and not to.exists():
        os.replace(old, to)
    for leftover in (new, old):
        if leftover.exists():
            shutil.rmtree(leftover)


@contextmanager
def _scratch(to: Path) -> Iterator[Path]:
    """An empty folder beside the target, gone afterwards."""
    new, _ = _beside(to)
    new.mkdir()
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _swap(scratch: Path, to: Path, foreign: list[Path]) -> None:
    """Put the new folder in the place of the old one; files that are not ours move along."""
    _, old = _beside(to)
    for path in (path for path in scratch.rglob("*") if path.is_file()):
        with path.open("rb+") as file:  # writable: Windows syncs no other
            os.fsync(file.fileno())
    if to.exists():
        os.replace(to, old)
    try:
        os.replace(scratch, to)
    except OSError:
        if old.exists():
            os.replace(old, to)
        raise
    for name in foreign:
        if not (to / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(old / name, to / name)
    if old.exists():
        shutil.rmtree(old)
