"""How far StableEval and other ways of validating are from the truth, on models really trained.

    python tools/bench/stable_eval_error.py SCRATCH [--photos DIR] [--images 12] [--draws 2]

Trains tiny models on photos, measures the loss of each at 1,000 timesteps, then draws every
estimate thousands of times from those matrices, so that the truth is known. Writes
`results/stable_eval_error.json` and `.md`. About 20 minutes of one CPU core, or three with a GPU
(`--device cuda`); a second call reads what the first one measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import stable_eval_models as models
from scipy.stats import t

from sdprep.seeding import rng_for
from sdtrain.lattice import NUM_STRATA, Warp, lattice, pilot_points, warp_from_pilot
from sdtrain.paired import compare
from sdtrain.tiny import write_tiny

LEVELS = (np.arange(models.TIMESTEPS) + 0.5) / models.TIMESTEPS
TRIALS, RESAMPLES, POWER_TRIALS = 2000, 4000, 2000
ASKED = (16, 4)  # images and levels of the coverage and power trials
RESULTS = Path(__file__).resolve().parent / "results"
PHOTOS = Path(__file__).resolve().parents[1] / "demo_photos" / "photos"

NOTE = (
    "The truth of a resample is the change in percent of its own images over all 1,000 timesteps "
    "and all draws of noise; for new images, that of all photos. Before it was a ratio's (see "
    "CONTRIBUTING.md), the interval for new images, from the scatter of the differences alone, "
    "held the change in percent in the share that stands in brackets."
)

Pair = tuple[np.ndarray, np.ndarray]
"""(images, 1000, draws) losses of two models at the same points."""


def main() -> None:
    """Train, measure, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scratch", type=Path, help="folder for models and matrices")
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    parser.add_argument("--images", type=int, default=12, help="held-out photos in the matrices")
    parser.add_argument("--draws", type=int, default=2, help="of noise at each timestep")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; trials run on the CPU")
    options = parser.parse_args()
    pairs, planted, facts = measured(options)
    found: dict[str, Any] = {"setting": facts, "pairs": {}}
    for name, pair in pairs.items():
        found["pairs"][name] = {
            "change_percent": truth(pair),
            "errors": [
                errors(pair, shape) for shape in ((4, 4), (options.images, 4), (options.images, 16))
            ],
            "coverage": coverage(pair),
        }
    found["planted"] = {name: power(pair) for name, pair in planted.items()}
    found["sign_flips"] = {name: flips(pair) for name, pair in pairs.items()}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    (RESULTS / "stable_eval_error.json").write_text(text, encoding="utf-8")
    page = table(found)
    (RESULTS / "stable_eval_error.md").write_text(page, encoding="utf-8")
    print(page)


# --- models and matrices -------------------------------------------------------------------------


def measured(options: Any) -> tuple[dict[str, Pair], dict[str, Pair], dict[str, Any]]:
    """The named pairs, the planted ones, and how they were made."""
    scratch: Path = options.scratch
    pictures = models.photos(options.photos)
    order = rng_for("bench split", len(pictures)).permutation(len(pictures))
    shown = [pictures[at] for at in order[: options.images]]
    others = [pictures[at] for at in order[options.images :]]
    if not (scratch / "tiny").is_dir():
        write_tiny("sd15", scratch / "tiny", 3)
    many = models.write_data(scratch / "many", others)
    few = models.write_data(scratch / "few", others[:10])
    base_path = models.trained(scratch / "base", scratch / "tiny", many, 2400, 2e-3, options.device)
    jobs = {
        "tuned": (many, 2400, 1e-3),
        "overfitted": (few, 800, 5e-4),
        "spoilt": (few, 1600, 1e-3),
        "ten steps": (many, 80, 1e-3),
    }
    paths = {"base": base_path} | {
        name: models.trained(scratch / name.replace(" ", "_"), base_path, *job, options.device)
        for name, job in jobs.items()
    }
    families = {name: models.load(path, options.device) for name, path in paths.items()}
    cache = scratch / "matrices"

    def losses(name: str) -> np.ndarray:
        return models.matrix(families[name], shown, options.draws, cache, LEVELS)

    start = losses("base")
    pairs = {f"base → {name}": (start, losses(name)) for name in ("tuned", "overfitted", "spoilt")}
    planted = {}
    nudge = models.ten_steps_nudge(families["base"], families["ten steps"])
    for kind in ("announced_percent", "announced_new_images_percent"):
        share, pair = planted_pair(families, shown, nudge, cache, start, kind)
        planted[f"{kind}, share {share:.4f}"] = pair
    facts = {
        "photos": f"{len(pictures)} photos, {len(shown)} held out, 64 px, 16x16 latents",
        "matrix": list(start.shape),
        "device": options.device,
        "trained": "base 2,400 samples; tuned 2,400 more; on 10 photos overfitted 800 and "
        "spoilt 1,600 more",
    }
    return pairs, planted, facts


