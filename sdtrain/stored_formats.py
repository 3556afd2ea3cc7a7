"""Number formats that the weights of a model are stored in, read from the headers of its files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from sdtrain.formats import single_file_keys as keys
from sdtrain.formats.diffusers import HALF
from sdtrain.formats.tensor_files import is_safetensors, is_single_file

_NETWORKS = (
    (keys.UNET, "unet"),
    (keys.VAE, "vae"),
    (keys.ONE_ENCODER, "text_encoder"),
    (keys.FIRST_ENCODER, "text_encoder"),
    (keys.SECOND_ENCODER, "text_encoder_2"),
)


def stored_formats(path: str, parts: Iterable[str]) -> dict[str, str]:
    """The format that holds most numbers of each part, such as `F16`.

    Args:
        path: diffusers folder or single .safetensors file.
        parts: networks by name.

    Returns:
        nothing for what has no header to read here: Hub ids, and files of other kinds.
    """
    found: dict[str, Counter[str]] = {}
    if is_single_file(path):
        for name, kind, count in _entries(Path(path)):
            part = next((part for prefix, part in _NETWORKS if name.startswith(prefix)), None)
            if part is not None:
                found.setdefault(part, Counter())[kind] += count
    else:
        for part in parts:
            for file in _files(Path(path) / part):
                for _, kind, count in _entries(file):
                    found.setdefault(part, Counter())[kind] += count
    return {part: kinds.most_common(1)[0][0] for part, kinds in found.items()}


def model_files(path: str, parts: Iterable[str]) -> dict[str, int]:
    """The files of weights that loading reads, with their sizes in bytes.

    Args:
        path: diffusers folder or single .safetensors file.
        parts: networks by name.

    Returns:
        nothing for Hub ids, whose files are where the Hub's cache put them.
    """
    if is_single_file(path):
        return {Path(path).name: Path(path).stat().st_size}
    files = [file for part in parts for file in _files(Path(path) / part)]
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in files}


def _files(folder: Path) -> list[Path]:
    """What loading reads: `model.fp16.safetensors` only where there are no others."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    whole = [file for file in files if "." not in file.stem]
    return whole or [file for file in files if f".{HALF}" in file.stem]


def _entries(file: Path) -> list[tuple[str, str, int]]:
    """Name, format and number of numbers of every tensor of floats."""
    if not file.is_file() or not is_safetensors(file):
        return []
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    entries = []
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in ("F64", "F32", "F16", "BF16"):
            start, end = entry["data_offsets"]
            entries.append((name, entry["dtype"], end - start))
    return entries


def conflicts(stored: dict[str, str], trained: Iterable[str]) -> list[str]:
    """What the stored formats mean for training.

    Args:
        stored: of `stored_formats`.
        trained: parts that train.
    """
    found = []
    narrow = [p for p in trained if stored.get(p) in ("F16", "BF16")]
    if narrow:
        kinds = ", ".join(f"{part} ({stored[part]})" for part in narrow)
        found.append(
            f"{kinds} is stored in half precision and is widened to train: what rounding took from "
            "it before is lost; take the float32 checkpoint if there is one"
        )
    if stored.get("vae") in ("F16", "BF16"):
        found.append(
            f"the VAE is stored as {stored['vae']}; it runs in float32, with the rounded weights"
        )
    return found
