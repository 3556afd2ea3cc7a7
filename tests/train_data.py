"""A small prepared data set and recipes for the tests of training."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sdprep.prepared_files import prepared_schema

PHOTOS = Path(__file__).resolve().parent.parent / "tools" / "demo_photos" / "photos"
SIZES = ((96, 96), (80, 112), (112, 80), (90, 100))  # width, height: three buckets at 64 px
LONG = ", a long sentence that goes on and on about nothing at all" * 12


def small_jpeg(number: int, size: tuple[int, int]) -> bytes:
    """One of the demo photos, small, the same bytes every time."""
    photos = sorted(PHOTOS.rglob("*.jpg"))
    with Image.open(photos[number % len(photos)]) as photo:
        small = photo.convert("RGB").resize(size)
    small.putpixel((0, 0), (number % 256, 0, 0))  # no two alike
    file = io.BytesIO()
    small.save(file, "JPEG", quality=90)
    return file.getvalue()


def prepared_row(number: int, **changed: Any) -> dict[str, Any]:
    """One row of `schema.PREPARED`; every fifth has a caption of several chunks."""
    size = changed.pop("size", SIZES[number % len(SIZES)])
    data = changed.pop("data", None) or small_jpeg(number, size)
    caption = f"photo number {number} of a dog" + (LONG if number % 5 == 0 else "")
    return {
        "id": blake2b(data, digest_size=16).hexdigest(),
        "image": {"bytes": data, "path": None},
        "width": size[0],
        "height": size[1],
        "caption": caption,
        "captions": [{"text": caption, "source": "human"}],
        "tags": [],
        "score": 1 + number % 9,
        "group_id": f"group{number}",
        "repeats": 1,
        "stable_train": False,
        **changed,
    }


def write_prepared(
    folder: Path,
    train: Sequence[dict[str, Any]],
    validation: Sequence[dict[str, Any]] = (),
    **manifest: Any,
) -> Path:
    """A published folder as `sdprep publish` lays it out."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    configs = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for split, rows in (("train", train), ("validation", validation)):
        if rows:
            table = pa.Table.from_pylist(list(rows), schema=prepared_schema())
            pq.write_table(table, folder / "data" / f"{split}-00000.parquet")
            configs += f"  - split: {split}\n    path: data/{split}-*.parquet\n"
    (folder / "README.md").write_text(f"{configs}---\n", encoding="utf-8")
    content = {"SCHEMA_VERSION": 1, "policy": {"mode": "caption"}, "certificate": None, **manifest}
    (folder / "sdprep.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


RECIPE = """
seed = 7
output = {output!r}
[model]
family = {family!r}
path = {model!r}
[data]
path = {data!r}
batch_size = 4
micro_batch_size = 2
workers = 0
[train]
samples = 22
rules = [{{ match = "unet.**", lr = 1e-3 }}]
[schedule]
type = "cosine"
warmup_samples = 4
[weighting]
type = "min_snr"
[precision]
mixed = "no"
device = "cpu"
[validation]
images = 0
train_probe_images = 0
[checkpoint]
every_samples = 8
"""


def write_recipe(path: Path, *, model: Path, data: Path, output: Path, family: str) -> Path:
    """A recipe of six short steps, the last of them shorter, over more than one epoch."""
    names = {"model": str(model), "data": str(data), "output": str(output)}
    path.write_text(RECIPE.format(family=family, **names), encoding="utf-8")
    return path
