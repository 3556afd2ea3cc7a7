"""Labels of your own, judged by CLIP or SigLIP from words alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field, model_validator

from sdprep.annotate import PixelNeeds, Sample
from sdprep.devices import BatchSize, DeviceName, FittingBatches, torch_device
from sdprep.model_files import ModelFolder, ModelName, Revision, fingerprint, model_folder
from sdprep.recipe import AnnotatorConfig, Section
from sdprep.schema import SCORED_TAG
from sdprep.taggers._scored_tags import StoreAbove, scored_tags

if TYPE_CHECKING:
    from sdprep.contrastive import ContrastiveModel

LABEL = pa.struct(
    {"name": pa.string(), "group": pa.string(), "cosine": pa.float32(), "p": pa.float32()}
)
COLUMNS = pa.schema([pa.field("tags", pa.list_(SCORED_TAG)), pa.field("labels", pa.list_(LABEL))])


class Label(Section):
    """One label and how to say it."""

    name: str = Field(min_length=1, description="Tag that the label stands for.")
    group: str | None = Field(
        None, min_length=1, description="Labels of one group exclude each other; none: it is alone."
    )
    templates: tuple[str, ...] = Field(
        (), description="Prompts for it, `{}` being its name; none: those of the tagger."
    )
    negatives: tuple[str, ...] = Field(
        (), description="Prompts for what it is not; they compete in its group and are no tags."
    )


class Config(AnnotatorConfig):
    """CLIP or SigLIP with labels of your own; only those with a threshold reach prompts."""

    type: Literal["zero_shot"] = "zero_shot"
    model: ModelName = "openai/clip-vit-large-patch14"
    revision: Revision = None
    labels: tuple[Label, ...] = Field(
        min_length=1, description="What to look for: name, group, templates, negatives."
    )
    templates: tuple[str, ...] = Field(
        ("a photo of {}.", "a picture of {}."),
        min_length=1,
        description="Prompts for a label without its own, `{}` being its name.",
    )
    device: DeviceName = "auto"
    batch_size: BatchSize = 16
    store_above: StoreAbove = 0.1

    @model_validator(mode="after")
    def _labels_have_rivals(self) -> Config:
        names = [label.name for label in self.labels]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"labels: {twice[0]} is there twice")
        for group, (labels, negatives) in self.groups().items():
            if len(labels) + len(negatives) < 2:
                raise ValueError(
                    f"labels: {group} has no rival, so its share would always be 1; "
                    "give it negatives, or a group with others"
                )
        if not all(text.strip() for texts, _ in self.prompts() for text in texts):
            raise ValueError("labels: a prompt is empty")
        return self

    def groups(self) -> dict[str, tuple[list[int], list[str]]]:
        """Places of the labels of each group, and its negatives; a lone label is a group."""
        found: dict[str, tuple[list[int], list[str]]] = {}
        taken = {label.group for label in self.labels if label.group}
        for place, label in enumerate(self.labels):
            # A lone label must not fall into a group that happens to bear its name.
            name = label.group or (f"{label.name} alone" if label.name in taken else label.name)
            places, negatives = found.setdefault(name, ([], []))
            places.append(place)
            negatives += [text for text in label.negatives if text not in negatives]
        return found

    def prompts(self) -> list[tuple[list[str], str | None]]:
        """Prompts and group of each candidate: the labels in order, then the negatives (None)."""
        found: list[tuple[list[str], str | None]] = []
        for label in self.labels:
            spoken = label.name.replace("_", " ")
            texts = label.templates or self.templates
            found.append(([text.replace("{}", spoken) for text in texts], label.name))
        for _, negatives in self.groups().values():
            found += [([text], None) for text in negatives]
        return found

    def build(self) -> ZeroShotTagger:
        """Find the model's files.

        Raises:
            UserError: files are missing or of another model, or the device is not there.
        """
        from sdprep.contrastive import FILES

        return ZeroShotTagger(model_folder(self.model, self.revision, FILES), self)


class ZeroShotTagger:
    """Fills `tags_zero_shot`: `tags` with the share in the group, `labels` with all there is."""

    columns = COLUMNS
    pixels = PixelNeeds()
    is_thread_safe = False

    def __init__(self, folder: ModelFolder, config: Config) -> None:
        from sdprep.contrastive import check_files

        check_files(folder)
        self.folder, self.config, self.batch_size = folder, config, config.batch_size
        self.device = torch_device(config.device, "tagger zero_shot")
        told = config.model_dump(mode="json", include={"labels", "templates", "store_above"})
        self.fingerprint = fingerprint("zero_shot", 1, folder, **told)
        self._batches = FittingBatches("tagger zero_shot")
        self._model: ContrastiveModel | None = None
        self._texts = np.zeros((0, 0), np.float32)

    def annotate(self, batch: Sequence[Sample]) -> pa.RecordBatch:
        """Cosine and share of every label; the shares at or above the storing threshold as tags."""
        images = [sample.image for sample in batch if sample.image is not None]
        found = self._batches.run(self._embeddings, images)
        rows = [self._row(embedding) for embedding in found]
        return pa.RecordBatch.from_pylist(rows, schema=COLUMNS)

    def _embeddings(self, images: Sequence[Image.Image]) -> np.ndarray:
        if self._model is None:
            from sdprep.contrastive import ContrastiveModel

            self._model = ContrastiveModel(self.folder, self.device)
            self._texts = np.stack(
                [self._model.text_embedding(texts) for texts, _ in self.config.prompts()]
            )
        return self._model.image_embeddings(images)

    def _row(self, embedding: np.ndarray) -> dict[str, Any]:
        assert self._model is not None
        cosines = self._texts @ embedding
        labels = self.config.labels
        shares = np.zeros(len(labels), np.float32)
        groups = [""] * len(labels)
        first_negative = len(labels)
        for group, (places, negatives) in self.config.groups().items():
            rivals = [*places, *range(first_negative, first_negative + len(negatives))]
            first_negative += len(negatives)
            logits = self._model.scale * cosines[rivals]
            weights = np.exp(logits - logits.max())
            shares[places] = (weights / weights.sum())[: len(places)]
            for place in places:
                groups[place] = group
        names = [(label.name, None) for label in labels]
        return {
            "tags": scored_tags(shares, names, self.config.store_above),
            "labels": [
                {"name": label.name, "group": group, "cosine": float(cosine), "p": float(share)}
                for label, group, cosine, share in zip(
                    labels, groups, cosines, shares, strict=False
                )
            ],
        }
