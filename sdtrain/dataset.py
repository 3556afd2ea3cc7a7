"""Open what is trained on: a prepared folder, a Hub id, any Hugging Face image data set, a table.

Whatever it is, the rest of the program sees one or two splits of `Rows`, a prompt policy and a
fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sdprep.errors import DataError
from sdprep.lance_folder import has_version
from sdprep.prompt_policy import PromptPolicy
from sdprep.prompts import render_prompt
from sdprep.recipe import validate
from sdprep.schema import MANIFEST
from sdtrain.buckets import Text
from sdtrain.data_fingerprint import fingerprint, of_split
from sdtrain.ids import Ids
from sdtrain.joined_rows import JoinedRows
from sdtrain.recipe import DataSection

if TYPE_CHECKING:
    from PIL import Image

NO_POLICY = "the defaults: {}; set it with [prompt] here, or with [policy] in sdprep"

_AT_ONCE = 8_192  # records held at a time


class Rows(Protocol):
    """One split: small columns at hand, pictures on demand; may be sent to another process.

    Attributes:
        refused: row index to reason, for rows whose picture cannot be used.
    """

    refused: dict[int, str]

    @property
    def ids(self) -> Ids:
        """(n,) sample ids, each once."""
        ...

    @property
    def sizes_hw(self) -> np.ndarray:
        """(n, 2) upright height and width, px; 0 where a row is refused."""
        ...

    @property
    def repeats(self) -> np.ndarray:
        """(n,) how often each row is trained in one epoch, at least 1."""
        ...

    def __len__(self) -> int: ...

    def digest_sum(self) -> np.ndarray:
        """`text_columns.digest_sum` of ids, sizes and texts."""
        ...

    def records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """What `render_prompt` needs to know of some rows."""
        ...

    def boxes(self, rows: Sequence[int]) -> list[list[dict[str, Any]]]:
        """`schema.BOX` of some rows; none where the data set has none."""
        ...

    def sources(self, rows: Sequence[int]) -> list[str | None]:
        """Where some rows came from, by name; None where the data set does not say."""
        ...

    def image(self, row: int) -> Image.Image:
        """The upright RGB picture of one row.

        Raises:
            DataError: it does not decode; names the row.
        """
        ...

    def source_digest(self, row: int) -> str:
        """Digest of the file of one row as it is stored now; decodes nothing."""
        ...


@dataclass(frozen=True)
class TrainingData:
    """An opened data set.

    Args:
        origin: what it is and where it came from, in words.
        train: rows to train on.
        validation: rows that are never trained on; None if the data set has no such split.
        policy: how prompts are rendered, with the recipe's overrides.
        policy_origin: where that policy comes from, in words.
        fingerprint: digest of ids and texts of both splits.
        provenance: path, revision, certificate and size of both splits, for checkpoints.
        notes: what was guessed or left out; the user should see it.
    """

    origin: str
    train: Rows
    validation: Rows | None
    policy: PromptPolicy
    policy_origin: str
    fingerprint: str
    provenance: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def open_data(
    section: DataSection,
    prompt: PromptPolicy,
    *,
    with_boxes: bool = False,
    needs_split: bool = True,
    needs_text: bool = True,
) -> TrainingData:
    """Open a data set.

    Args:
        section: the recipe's `[data]`.
        prompt: the recipe's `[prompt]`; what it sets wins over the data set's policy.
        with_boxes: whether `Rows.boxes` will be asked; reading them takes memory.
        needs_split: whether a curated table must say which images are held out; the pictures of a
            prior need not.
        needs_text: whether there must be a text for each picture.

    Raises:
        DataError: it is missing, of an unknown schema version, has no pictures or texts, or is a
            table without a split.
    """
    from sdtrain import hub_data, prepared_data, streamed_data, table_data
    from sdtrain.hub_files import pinned

    if section.streaming:
        section = pinned(section)
    path = Path(section.path)
    if path.suffix == ".lance" and has_version(path) and table_data.is_curated(path):
        needs_split = needs_split and section.splits == "train"
        splits = table_data.open_table(path, with_boxes=with_boxes, needs_split=needs_split)
        policy, manifest = splits.policy or PromptPolicy(), None
        origin, words = f"curated table {path}", "kept in the table by the last sdprep run"
        if splits.policy is None:
            words = NO_POLICY.format("the table keeps none, as no recipe was run on it")
    else:
        manifest = hub_data.manifest(section)
        policy = validate((manifest or {}).get("policy") or {}, PromptPolicy, f"{path}/{MANIFEST}")
        words = f"published with the data set, in {MANIFEST}"
        if not (manifest or {}).get("policy"):
            words = NO_POLICY.format(f"the data set has none in {MANIFEST}")
        if section.streaming:
            splits = streamed_data.open_streamed(section, manifest, with_boxes=with_boxes)
        elif manifest and prepared_data.shards(path, "train"):
            splits = prepared_data.open_prepared(path, with_boxes=with_boxes)
        else:
            splits = hub_data.open_splits(
                section, is_published=bool(manifest), needs_text=needs_text
            )
        origin = f"{'prepared' if manifest else 'Hugging Face'} data set {section.path}"
    splits.notes += _unused(section, is_prepared=manifest is not None or origin.startswith("cur"))
    if splits.validation is not None:
        _keep_apart(splits, is_published=bool(manifest))
    digests = {"train": of_split(splits.train), "validation": of_split(splits.validation)}
    if section.splits == "all" and splits.validation is not None:
        splits.notes.append("the held-out images are trained on as well")
        splits = replace(splits, train=JoinedRows(splits.train, splits.validation), validation=None)
    repeats = splits.train.repeats
    if (repeats > 1).any():
        splits.notes.append(
            f"{int((repeats > 1).sum()):,} rows ask for repeats, up to {int(repeats.max()):,}: "
            f"an epoch of {len(repeats):,} rows is {int(repeats.sum()):,} samples"
        )
    provenance: dict[str, Any] = {"path": section.path, "revision": splits.revision}
    provenance["certificate"] = (manifest or {}).get("certificate")
    provenance["splits"] = {name: found.to_json() for name, found in digests.items()}
    return TrainingData(
        origin=origin,
        train=splits.train,
        validation=splits.validation,
        policy=policy.overridden(prompt),
        policy_origin=words + _overrides(prompt),
        fingerprint=fingerprint(*digests.values()),
        provenance=provenance,
        notes=splits.notes,
    )


@dataclass
class Splits:
    """What an opener found."""

    train: Rows
    validation: Rows | None
    revision: str | None = None
    notes: list[str] = field(default_factory=list)
    policy: PromptPolicy | None = None


def policy_words(policy: PromptPolicy) -> str:
    """The knobs that one asks for first, in words."""
    score = policy.score.position
    triggers = f"triggers {', '.join(policy.triggers)}, " if policy.triggers else ""
    return (
        f"mode {policy.mode}, dropout {policy.dropout_p:g}, {triggers}"
        f"{'no score tags' if score == 'none' else f'score tags {score}'}, "
        f"at most {policy.max_chunks} chunks"
    )


def _overrides(prompt: PromptPolicy) -> str:
    """What the recipe's own section says of the policy, in words."""
    changed = sorted(prompt.model_dump(exclude_unset=True, by_alias=True))
    return f"; the recipe's [prompt] sets {', '.join(changed)}" if changed else ""


