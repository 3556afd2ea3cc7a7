"""Publish: from the table under curation to a prepared data set in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from sdprep.card import write_card
from sdprep.card_facts import Facts
from sdprep.console import progress, say, warn
from sdprep.errors import DataError, UserError
from sdprep.hub_access import repo_name
from sdprep.prepared_files import LanceWriter, RowWriter, ShardWriter, features
from sdprep.prepared_rows import Losses, PromptOf, check_rows, prepared_rows, score_column
from sdprep.private_paths import hide_paths
from sdprep.recipe import Section
from sdprep.schema import MANIFEST, SCHEMA_VERSION, SPLITS, read_manifest
from sdprep.table import PhotoTable
from sdprep.target_folder import check_disk, files_there, mend, scratch_beside, swap

if TYPE_CHECKING:
    from sdprep.prompt_policy import PromptPolicy

ANNOTATORS = ("score_", "tags_", "boxes_", "caption_", "embed_")
MISSING_TO = 'Say where: --to DIR or --push USER/NAME, or to = "DIR" in [publish].'
_LANCE = tuple(f"{split}.lance/" for split in SPLITS)


class PublishConfig(Section):
    """How the prepared data set is written."""

    to: Path | None = Field(None, description="Folder of the data set; made, or replaced if ours.")
    push: str | None = Field(
        None, description="USER/NAME on the Hub; the folder goes there, too, as far as it is new."
    )
    private: bool = Field(
        True, description="Whether a repository that the push makes is private; false: public."
    )
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

    @field_validator("push")
    @classmethod
    def _is_a_name_on_the_hub(cls, name: str | None) -> str | None:
        return None if name is None else repo_name(name)


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
        raise UserError("publish.to is missing", MISSING_TO)
    to = Path(to).resolve()
    mend(to)
    foreign = _foreign_files(table, to)
    check_rows(table)
    check_disk(table, to)
    score = score_column(table, config.score)
    losses, facts = Losses(), Facts()
    with scratch_beside(to) as scratch:
        _write_rows(
            table, scratch, config, score, _prompts(policy, config.seed or 0), losses, facts
        )
        if not facts.num_rows:
            raise DataError(f"nothing of {table.path} can be published", losses.said())
        if spellings is not None:
            policy = policy.with_aliases(spellings, facts.tags)
        manifest = _manifest(table, config, score, policy, losses, facts)
        manifest["certificate"] = _certificate(table, scratch, facts)
        title = config.title or to.name
        write_card(scratch, manifest, facts, title=title, recipe_text=recipe_text, repo=config.push)
        manifest["files"] = _own_files(scratch)
        (scratch / MANIFEST).write_text(_json(manifest), encoding="utf-8", newline="\n")
        swap(scratch, to, foreign)
    if losses.left_out:
        warn(f"left out of the data set: {losses.said()}")
    if losses.num_repacked:
        say(f"{losses.num_repacked} files of other formats are stored losslessly as PNG")
    train, validation = (facts.rows[split] for split in SPLITS)
    left_out, repacked = dict(losses.left_out), losses.num_repacked
    return PublishReport(to, None, None, train, validation, left_out, repacked)


# --- before ---------------------------------------------------------------------------------------


def _foreign_files(table: PhotoTable, to: Path) -> list[Path]:
    """Files in an earlier data set of ours that are not part of it; they will be carried over."""
    names = files_there(table, to, MANIFEST)
    ours = set(read_manifest(to).get("files", [])) | {MANIFEST} if names else set()
    return [Path(name) for name in names if name not in ours and not name.startswith(_LANCE)]


def _own_files(folder: Path) -> list[str]:
    """What belongs to the data set; all within the Lance tables does, unlisted."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in files if not name.startswith(_LANCE))


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
