"""Time how soon a run starts on a published set of millions of rows; the promise is a minute.

python tools/bench/start_million.py [--rows 12000000] [--folder DIR]

The set is made with pictures of a few bytes: what is measured is the rows. A child process each
starts on it as `sdtrain run` does, up to the first loaded step and the chosen probes: `new`, with
nothing known of it; `again`, its rows known and its texts not copied yet; `known`, with the copy;
`resumed`, in the middle of the epoch. Between the second and the third the copy is waited for.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

LIMIT_S, LIMIT_GB = 60, 6
SEED = 1234
TAGS, WORDS = 20, 12  # of a row; about 450 bytes of text
BLOCK_ROWS = 50_000
GROUP_ROWS = 100


def make(folder: Path, num_rows: int) -> None:
    """A set as `sdprep publish` lays it out, 100 rows to a group, 500 MB to a shard."""
    from sdprep.prepared_files import ShardWriter

    rng = np.random.default_rng(SEED)
    held_out = max(64, num_rows // 1000)
    for split, count in (("train", num_rows), ("validation", held_out)):
        writer = ShardWriter(folder / "data", split, 500)
        for start in range(0, count, BLOCK_ROWS):
            block = _block(rng, min(BLOCK_ROWS, count - start), writer.schema)
            for first in range(0, block.num_rows, GROUP_ROWS):
                writer.write(block.slice(first, GROUP_ROWS))
        writer.close()
    manifest = {"SCHEMA_VERSION": 1, "policy": {"mode": "tags"}, "certificate": None}
    (folder / "sdprep.json").write_text(json.dumps(manifest), encoding="utf-8")


def _block(rng: np.random.Generator, count: int, schema: pa.Schema) -> pa.Table:
    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 120, 40)).save(picture, "PNG")
    data = rng.bytes(16 * count)
    ids = pa.array([data[16 * row : 16 * row + 16].hex() for row in range(count)])
    names = pa.array([f"{word} number {n}" for n in range(5_000) for word in ("thing",)])
    drawn = (rng.random(count * TAGS) ** 3 * len(names)).astype(np.int64)
    tags = schema.field("tags").type.value_type
    columns = {
        "name": names.take(pa.array(drawn)),
        "category": pa.array(["general"]).take(pa.array(np.zeros(len(drawn), np.int64))),
        "score": pa.array(rng.random(len(drawn), np.float32)),
        "source": pa.array(["wd"]).take(pa.array(np.zeros(len(drawn), np.int64))),
    }
    items = pa.StructArray.from_arrays([columns[f.name] for f in tags], fields=list(tags))
    words = names.take(pa.array(rng.integers(0, len(names), count * WORDS)))
    ends = pa.array(np.arange(0, count * WORDS + 1, WORDS), pa.int32())
    import pyarrow.compute as pc

    captions = pc.binary_join(pa.ListArray.from_arrays(ends, words), " ")
    sides = rng.integers(1024, 3000, (2, count)).astype(np.int32)
    image = schema.field("image").type
    bytes_ = pa.array([picture.getvalue()]).take(pa.array(np.zeros(count, np.int64)))
    known = {
        "id": ids,
        "image": pa.StructArray.from_arrays(
            [bytes_, pc.binary_join_element_wise(ids, "png", ".")], fields=list(image)
        ),
        "width": pa.array(sides[0]),
        "height": pa.array(sides[1]),
        "caption": captions,
        "tags": pa.ListArray.from_arrays(
            pa.array(np.arange(0, count * TAGS + 1, TAGS), pa.int32()), items
        ),
        "score": pa.array(rng.integers(1, 10, count).astype(np.int8)),
        "group_id": ids,
        "repeats": pa.array(np.ones(count, np.int32)),
    }
    return pa.table([known.get(f.name, pa.nulls(count, f.type)) for f in schema], schema)


RECIPE = """
seed = 7
output = {output!r}
[model]
family = "sd15"
path = {model!r}
[data]
path = {data!r}
resolution_px = 64
batch_size = 16
workers = 0
[train]
samples = 100_000_000
lr = 1e-4
[precision]
mixed = "no"
device = "cpu"
"""


def child(folder: Path, started: float, share: float, *, is_copied: bool) -> None:
    """Open, plan and load a step; print memory, and seconds by clock and processor.

    Args:
        folder: where the recipe is.
        started: when the process was, so that imports count.
        share: of the epoch that lies behind.
        is_copied: wait for the copy of the texts at the end.
    """
    from sdtrain.loader import load
    from sdtrain.probe_sets import plain_probe
    from sdtrain.recipe import load_train_recipe
    from sdtrain.setup import open_setup

    begin = last = np.zeros(2)
    found: dict[str, Any] = {}

    def mark(name: str, since: np.ndarray | None = None) -> None:
        nonlocal last
        now = np.array([time.time() - started, time.process_time()])
        found[name] = [round(each, 1) for each in (now - (last if since is None else since))]
        last = now

    setup = open_setup(load_train_recipe(folder / "recipe.toml"))
    mark("open")
    order, batch_size = setup.order, setup.recipe.data.batch_size
    mark("order")
    state = {"samples_seen": int(share * order.epoch_samples) // batch_size * batch_size}
    micro, _ = next(load(setup.reader(), setup.micro_batches(state["samples_seen"]), 0))
    assert micro.step.samples_seen == state["samples_seen"]
    mark("first_step")
    mark("total", begin)
    data, policy = setup.data, setup.data.policy
    sizes = {"seed": 7, "num_images": 64, "num_levels": 4}
    probes = [
        plain_probe("validation", setup.family, data.validation, setup.validation, policy, **sizes),
        plain_probe("train_probe", setup.family, data.train, setup.train, policy, **sizes),
    ]
    mark("probes_chosen")
    mark("total_with_probes", begin)
    found |= _memory()
    found["worker_bytes"] = len(pickle.dumps(setup.reader()))
    found["sampler_state"] = state
    found["sampler_mb"] = round(_num_bytes(order) / 1e6)
    found["rows"] = order.epoch_samples
    found["probe_images"] = [len(probe.images) for probe in probes]
    if is_copied:
        data.train.copying.wait()
        mark("texts_copied")
    print(json.dumps(found))


def _num_bytes(order: Any) -> int:
    """What the order keeps of all rows."""
    return sum(v.nbytes for v in vars(order).values() if isinstance(v, np.ndarray))


def _memory() -> dict[str, float]:
    """Peak of all, and what is not mapped files, in GB."""
    if not Path("/proc/self/status").exists():
        return {}
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    gigabytes = {k: int(fields[k].split()[0]) / 1e6 for k in ("VmHWM", "RssAnon")}
    return {"peak_gb": round(gigabytes["VmHWM"], 2), "own_gb": round(gigabytes["RssAnon"], 2)}


def main() -> int:
    """Make the set, open it new and known, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=12_000_000)
    parser.add_argument("--folder", type=Path, help="Where the set is kept; default: nowhere.")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--copied", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child, asked.started, asked.share, is_copied=asked.copied)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = (asked.folder or Path(scratch)).resolve()
        data = folder / f"prepared-{asked.rows}"
        if not (data / "sdprep.json").is_file():
            start = time.perf_counter()
            make(data, asked.rows)
            size = sum(file.stat().st_size for file in data.rglob("*") if file.is_file())
            took = time.perf_counter() - start
            print(f"made {asked.rows:,} rows, {size / 1e9:.2f} GB, in {took:.0f} s (not counted)")
        from sdtrain.tiny import write_tiny

        model = folder / "tiny"
        if not model.is_dir():
            write_tiny("sd15", model, SEED)
        names = {"model": str(model), "data": str(data), "output": str(folder / "run")}
        (folder / "recipe.toml").write_text(RECIPE.format(**names), encoding="utf-8")
        environment = {**os.environ, "HF_DATASETS_CACHE": str(Path(scratch) / "cache")}
        is_ok = True
        starts: list[tuple[str, list[str]]] = [
            ("new", []),
            ("again", ["--copied"]),
            ("known", []),
            ("resumed", ["--share", "0.61"]),
        ]
        for name, options in starts:
            done = subprocess.run(
                [
                    sys.executable,
                    __file__,
                    "--child",
                    str(folder),
                    "--started",
                    str(time.time()),
                    *options,
                ],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: {json.dumps(found)}", flush=True)
            is_ok &= found["total"][0] < LIMIT_S and found.get("own_gb", 0) < LIMIT_GB
        size = sum(file.stat().st_size for file in Path(scratch, "cache").rglob("*.*"))
        print(f"copies on disk {size / 1e9:.2f} GB; limits {LIMIT_S} s and {LIMIT_GB} GB")
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
