"""How different the pictures of one prompt are: what fades first when a model learns by heart.

The spread of a prompt is the mean distance between the pictures of its seeds, two by two. Between
VAE latents a and b (scaled, at the end of sampling, N numbers) the distance is the root of their
mean squared difference, sqrt(sum((a - b)^2) / N); in an embedding of unit length it is one minus
the cosine. Divided by the spread of the base model, or of the first that was drawn, 1 means as
varied as that. It measures difference, not quality: noise is varied too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

LATENTS = "VAE latents"


class Drawn(Protocol):
    """A picture and the latents (C, h, w) that it was decoded from."""

    @property
    def picture(self) -> Image.Image:
        """The picture."""

    @property
    def latents(self) -> Tensor:
        """The latents."""


Spread = Callable[[Sequence[Drawn]], float | None]
"""Mean pairwise distance of drawings; None with fewer than two."""


def latent_spread(drawings: Sequence[Drawn]) -> float | None:
    """Mean over all pairs of the root mean squared difference of their latents."""
    flat = [drawing.latents.double().flatten().numpy() for drawing in drawings]
    return _mean_over_pairs(flat, lambda a, b: float(np.sqrt(np.mean((a - b) ** 2))))


def _mean_over_pairs(
    vectors: Sequence[np.ndarray], distance: Callable[[np.ndarray, np.ndarray], float]
) -> float | None:
    found = [distance(a, b) for a, b in combinations(vectors, 2)]
    return float(np.mean(found)) if found else None


class EmbeddingSpread:
    """Mean over all pairs of one minus the cosine in the space of a CLIP or SigLIP.

    Args:
        model: its folder, or id on the Hub.
        device: where it runs.

    Raises:
        UserError: no such model, or it is neither of the two.
    """

    def __init__(self, model: str, device: str) -> None:
        from sdprep.contrastive import FILES, ContrastiveModel, check_files
        from sdprep.model_files import model_folder

        folder = model_folder(model, None, FILES)
        check_files(folder)
        self.name = folder.name
        self._model = ContrastiveModel(folder, device)

    def __call__(self, drawings: Sequence[Drawn]) -> float | None:
        """The spread of some drawings."""
        if len(drawings) < 2:
            return None
        vectors = self._model.image_embeddings([each.picture for each in drawings])
        return _mean_over_pairs(
            list(vectors.astype(np.float64)), lambda a, b: float(max(0.0, 1.0 - a @ b))
        )


def relative(spread: float | None, first: float | None) -> float | None:
    """A spread in units of the first one; None where either is missing or the first is 0."""
    return spread / first if spread is not None and first else None


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is known; None of nothing."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def metrics_line(
    samples_seen: int,
    how: Mapping[str, Any],
    spreads: Mapping[str, float | None],
    earlier: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """A line for the metrics of a run.

    Args:
        samples_seen: the clock.
        how: everything else that moves a spread: size, steps, guidance, seeds.
        spreads: by prompt.
        earlier: lines so far; a prompt's first spread drawn in the same way is its unit.
    """
    first: dict[str, float | None] = {}
    for line in earlier:
        if line["kind"] == "variety" and line["how"] == how and line["samples_seen"] < samples_seen:
            for entry in line["prompts"]:
                first.setdefault(entry["prompt"], entry["spread"])
    shares = {prompt: relative(x, first.get(prompt, x)) for prompt, x in spreads.items()}
    prompts = [
        {"prompt": prompt, "spread": spread, "relative": shares[prompt]}
        for prompt, spread in spreads.items()
    ]
    return {
        "kind": "variety",
        "samples_seen": samples_seen,
        "space": LATENTS,
        "mean_relative": mean(list(shares.values())),
        "prompts": prompts,
        "how": dict(how),
    }
