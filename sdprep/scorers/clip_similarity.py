"""How well every caption fits its picture, by CLIP or SigLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from sdprep.annotate import PixelNeeds, Sample
from sdprep.caption_similarity import COMPARED, caption_digest
from sdprep.console import warn
from sdprep.devices import BatchSize, DeviceName, FittingBatches, torch_device
from sdprep.model_files import ModelFolder, ModelName, Revision, fingerprint, model_folder
from sdprep.recipe import AnnotatorConfig

if TYPE_CHECKING:
    from sdprep.contrastive import ContrastiveModel

COLUMNS = pa.schema(
    [
        pa.field("score", pa.float32()),  # the lowest cosine; NULL: the image has no caption
        pa.field("captions", pa.list_(COMPARED)),
    ]
)


class Config(AnnotatorConfig):
    """CLIP or SigLIP: cosine of each caption with its picture; `caption_check` flags the lowest.

    Run it after the captioners; captions that were written since are compared by --retry-failed.
    """

    type: Literal["clip_similarity"] = "clip_similarity"
    model: ModelName = "openai/clip-vit-large-patch14"
    revision: Revision = None
    device: DeviceName = "auto"
    batch_size: BatchSize = 16

    def build(self) -> ClipSimilarity:
        """Find the model's files; weights are read with the first batch.

        Raises:
            UserError: files are missing or of another model, or the device is not there.
        """
        from sdprep.contrastive import FILES

        return ClipSimilarity(model_folder(self.model, self.revision, FILES), self)


class ClipSimilarity:
    """Fills `score_clip_similarity`: an entry for each caption, whoever wrote it."""

    columns = COLUMNS
    pixels = PixelNeeds(columns=("caption_*",))
    is_thread_safe = False

    def __init__(self, folder: ModelFolder, config: Config) -> None:
        from sdprep.contrastive import check_files

        check_files(folder)
        self.folder, self.batch_size = folder, config.batch_size
        self.device = torch_device(config.device, "scorer clip_similarity")
        self.fingerprint = fingerprint("clip_similarity", 1, folder)
        self._batches = FittingBatches("scorer clip_similarity")
        self._model: ContrastiveModel | None = None
        self._is_warned = False

    def annotate(self, batch: Sequence[Sample]) -> pa.RecordBatch:
        """Cosines of all captions of each sample, and the lowest of them as the score."""
        captions = [captions_in(sample.row) for sample in batch]
        if not all(captions) and not self._is_warned:
            self._is_warned = True
            warn(
                "scorer clip_similarity: there are images without a caption; their score stays "
                "empty, and --retry-failed fills it once they have one"
            )
        with_any = [(s, own) for s, own in zip(batch, captions, strict=True) if own]
        found = iter(self._batches.run(self._compared, with_any))
        rows = [next(found) if own else {"score": None, "captions": []} for own in captions]
        return pa.RecordBatch.from_pylist(rows, schema=COLUMNS)

    def _compared(self, part: Sequence[tuple[Sample, dict[str, str]]]) -> list[dict[str, Any]]:
        if self._model is None:
            from sdprep.contrastive import ContrastiveModel

            self._model = ContrastiveModel(self.folder, self.device)
        images = [sample.image for sample, _ in part if sample.image is not None]
        pictures = self._model.image_embeddings(images)
        texts = [text for _, captions in part for text in captions.values()]
        embeddings, are_cut = self._model.caption_embeddings(texts)
        entries = iter(zip(embeddings, are_cut, strict=True))
        return [
            _row(picture, captions, [next(entries) for _ in captions])
            for picture, (_, captions) in zip(pictures, part, strict=True)
        ]


def captions_in(row: Mapping[str, Any]) -> dict[str, str]:
    """Captions of an image by column: the one that lay beside it (`text`), and the written ones."""
    found = {"text": (row.get("text") or {}).get("caption")}
    for column in sorted(row):
        if column.startswith("caption_") and isinstance(row[column], dict):
            found[column] = row[column].get("text")
    return {column: text.strip() for column, text in found.items() if text and text.strip()}


def _row(
    picture: np.ndarray, captions: Mapping[str, str], found: Sequence[tuple[np.ndarray, bool]]
) -> dict[str, Any]:
    cosines = [float(embedding @ picture) for embedding, _ in found]
    if not np.isfinite(cosines).all():
        raise ValueError("the model gave values that are not finite")
    entries = [
        {"column": column, "digest": caption_digest(text), "cosine": cosine, "is_cut": is_cut}
        for (column, text), cosine, (_, is_cut) in zip(
            captions.items(), cosines, found, strict=True
        )
    ]
    return {"score": min(cosines), "captions": entries}
