"""The card of a published data set: README.md with front matter for the Hub, and its pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdprep.bucket_table import BucketTable, bucket_table
from sdprep.buckets import bucket_list
from sdprep.card_facts import Facts
from sdprep.card_pictures import contact_sheet, plot_buckets, plot_counts
from sdprep.card_text import fenced, plain, table
from sdprep.console import megabytes
from sdprep.private_paths import hide_paths
from sdprep.schema import SPLITS

ASSETS = "assets"
_SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"))
_LARGER = ((1e7, "1M<n<10M"), (1e8, "10M<n<100M"), (1e9, "100M<n<1B"), (1e10, "1B<n<10B"))
_HUB_LICENSES = (
    "apache-2.0 mit openrail creativeml-openrail-m openrail++ gpl-3.0 agpl-3.0 pddl unknown "
    "cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 "
    "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 "
    "cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0"
)
"""Licence ids that the Hub knows and images have; any other becomes `other` with its name."""

COLUMNS = {
    "id": "128-bit BLAKE2b of the original file, hex",
    "image": "the original pixels, never re-encoded; of its metadata only colour profile and "
    "orientation remain",
    "width, height": "upright pixels",
    "caption, captions": "the caption in use; all captions with their sources",
    "tags": "name, category, score and source of each tag",
    "score, score_raw": "quality from 1 to 9; the same before rounding",
    "signature": "128-bit perceptual hash, for finding near duplicates",
    "rating, source, license": "as far as known",
    "group_id": "near duplicates that were found share it, and lie in one split",
    "boxes": "detections, as fractions of the upright image",
    "repeats": "how often the curator wants the image per epoch",
    "stable_train": "images of train that serve as its fixed probe",
    "validation_prompt": "the prompt that validation uses, without noise",
}


def write_card(
    folder: Path,
    manifest: Mapping[str, Any],
    facts: Facts,
    *,
    title: str,
    recipe_text: str | None = None,
    repo: str | None = None,
) -> None:
    """Write README.md and assets/ into the folder of a data set that is otherwise complete.

    Args:
        folder: of the data set.
        manifest: what goes into `sdprep.json`.
        facts: counts over the published rows; at least one row.
        title: heading; shown as it is, never as Markdown.
        recipe_text: the recipe as written, or None.
        repo: name on the Hub, if it is known.
    """
    assets = folder / ASSETS
    assets.mkdir(exist_ok=True)
    buckets = bucket_table(facts.widths, facts.heights, bucket_list())
    samples = facts.samples()
    if samples:
        contact_sheet(samples, assets / "samples.jpg")
    plot_buckets(buckets, facts.widths, facts.heights, assets / "sizes.png")
    has_counts = any(facts.tags_per_image) or any(facts.scores.values())
    if has_counts:
        plot_counts(facts.tags_per_image, facts.scores, assets / "counts.png")
    parts = [
        f"# {plain(title)}",
        _summary(facts),
        f"![Sample images]({ASSETS}/samples.jpg)" if samples else "",
        _loading(repo or "USER/NAME"),
        _contents(facts),
        f"![Buckets and image sizes]({ASSETS}/sizes.png)",
        f"![Tags per image and scores]({ASSETS}/counts.png)" if has_counts else "",
        _columns(),
        _buckets(buckets),
        _sources(facts),
        _certificate(manifest),
        _making(manifest, recipe_text),
        _limits(manifest, facts),
    ]
    body = "\n\n".join(part for part in parts if part)
    text = f"---\n{front_matter(manifest, facts, title)}---\n\n{body}\n"
    (folder / "README.md").write_text(text, encoding="utf-8", newline="\n")


def front_matter(manifest: Mapping[str, Any], facts: Facts, title: str) -> str:
    """YAML for the Hub: licence, size, files of each split, features."""
    import yaml

    pattern = "{}.lance/**" if manifest["format"] == "lance" else "data/{}-*.parquet"
    files = [{"split": s, "path": pattern.format(s)} for s in SPLITS if facts.rows[s]]
    licences = sorted({licence for _, licence in facts.sources})
    matter: dict[str, Any] = {"pretty_name": title[:200]}
    if len(licences) == 1 and licences[0]:
        known = licences[0].lower() in _HUB_LICENSES.split()
        matter["license"] = licences[0].lower() if known else "other"
        if not known:
            matter["license_name"] = licences[0][:200]
    elif any(licences):
        matter |= {"license": "other", "license_name": "several, see the card"}
    size = next((name for top, name in _SIZES + _LARGER if facts.num_rows < top), "n>1T")
    matter |= {
        "task_categories": ["text-to-image"],
        "size_categories": [size],
        "tags": ["sdprep", "stable-diffusion", "image", "fine-tuning"],
        "configs": [{"config_name": "default", "data_files": files}],
        "dataset_info": {"features": yaml_features(manifest["features"])},
    }
    return yaml.safe_dump(matter, sort_keys=False, allow_unicode=True, width=100)


def yaml_features(features: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Features as `dataset_info` in front matter lists them."""
    listed: list[dict[str, Any]] = []
    for name, feature in features.items():
        kind = feature.get("_type")
        if kind == "List":
            listed.append({"name": name, "list": yaml_features(feature["feature"])})
        else:
            listed.append({"name": name, "dtype": feature.get("dtype", str(kind).lower())})
    return listed