def planted_pair(
    families: dict[str, Any], shown: Any, nudge: Any, cache: Path, start: np.ndarray, kind: str
) -> tuple[float, Pair]:
    """The smallest share of base → tuned whose change is three times what is announced for it."""

    def planted(share: float) -> tuple[float, Pair]:
        before = models.mixed(families["base"], families["tuned"], share, nudge)
        pair = start[:, :, :1], models.matrix(families["base"], shown, 1, cache, LEVELS)
        models.put_back(families["base"], before)
        found = power(pair, trials=200)
        ratio = -found["change_percent"] / found[kind]
        moved = f"moves {found['change_percent']:+.4f} %, {ratio:.3f} times"
        print(f"{kind}: share {share:.4f} {moved}", flush=True)
        return ratio, pair

    low, high = 0.0, 0.02
    ratio, pair = planted(high)
    while ratio < 3 and high < 1:
        low, high = high, min(1.0, 2 * high)
        ratio, pair = planted(high)
    share = high
    while abs(ratio - 3) > 0.03 and high - low > 1e-3:
        share = (low + high) / 2
        ratio, pair = planted(share)
        low, high = (low, share) if ratio > 3 else (share, high)
    return share, pair


# --- estimates -----------------------------------------------------------------------------------


def truth(pair: Pair, images: Any = slice(None)) -> float:
    """Change in percent over all timesteps and draws of some images."""
    a, b = (float(matrix[images].astype(np.float64).mean()) for matrix in pair)
    return 100 * (b / a - 1)


def percent(a: np.ndarray, b: np.ndarray) -> float:
    """Change of the mean."""
    return float(100 * (b.mean() / a.mean() - 1))


def warp_of(a: np.ndarray, trial: int) -> Warp:
    """The pilot of sample 0, read from the matrix."""
    which, u = pilot_points(trial, "bench", len(a))
    draw = rng_for("pilot draw", trial).integers(a.shape[2], size=len(u))
    losses = a[which, (u * models.TIMESTEPS).astype(int), draw]
    return warp_from_pilot(losses.reshape(NUM_STRATA, -1).mean(1))


