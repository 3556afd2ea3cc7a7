"""Time `sdprep split` on a table of a million rows; the promise is under 60 s.

python tools/bench/split_million.py [ROWS]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from sdprep.certificate import verify
from sdprep.schema import CORE, FOLDS
from sdprep.split import SplitConfig, split_table
from sdprep.table import PhotoTable

LIMIT_S = 60
SEED = 1234


def fill(table: PhotoTable, num_rows: int) -> None:
    """Rows without images, a tenth of them in groups of two, with random signatures."""
    rng = np.random.default_rng(SEED)
    ids = [key.hex() for key in _keys(rng, num_rows)]
    sides = rng.integers(300, 4000, (2, num_rows)).astype(np.int32)
    sources = [
        [{"source": f"source{index % 4}", "key": f"{index}.jpg"}] for index in range(num_rows)
    ]
    given = {
        "id": pa.array(ids),
        "width": pa.array(sides[0]),
        "height": pa.array(sides[1]),
        "sources": pa.array(sources, CORE.field("sources").type),
    }
    rows = {field.name: given.get(field.name, pa.nulls(num_rows, field.type)) for field in CORE}
    table.add_images(pa.table(rows))
    twins = num_rows // 20
    groups = [
        min(ids[row], ids[row ^ 1]) if row < 2 * twins else ids[row] for row in range(num_rows)
    ]
    signatures = rng.integers(0, 256, (num_rows, 16), dtype=np.uint8)
    signatures[:, 15] &= 0xFE  # not flat
    flat = pa.array([sign.tobytes() for sign in signatures], FOLDS["signature"])
    table.write_fold(ids, {"group_id": pa.array(groups), "signature": flat}, stage="dedup")


def _keys(rng: np.random.Generator, count: int) -> list[bytes]:
    data = rng.bytes(16 * count)
    return [data[start : start + 16] for start in range(0, 16 * count, 16)]


def main() -> int:
    """Build, split, check, and say how long each took."""
    num_rows = int(sys.argv[1]) if len(sys.argv) > 1 else 10**6
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        table = PhotoTable.open(Path(folder) / "million.lance", create=True)
        with table.writer():
            start = time.perf_counter()
            fill(table, num_rows)
            print(f"made {num_rows:,} rows in {time.perf_counter() - start:.1f} s (not counted)")
            for config in (SplitConfig(seed=SEED), SplitConfig(seed=SEED, validation=0.05)):
                start, start_cpu = time.perf_counter(), time.process_time()
                report = split_table(table, config, redo=True)
                seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
                slowest = max(slowest, seconds)
                compared = report.certificate["cross_split"]["compared"]
                print(
                    f"{report.certificate['mode']}: {report.validation:,} of {num_rows:,} held out "
                    f"in {seconds:.1f} s ({cpu:.1f} s of processor); compared {compared}"
                )
            start = time.perf_counter()
            is_ok = verify(table).ok
            print(
                f"verified ({'ok' if is_ok else 'NOT OK'}) in {time.perf_counter() - start:.1f} s"
            )
    print(f"slowest split {slowest:.1f} s, limit {LIMIT_S} s")
    return 0 if slowest < LIMIT_S and is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