def _summary(facts: Facts) -> str:
    train, validation = (facts.rows[split] for split in SPLITS)
    held_out = (
        f"{validation:,} of them held out for validation" if validation else "all for training"
    )
    return f"**{facts.num_rows:,} images** for fine-tuning text-to-image models, {held_out}."


def _loading(repo: str) -> str:
    return "## How to load it\n\n" + fenced(
        "from datasets import load_dataset\n"
        f'data = load_dataset("{repo}")  # or the path of this folder\n'
        'data["train"][0]["image"].show()',
        "python",
    )


def _contents(facts: Facts) -> str:
    rows = [
        [split, f"{facts.rows[split]:,}", megabytes(facts.num_bytes[split])]
        + [f"{facts.captioned[split]:,}", f"{facts.scores[split].total():,}"]
        for split in SPLITS
        if facts.rows[split]
    ]
    formats = ", ".join(f"{plain(name)} {num:,}" for name, num in facts.formats.most_common())
    num_tags = sum(facts.tags.values())
    lines = [f"- File formats: {formats}"]
    if num_tags:
        common = sorted(facts.tags.items(), key=lambda entry: (-entry[1], entry[0]))[:25]
        names = ", ".join(f"{plain(name, 40)} ({num:,})" for name, num in common)
        lines += [f"- {num_tags / facts.num_rows:.1f} tags an image, {len(facts.tags):,} different"]
        lines += [f"- Most common tags: {names}"]
    if any(facts.ratings):
        rated = ", ".join(
            f"{plain(name or 'unrated')} {num:,}" for name, num in facts.ratings.most_common()
        )
        lines += [f"- Ratings: {rated}"]
    if facts.num_boxes:
        lines += [f"- {facts.num_boxes:,} boxes"]
    head = ["split", "images:", "size:", "with caption:", "with score:"]
    return "\n\n".join(["## What is in it", table(head, rows), "\n".join(lines)])


def _columns() -> str:
    def code(names: str) -> str:
        return ", ".join(f"`{name}`" for name in names.split(", "))

    rows = [[code(names), meaning] for names, meaning in COLUMNS.items()]
    return "## Columns\n\n" + table(["column", "what it holds"], rows)


def _buckets(buckets: BucketTable) -> str:
    rows = [
        [str(row.bucket).replace("x", " × "), f"{row.count:,}", f"{row.upscaled:,}"]
        + [f"{row.mean_crop_percent:.1f}", f"{row.max_crop_percent:.1f}"]
        for row in buckets.rows
    ]
    if len(rows) > 1:
        total = [f"{buckets.count:,}", f"{buckets.upscaled:,}", f"{buckets.mean_crop_percent:.1f}"]
        cells = ["all", *total, f"{buckets.max_crop_percent:.1f}"]
        rows.append([f"**{cell}**" for cell in cells])
    head = ["width × height", "images:", "enlarged:", "mean crop %:", "largest crop %:"]
    intro = "What aspect buckets of one megapixel (SDXL's list) would make of the images."
    return f"## Buckets\n\n{intro}\n\n{table(head, rows)}"