def stable_eval(
    pair: Pair, images: np.ndarray, num_levels: int, trial: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What StableEval would store for some images: two weighted (n, m) matrices, and their u."""
    n = len(images)
    warp = warp_of(pair[0][images], trial)
    u = warp.quantile(lattice(trial, "bench", n, num_levels))
    at = (images[:, None], (u * models.TIMESTEPS).astype(int))
    draw = rng_for("noise draw", trial).integers(pair[0].shape[2], size=u.shape)
    q = warp.density(u)
    a, b = (matrix[(*at, draw)].astype(np.float64) / q for matrix in pair)
    return a, b, u


def errors(pair: Pair, shape: tuple[int, int]) -> dict[str, Any]:
    """Root mean square error of each way at equal forwards, in percent of the loss."""
    n, m = shape
    count, draws = n * m, pair[0].shape[2]
    missed: dict[str, list[float]] = {way: [] for way in ("random", "iid", "buckets", "ours")}
    for trial in range(TRIALS):
        rng = rng_for("errors", n, m, trial)
        images = rng.permutation(len(pair[0]))[:n]
        true = truth(pair, images)
        rows = np.repeat(images, m)

        def points(levels: np.ndarray, rows: np.ndarray = rows, rng: Any = rng) -> Any:
            return rows, levels, rng.integers(draws, size=len(rows))

        a, b = (
            matrix[points(rng.integers(models.TIMESTEPS, size=count))].astype(float)
            for matrix in pair
        )
        missed["random"].append(percent(a, b) - true)
        at = points(rng.integers(models.TIMESTEPS, size=count))
        missed["iid"].append(percent(pair[0][at].astype(float), pair[1][at].astype(float)) - true)
        quarter = np.tile(np.arange(m) % 4, n) * (models.TIMESTEPS // 4)
        at = points(quarter + rng.integers(models.TIMESTEPS // 4, size=count))
        missed["buckets"].append(
            percent(pair[0][at].astype(float), pair[1][at].astype(float)) - true
        )
        missed["ours"].append(percent(*stable_eval(pair, images, m, trial)[:2]) - true)
    rmse = {way: float(np.sqrt(np.mean(np.square(of)))) for way, of in missed.items()}
    needed = {way: count * (error / rmse["ours"]) ** 2 for way, error in rmse.items()}
    bias = {way: float(np.mean(of)) for way, of in missed.items()}
    return {"forwards": count, "shape": shape, "rmse": rmse, "bias": bias, "needed": needed}


def coverage(pair: Pair) -> dict[str, Any]:
    """How often the intervals hold the truth, over images drawn with replacement."""
    n, m = ASKED
    everywhere = truth(pair)
    by_image = [matrix.astype(np.float64).mean((1, 2)) for matrix in pair]
    hits_new, hits_plain, hits_here, widths, misses = 0, 0, 0, [], []
    for trial in range(RESAMPLES):
        images = rng_for("resample", trial).integers(len(pair[0]), size=n)
        a, b, u = stable_eval(pair, images, m, trial)
        found = compare(a, b, u)
        assert found.ci95_percent is not None
        assert found.ci95_new_images_percent is not None
        here = percent(*(mean[images] for mean in by_image))
        hits_here += found.ci95_percent[0] <= here <= found.ci95_percent[1]
        low, high = found.ci95_new_images_percent
        hits_new += low <= everywhere <= high
        scatter = 100 * (b - a).mean(1).std(ddof=1) / a.mean() / np.sqrt(n)
        hits_plain += abs(found.change_percent - everywhere) <= t.ppf(0.975, n - 1) * scatter
        widths.append((found.ci95_percent[1] - found.ci95_percent[0]) / 2)
        misses.append(found.change_percent - here)
    justified = 1.96 * float(np.std(misses))
    return {
        "shape": ASKED,
        "new_images": hits_new / RESAMPLES,
        "new_images_by_differences_alone": hits_plain / RESAMPLES,
        "this_set": hits_here / RESAMPLES,
        "this_set_width_to_justified": float(np.mean(widths)) / justified,
    }


# --- power and honesty ---------------------------------------------------------------------------


def power(pair: Pair, trials: int = POWER_TRIALS) -> dict[str, Any]:
    """How often a planted change is found, on these images and for new ones."""
    results = [planted_trial(pair, trial) for trial in range(trials)]
    changes, here, new, found_here, found_new = (np.array(of) for of in zip(*results, strict=True))
    return {
        "change_percent": truth(pair),
        "announced_percent": float(here.mean()),
        "announced_new_images_percent": float(new.mean()),
        "estimate_percent": float(changes.mean()),
        "found": float(found_here.mean()),
        "found_for_new_images": float(found_new.mean()),
    }


def planted_trial(pair: Pair, trial: int) -> tuple[float, float, float, bool, bool]:
    """One look at a planted change."""
    images = rng_for("power", trial).integers(len(pair[0]), size=ASKED[0])
    found = compare(*stable_eval(pair, images, ASKED[1], trial))
    assert found.resolves_percent is not None
    assert found.resolves_new_images_percent is not None
    return (
        found.change_percent,
        found.resolves_percent,
        found.resolves_new_images_percent,
        found.direction < 0,
        found.direction_new_images < 0,
    )


def flips(pair: Pair) -> dict[str, float]:
    """How often a difference for new images is claimed where each image's sign is drawn."""
    claims = 0
    for trial in range(POWER_TRIALS):
        rng = rng_for("flips", trial)
        images = rng.integers(len(pair[0]), size=ASKED[0])
        a, b, u = stable_eval(pair, images, ASKED[1], trial)
        sign = rng.choice([-1.0, 1.0], size=(len(images), 1))
        claims += compare(a, a + sign * (b - a), u).direction_new_images != 0
    return {"claimed": claims / POWER_TRIALS}


# --- words ---------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """The results as a page."""
    lines = ["# StableEval: errors, intervals, power", "", str(found["setting"]), ""]
    for name, pair in found["pairs"].items():
        lines += [f"## {name}: {pair['change_percent']:+.4f} %", ""]
        lines += [
            "| forwards | random | fixed-seed iid | 4 buckets | ours | iid needs | 4 buckets need |"
        ]
        lines += ["|-|-|-|-|-|-|-|"]
        for row in pair["errors"]:
            rmse, needed = row["rmse"], row["needed"]
            lines.append(
                f"| {row['forwards']} ({row['shape'][0]} x {row['shape'][1]}) "
                + "".join(f"| {rmse[way]:.4f} " for way in ("random", "iid", "buckets", "ours"))
                + f"| {needed['iid']:.0f} (x{needed['iid'] / row['forwards']:.2f}) "
                + f"| {needed['buckets']:.0f} (x{needed['buckets'] / row['forwards']:.2f}) |"
            )
        cover = pair["coverage"]
        lines += [
            "",
            f"Intervals at {ASKED[0]} x {ASKED[1]}: new images hold the truth in "
            f"{100 * cover['new_images']:.2f} % "
            f"({100 * cover['new_images_by_differences_alone']:.2f} %), this set in "
            f"{100 * cover['this_set']:.2f} %, "
            f"{cover['this_set_width_to_justified']:.3f} times as wide as justified.",
            f"Signs of images flipped: claimed in "
            f"{100 * found['sign_flips'][name]['claimed']:.2f} %.",
            "",
        ]
    lines += [NOTE, "", "## Planted changes of three times the announced resolution", ""]
    for name, of in found["planted"].items():
        lines.append(
            f"- {name}: {of['change_percent']:+.4f} %, announced {of['announced_percent']:.4f} % "
            f"on these images, {of['announced_new_images_percent']:.4f} % for new ones; found in "
            f"{100 * of['found']:.2f} % on these images, {100 * of['found_for_new_images']:.2f} % "
            "for new ones."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
