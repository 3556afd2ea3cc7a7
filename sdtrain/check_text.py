"""What `sdtrain check` found, as text for people."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from sdtrain.cache import census
from sdtrain.toml_text import toml_line
from sdtrain.wording import amount

WIDTH = 100


def check_text(found: Mapping[str, Any], freeze_table: str) -> str:
    """The report of `check.describe` as lines of text."""
    sections = [
        ("model", _model(found)),
        ("data", _data(found)),
        ("buckets", _buckets(found["buckets"])),
        ("text", _chunks(found["chunks"])),
        ("left out", _dropped(found["dropped"])),
        ("what trains", freeze_table.splitlines()),
        *((phase["text"], phase["table"]) for phase in found["phases"]),
        ("length", _length(found)),
        ("learning rate", _learning_rate(found["learning_rate"])),
        ("evaluation", _evaluation(found["evaluation"])),
        ("cache", census.lines(found["cache"])),
        ("memory and disk", _memory(found)),
        ("the first prompts", _prompts(found["prompts"])),
        ("the recipe, defaults included", _recipe(found["recipe"])),
    ]
    lines = []
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    for title, body in sections:
        lines += [title, *(part for line in body for part in _folded(line, width)), ""]
    return "\n".join(lines).rstrip()


def _folded(line: str, width: int) -> list[str]:
    """One line of a section, cut at blanks where it would not fit; tables stay whole.

    A table is told by two blanks between its cells.
    """
    inner = " " * (2 + len(line) - len(line.lstrip()))
    if len(line) + 2 <= width or "  " in line.strip():
        return ["  " + line]
    return textwrap.wrap(
        line.strip(),
        width,
        initial_indent=inner,
        subsequent_indent=inner + "    ",
        break_on_hyphens=False,
    )


def _dropped(dropped: Mapping[str, int]) -> list[str]:
    lost = ", ".join(
        f"{amount(count, 'row')} of {split}" for split, count in dropped.items() if count
    )
    what = lost or "nothing"
    return [f"{what}; every row that is kept comes in every epoch, the last short step included"]


def _size(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB" if num_bytes else "0"


def _model(found: Mapping[str, Any]) -> list[str]:
    model = found["model"]
    parts = ", ".join(f"{name} {count:,}" for name, count in model["parameters"].items())
    lines = [
        f"{model['family']} from {model['path']}, predicts {model['prediction_type']}",
        f"parameters: {parts}",
        f"fingerprint {model['fingerprint']}, on {found['device']}",
        "hashes: " + ", ".join(f"{part} {hash_[:12]}" for part, hash_ in model["hashes"].items()),
    ]
    if model["files"]:
        files = ", ".join(f"{file} {_size(size)}" for file, size in model["files"].items())
        lines.append(f"files: {files}")
    if model["stored"]:
        stored = ", ".join(f"{part} {kind}" for part, kind in model["stored"].items())
        lines.append(f"stored as: {stored}")
    lines.append(_world(found["world"]))
    lines += [f"WARNING: {conflict}" for conflict in found["conflicts"]]
    if found["gpu_without_torch"]:
        lines.append("WARNING: there is an NVIDIA GPU that this torch cannot use (CPU build?)")
    return lines


def _world(world: Mapping[str, Any]) -> str:
    count, gpus = world["processes"], world["gpus"]
    if count == 1:
        more = f"; --num-processes {gpus} would use all {gpus} GPUs" if gpus > 1 else ""
        return f"one process{more}"
    least, most = world["samples_per_process"]
    share = f"{least}" if least == most else f"{least} or {most}"
    text = f"{count} processes ({world['engine']}), {share} samples of a step each"
    if 0 < gpus < count:
        text += f"; WARNING: PyTorch sees {gpus} GPUs"
    return text


def _data(found: Mapping[str, Any]) -> list[str]:
    data = found["data"]
    lines = [data["origin"], f"fingerprint {data['fingerprint']}"]
    for name, split in data["splits"].items():
        refused = ", ".join(f"{reason} {count}" for reason, count in split["refused"].items())
        lines.append(
            f"{name}: {split['kept']:,} of {split['rows']:,} rows kept; "
            f"refused: {refused or 'none'}"
        )
        lines += [f"  {example}" for example in split["examples"]]
    if "validation" in data["splits"]:
        shared = data["groups_in_both_splits"]
        groups = "" if shared is None else f"; groups of near duplicates in both: {shared:,}"
        warning = "WARNING: " if data["in_both_splits"] or shared else ""
        lines.append(f"{warning}images in both splits: {data['in_both_splits']:,}{groups}")
    else:
        lines.append("WARNING: no validation split; only the training images can be evaluated")
    lines.append(f"prompt policy: {data['policy_words']}")
    lines.append(f"policy from: {data['policy_origin']}")
    return [*lines, *_masks(data["masks"]), *_prior(data["prior"]), *data["notes"]]


def _prior(prior: Mapping[str, Any] | None) -> list[str]:
    if prior is None:
        return []
    return [
        f"prior: {prior['fraction']:.4g} of all samples are of {prior['origin']}, "
        f"{prior['kept']:,} of {prior['rows']:,} rows kept, weight {prior['weight']:g}",
        f"prompts of the prior: {prior['policy_words']}; [prompt] leaves them alone",
    ]


def _masks(masks: Mapping[str, Any] | None) -> list[str]:
    if masks is None:
        return []
    labels = ", ".join(f"{label} {rows:,}" for label, rows in masks["rows_by_label"].items())
    return [
        f"masks: {masks['rows']:,} rows of train have boxes of {', '.join(masks['boxes'])}, which "
        f"count {masks['weight']:g} in the loss; rows by label: {labels}"
    ]


def _buckets(table: Sequence[Mapping[str, Any]]) -> list[str]:
    head = f"{'width x height':>14} {'rows':>9} {'runs':>7} {'crop % mean':>12} {'max':>7}"
    return [
        head,
        *(
            f"{line['bucket']:>14} {line['rows']:>9,} {line['runs_at_least']:>7,} "
            f"{line['crop_percent_mean']:>12.2f} {line['crop_percent_max']:>7.2f}"
            for line in table
        ),
    ]


def _chunks(chunks: Mapping[str, Any]) -> list[str]:
    shares = chunks["percent_by_chunks"]
    by_chunks = chunks["rows_by_chunks"].items()
    counts = ", ".join(f"{n}: {rows:,} ({shares[n]:g} %)" for n, rows in by_chunks)
    return [
        f"prompts by chunks of 75 tokens, {_looked_at(chunks)}: {counts}",
        f"cut at model.max_chunks: {amount(chunks['cut'], 'prompt')}, by "
        f"{amount(chunks['tokens_cut'], 'token')}",
        f"shortened to fit prompt.max_chunks: {amount(chunks['shortened'], 'prompt')}, by "
        f"{chunks['units_removed']:,} tags or words",
        f"without any text: {chunks['without_text']:,}",
        f"captions dropped: {chunks['dropped']:,}; empty prompts in all: {chunks['empty']:,}",
    ]


def _looked_at(chunks: Mapping[str, Any]) -> str:
    """All samples of the first epoch, or the first of them."""
    count, total = chunks["looked_at"], chunks["of"]
    of_all = "" if count == total else f" of {total:,}"
    return f"first epoch, {count:,}{of_all} samples"


def _length(found: Mapping[str, Any]) -> list[str]:
    length = found["length"]
    return [
        f"{length['samples']:,} samples = {length['steps']:,} steps of {length['batch_size']} "
        f"= {length['epochs']:.4g} epochs; the last step has {length['last_step_samples']}",
        f"micro-batch {length['micro_batch_size']}: the first step takes "
        f"{amount(length['forwards_in_first_step'], 'forward')}",
        f"a checkpoint every {length['checkpoint_every_samples']:,} samples",
    ]


def _learning_rate(rates: Mapping[str, Any]) -> list[str]:
    lines = [
        rates["sketch"],
        "at samples " + "  ".join(f"{clock:,}" for clock in rates["samples_seen"]),
    ]
    for name, values in rates["lr"].items():
        lines.append(f"{name}: " + "  ".join(f"{value:.3g}" for value in values))
    if rates["scaled_by"] != 1:
        lines.append(f"these are the recipe's rates times {rates['scaled_by']:.6g} (lr_scaling)")
    past = " after the warm-up" if rates["warmup_samples"] else ""
    lines.append(
        f"largest change from one step to the next{past}: "
        f"x{rates['worst_ratio']:.4g}, at {rates['worst_ratio_at']:,} samples"
    )
    return lines


def _evaluation(evaluation: Mapping[str, Any]) -> list[str]:
    images, levels = evaluation["images"], evaluation["timesteps_per_image"]
    sees = evaluation["resolves_percent_expected"]
    probes = [
        f"{name} {amount(images[name], 'image')} x {levels[name]} (sees about ±{sees[name]:.2g} %)"
        for name in images
        if images[name]
    ]
    both = ", with the averaged weights as well" if evaluation["with_ema"] else ""
    return [
        f"{', '.join(probes) or 'none'}{both} = {evaluation['forwards_each_time']:,} forwards, "
        f"every {evaluation['every_samples']:,} samples, {evaluation['times']} times: "
        f"{evaluation['percent_of_training']:.3g} % of the training's own work"
    ]


def _memory(found: Mapping[str, Any]) -> list[str]:
    memory, device = found["memory"], found["device_bytes"]
    names = ("weights", "gradients", "optimizer", "ema", "activations")
    sizes = [(n.replace("ema", "averages"), memory[n]) for n in names if memory[n] is not None]
    needed = memory["total"] or memory["total_without_activations"]
    forward = memory["largest_forward"]
    lines = [
        f"{' + '.join(f'{name} {_size(value)}' for name, value in sizes)} = {_size(needed)}",
        f"the largest forward: {amount(forward['samples'], 'sample')} of {forward['width']}x"
        f"{forward['height']}, {amount(forward['chunks'], 'chunk')}",
    ]
    if memory["total"] is None:
        lines.append(f"activations come on top: unknown ({memory['why_no_activations']})")
    if device is not None:
        lines.append(f"{found['device']} has {_size(device)}")
        if needed > device:
            lines.append(
                "WARNING: that does not fit; set model.gradient_checkpointing, lower "
                "data.micro_batch_size, train fewer parts, or an adapter"
            )
    saved, kept = found["checkpoint_bytes"], found["recipe"]["checkpoint"]["keep"]
    return [
        *lines,
        f"one checkpoint takes about {_size(saved)}, the newest {kept} about {_size(kept * saved)}",
    ]


def _prompts(prompts: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for prompt in prompts:
        text = "(dropped)" if prompt["dropped"] else repr(prompt["prompt"])
        lines.append(
            f"{prompt['id']} in {prompt['bucket']}, {amount(prompt['chunks'], 'chunk')}: {text}"
        )
        if prompt["time_ids"] is not None:
            lines.append(f"  time_ids {prompt['time_ids']}")
    return lines


def _recipe(recipe: Mapping[str, Any]) -> list[str]:
    """A line for each section; what stands before the first section comes first."""
    plain = {key: value for key, value in recipe.items() if not isinstance(value, Mapping)}
    sections = {key: value for key, value in recipe.items() if isinstance(value, Mapping)}
    return [
        toml_line(plain),
        *(f"[{name}] {toml_line(section)}" for name, section in sections.items() if section),
    ]