def _sources(facts: Facts) -> str:
    ordered = sorted(facts.sources.items(), key=lambda entry: (-entry[1], entry[0]))
    rows = [
        [plain(source or "unknown"), plain(licence or "not stated"), f"{num:,}"]
        for (source, licence), num in ordered[:50]
    ]
    if len(ordered) > 50:
        rest = sum(num for _, num in ordered[50:])
        rows.append([f"{len(ordered) - 50} more", "", f"{rest:,}"])
    return "## Sources and licences\n\n" + table(["source", "licence", "images:"], rows)


def _certificate(manifest: Mapping[str, Any]) -> str:
    head = "## Train and validation"
    certificate = manifest.get("certificate")
    if not certificate:
        return f"{head}\n\nThere is no split certificate: the table was published without a split."
    rows = [
        [plain(name.replace("_", " ")), plain(value, 120)] for name, value in _flat(certificate)
    ]
    return (
        f"{head}\n\nNear duplicates share a group, and no group is in both splits. "
        "The full certificate is in `sdprep.json`; `sdprep split --verify` checks it.\n\n"
        + table(["certificate", "value"], rows)
    )


def _flat(certificate: Mapping[str, Any], inner: bool = False) -> Iterator[tuple[str, Any]]:
    """Single values of a certificate, and of the sections right below it."""
    for name, value in certificate.items():
        if isinstance(value, str | int | float):
            yield name, value
        elif isinstance(value, dict) and not inner:
            yield from ((f"{name}: {key}", one) for key, one in _flat(value, inner=True))


def _making(manifest: Mapping[str, Any], recipe_text: str | None) -> str:
    parts = ["## How it was made"]
    if recipe_text:
        parts += ["Recipe (absolute paths shortened):", fenced(hide_paths(recipe_text), "toml")]
    aliases = manifest["policy"].get("aliases") or {}
    shown = {**manifest["policy"], "aliases": f"of {len(aliases)} tags, in sdprep.json"}
    policy = hide_paths(
        json.dumps(shown if aliases else manifest["policy"], ensure_ascii=False, indent=1)
    )
    parts += ["Prompt policy, from which trainers render each prompt anew:", fenced(policy, "json")]
    prints = manifest["fingerprints"]
    if prints:
        rows = [[plain(name), plain(text, 200)] for name, text in prints.items()]
        parts += ["Models and rules that annotated the images:", table(["column", "made by"], rows)]
    if manifest["score"]:
        parts += [f"The column `score` comes from {plain(manifest['score'])}."]
    parts += [f"`SCHEMA_VERSION` {manifest['SCHEMA_VERSION']}"]
    return "\n\n".join(parts)


def _limits(manifest: Mapping[str, Any], facts: Facts) -> str:
    lines = [
        "Tags, captions, scores and boxes that models made are guesses; nobody checked them all.",
        "Licences and sources are what came with the images; they were not verified.",
        "Faces and other personal content in the pixels are as they were.",
    ]
    if not facts.rows["validation"]:
        lines.append("There is no validation split, so no trainer can measure how well it learns.")
    unrated = facts.ratings[""]
    if unrated:
        lines.append(f"{unrated:,} images have no rating; any of them may be unsuitable for work.")
    lines += [
        f"{num:,} images were left out: {plain(reason)}."
        for reason, num in manifest["left_out"].items()
    ]
    if manifest["repacked_as_png"]:
        lines.append(f"{manifest['repacked_as_png']:,} images of other formats are stored as PNG.")
    return "## Known limits\n\n" + "\n".join(f"- {line}" for line in lines)
