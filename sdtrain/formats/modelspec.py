"""ModelSpec: what a published file says about itself, in the metadata of its header.

Source: https://github.com/Stability-AI/ModelSpec, version 1.0.0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdprep.private_paths import hide_paths

ARCHITECTURES = {
    "StableDiffusionPipeline": "stable-diffusion-v1",
    "StableDiffusionXLPipeline": "stable-diffusion-xl-v1-base",
}
IMPLEMENTATIONS = {
    "StableDiffusionPipeline": "https://github.com/CompVis/stable-diffusion",
    "StableDiffusionXLPipeline": "https://github.com/Stability-AI/generative-models",
}
# The specification names the first two; programs that draw must be told of the third by hand.
PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v", "flow": "flow"}
HASH = "modelspec.hash_sha256"
_NO_HASH = "0x" + "0" * 64
_CHUNK_BYTES = 1 << 20


def modelspec(
    pipeline_class: str,
    *,
    title: str,
    date: str,
    resolution_px: int,
    prediction_type: str,
    about: Mapping[str, str] | None = None,
    is_adapter: bool = False,
) -> dict[str, str]:
    """The metadata of one file; `write_hash` fills in the hash once the file is there.

    Args:
        pipeline_class: diffusers' name of the architecture.
        title: what people call the model.
        date: ISO 8601.
        resolution_px: side of the square that it draws.
        prediction_type: `epsilon`, `v_prediction` or `flow`.
        about: `author`, `description` and others, if known.
        is_adapter: whether the file holds a LoRA and no model.
    """
    entries = {
        "sai_model_spec": "1.0.0",
        "architecture": ARCHITECTURES[pipeline_class] + ("/lora" if is_adapter else ""),
        "implementation": "diffusers" if is_adapter else IMPLEMENTATIONS[pipeline_class],
        "title": title,
        "date": date,
        "resolution": f"{resolution_px}x{resolution_px}",
        "prediction_type": PREDICTION_TYPES[prediction_type],
        "hash_sha256": _NO_HASH,
        **(about or {}),
    }
    return {f"modelspec.{key}": value for key, value in entries.items()}


def training_record(state: Mapping[str, Any]) -> dict[str, str]:
    """What a run's checkpoint knows of its making, as JSON, under `sdtrain.`.

    Absolute paths are cut down to their last part: such a file is made to be passed on.
    """
    keys = ("recipe", "versions", "data", "samples_seen", "freeze_table", "evaluations")
    return {
        f"sdtrain.{key}": hide_paths(json.dumps(state[key], ensure_ascii=False, sort_keys=True))
        for key in keys
        if key in state
    }


def write_hash(path: Path) -> str:
    """Put the SHA-256 of all tensor bytes into the header, in place of as many zeros.

    The hash covers what follows the header, so writing it does not change it.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
        found = "0x" + digest.hexdigest()
        at = header.index(_NO_HASH.encode())
        file.seek(8 + at)
        file.write(found.encode())
    return found