def _unused(section: DataSection, *, is_prepared: bool) -> list[str]:
    """What the section says to no effect, in words."""
    found = []
    for key in ("image_column", "caption_column") if is_prepared else ():
        if value := getattr(section, key):
            found.append(f"{key} = {value!r} is not used: columns of a prepared set are known")
    if section.revision is not None and Path(section.path).exists():
        found.append(f"revision = {section.revision!r} is not used: {section.path} is on this disk")
    return found


def _keep_apart(splits: Splits, *, is_published: bool) -> None:
    """Make sure that no picture is in both splits."""
    assert splits.validation is not None
    if is_published:
        shared = splits.validation.ids.rows_in(splits.train.ids)
    else:  # the same file twice has the ids X and X#2
        in_train = {id_.split("#")[0] for id_ in splits.train.ids}
        held_out = enumerate(splits.validation.ids)
        shared = [row for row, id_ in held_out if id_.split("#")[0] in in_train]
    if not shared:
        return
    if is_published:
        raise DataError(
            f"{len(shared)} images are in train and in validation, such as "
            f"{splits.validation.ids[shared[0]]}",
            "The data set was changed after publishing; publish it again.",
        )
    for row in shared:
        splits.validation.refused.setdefault(row, "also_in_train: the same bytes are in train")
    splits.notes.append(f"{len(shared)} validation images are also in train and are left out")


def renderer(
    rows: Rows,
    policy: PromptPolicy,
    seed: int,
    num_chunks: Callable[[str], int],
    num_tokens_cut: Callable[[str], int] = lambda prompt: 0,
) -> Callable[[Sequence[int], Sequence[int]], list[Text]]:
    """The function from rows and their visits to training texts that the global order asks.

    Args:
        rows: the split.
        policy: how prompts are rendered.
        seed: of the run.
        num_chunks: of a prompt, as the model counts them.
        num_tokens_cut: of a prompt, tokens that the model does not read.
    """

    def render(wanted: Sequence[int], visits: Sequence[int]) -> list[Text]:
        texts = []
        for start in range(0, len(wanted), _AT_ONCE):
            span = slice(start, start + _AT_ONCE)
            for record, visit in zip(rows.records(wanted[span]), visits[span], strict=True):
                rendered = render_prompt(record, policy, seed, visit)
                text = rendered.text
                counts = num_chunks(text), rendered.num_removed, num_tokens_cut(text)
                texts.append(Text(text, rendered.dropped, *counts))
        return texts

    return render
