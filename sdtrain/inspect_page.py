"""The page of `sdtrain inspect`: one card a sample, with all that decides what is learnt of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from sdtrain.inspect_marks import chunks, colour, levels
from sdtrain.inspect_style import STYLE
from sdtrain.page_parts import pairs
from sdtrain.wording import amount

if TYPE_CHECKING:
    from sdtrain.setup import Setup

Sample = Mapping[str, Any]

MISSING = {"tags": "the row has no tags", "caption": "the row has no caption"}
MODES = {
    "tags": "tags",
    "caption": "caption",
    "tags_caption": "tags, then caption",
    "caption_tags": "caption, then tags",
}


def page_of(setup: Setup, steps: Sequence[Mapping[str, Any]], samples: Sequence[Sample]) -> str:
    """The whole page; pictures lie beside it."""
    body = [
        f"<h1>What {escape(setup.family.name)} is shown first</h1>",
        f'<p class="dim">{escape(setup.data.origin)}; {escape(setup.recipe.model.path)}</p>',
        _tiles(samples),
        f"<details><summary>how samples are made</summary>{_how(setup)}</details>",
    ]
    for step, (_, members) in zip(steps, groupby(samples, lambda each: each["step"]), strict=True):
        body.append(_step(step, list(members)))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>sdtrain inspect</title><style>{STYLE}</style>"
        f"<main>{''.join(body)}</main></html>\n"
    )


def _tiles(samples: Sequence[Sample]) -> str:
    """Counts of what one looks for, over all samples that are shown."""
    cut = sum(bool(each["tokens_cut"] or each["units_removed"]) for each in samples)
    lost = sum(each["crop_percent"] for each in samples) / len(samples)
    tiles = [
        (f"{len(samples)}", "samples", ""),
        (f"{sum(each['dropped'] for each in samples)}", "captions dropped", ""),
        (f"{sum(not each['prompt'] and not each['dropped'] for each in samples)}", "without text")
        + ("bad",),
        (f"{cut}", "prompts cut", "bad"),
        (f"{sum(each['flipped'] for each in samples)}", "mirrored", ""),
        (f"{lost:.1f} %", "cropped away, on average", ""),
    ]
    if any("mask" in each for each in samples):
        kept = sum(each.get("mask_mean", 1.0) for each in samples) / len(samples)
        tiles.append((f"{100 * kept:.1f} %", "of the pictures counts", ""))
    if any(each["slot_weight"] != 1 or each["prior"] for each in samples):
        tiles.append((f"{sum(each['prior'] for each in samples)}", "of the prior", ""))
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="{kind if text != "0" else ""}"><b>{escape(text)}</b>'
            f"<span>{escape(what)}</span></div>"
            for text, what, kind in tiles
        )
        + "</div>"
    )


def _how(setup: Setup) -> str:
    recipe, policy = setup.recipe, setup.data.policy
    data = recipe.data
    weighting = recipe.weighting.model_dump()
    return pairs(
        {
            "prompt policy": f"mode {policy.mode}, dropout {policy.dropout_p:g}, "
            f"at most {policy.max_chunks} chunks",
            "crop": f"{data.crop}, mirrored with probability {data.flip_prob:g}",
            "noise levels": recipe.train.timesteps,
            "weighting": ", ".join(f"{key} {value}" for key, value in weighting.items()),
            "predicts": setup.family.prediction_type,
            "step": f"{data.batch_size} samples, at most {data.micro_batch_size} a forward, all of "
            "one size and one number of chunks",
        }
    )


def _step(step: Mapping[str, Any], samples: Sequence[Sample]) -> str:
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in step["lr"].items())
    spread = "one in each stratum" if step["strata"] else "drawn one by one"
    forwards = "".join(
        f'<span class="tag"><span style="color:{colour(number)}">●</span> forward {number}: '
        f"{len(group)} of {_by(group[0]['bucket'])}, {_chunks(group[0]['chunks'])}</span> "
        for number, group in _by_forward(samples)
    )
    cards = "".join(_card(sample) for sample in samples)
    return (
        f'<h2 id="step{step["step"]}">Step {step["step"]}</h2>'
        f'<div class="step"><p class="dim">begins at {step["samples_seen"]:,} samples; rates: '
        f"{escape(rates)}; noise levels: {spread}</p>{levels(step, samples)}"
        f"<p>{forwards}</p></div>{cards}"
    )


def _by_forward(samples: Sequence[Sample]) -> list[tuple[int, list[Sample]]]:
    return [(number, list(group)) for number, group in groupby(samples, lambda s: s["forward"])]


def _chunks(count: int) -> str:
    return amount(count, "chunk")


def _by(bucket: str) -> str:
    return bucket.replace("x", " × ")


def _card(sample: Sample) -> str:
    return (
        f"<article>{_head(sample)}{_pictures(sample)}"
        f'<div class="words"><div>{_text(sample)}</div><div>{_numbers(sample)}</div></div>'
        "</article>"
    )


def _head(sample: Sample) -> str:
    marks = [
        ("", f"bucket {_by(sample['bucket'])}"),
        ("", f"forward {sample['forward']}"),
        ("", f"visit {sample['visit']}"),
        ("", _chunks(sample["chunks"])),
    ]
    if sample["prior"]:
        marks.append(("on", "prior"))
    if sample["flipped"]:
        marks.append(("on", "mirrored"))
    if sample["dropped"]:
        marks.append(("bad", "caption dropped"))
    if sample["tokens_cut"]:
        marks.append(("bad", f"{amount(sample['tokens_cut'], 'token')} cut off"))
    if sample["units_removed"]:
        marks.append(("bad", f"{sample['units_removed']} tags or words removed to fit"))
    tags = "".join(f'<span class="tag {kind}">{escape(text)}</span>' for kind, text in marks)
    return (
        f'<header><span class="no" style="background:{colour(sample["forward"])}" title="slot">'
        f"{sample['slot']}</span><strong>{escape(sample['id'])}</strong>{tags}</header>"
    )


# --- pictures -------------------------------------------------------------------------------------


def _pictures(sample: Sample) -> str:
    height, width = sample["source_size_hw"]
    top, left, tall, wide = sample["crop"]
    box = _placed("i", left, top, wide, tall)
    boxes = "".join(
        _placed("u", b["x0"], b["y0"], b["x1"] - b["x0"], b["y1"] - b["y0"])
        for b in sample["boxes"]
    )
    mask = ""
    seen = f"the crop, {_by(sample['bucket'])}"
    if "mask" in sample:
        mask = f'<img src="{sample["masked"]}" alt="loss mask: what is tinted does not count">'
        if sample["mask_mean"] < 1:
            seen += f"; {100 * sample['mask_mean']:.1f} % of it counts in the loss"
    if sample["flipped"]:
        seen += "; mirrored"
    source = f"source, {width} × {height}; scaled by {sample['scale']:.3f}, "
    source += f"{sample['crop_percent']:.1f} % cropped away"
    noisy = f"with its noise at {_time(sample)}, as the model gets it"
    aspect = sample["time_ids"][5] / sample["time_ids"][4] if sample["time_ids"][4] else 1.0
    return (
        '<div class="pictures">'
        + _figure(sample["source"], "the source", boxes + box, source, width / height)
        + _figure(sample["picture"], "after the crop", mask, seen, aspect)
        + _figure(sample["through_vae"], "through the VAE", "", "what the VAE keeps of it", aspect)
        + _figure(sample["noisy"], "with its noise", "", noisy, aspect)
        + "</div>"
    )


def _placed(element: str, left: float, top: float, wide: float, tall: float) -> str:
    return (
        f'<{element} style="left:{100 * left:.3f}%;top:{100 * top:.3f}%;'
        f'width:{100 * wide:.3f}%;height:{100 * tall:.3f}%"></{element}>'
    )


def _figure(file: str, alt: str, over: str, caption: str, aspect: float) -> str:
    return (
        f'<figure><a class="shot" href="{file}" style="--aspect:{aspect:.4f}">'
        f'<img src="{file}" alt="{escape(alt)}">{over}</a>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _time(sample: Sample) -> str:
    time = sample["timestep"]
    return f"t = {time:g}" if float(time).is_integer() else f"t = {time:.4g}"


# --- words and numbers ----------------------------------------------------------------------------


def _text(sample: Sample) -> str:
    found = sample["rendering"]
    if sample["dropped"]:
        words = f'<p class="none">caption dropped: the model gets {_uncond(sample)}</p>'
        words += f'<h3>what it would have been</h3><p class="dim">{escape(found["whole"])}</p>'
    elif not sample["prompt"]:
        words = f'<p class="none">the row has no text: the model gets {_uncond(sample)}</p>'
    else:
        words = chunks(sample["layout"])
        if sample["units_removed"]:
            words += "<details><summary>the whole text, before it was made to fit</summary>"
            words += f'<p class="dim">{escape(found["whole"])}</p></details>'
    notes = []
    if found["missing"] in MISSING:
        notes.append(f"{MISSING[found['missing']]}, so the other side stands in")
    if found["spelled"]:
        names = ", ".join(f"{name} → {other}" for name, other in found["spelled"].items())
        notes.append(f"written under another name: {names}")
    lines = "".join(f"<p><small>{escape(note)}</small></p>" for note in notes)
    if found["mode"] == "caption":
        return words + lines
    left_out = _struck("left out this time", found["left_out"])
    return words + lines + left_out + _struck("that the policy never writes", found["never"])


def _struck(title: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    shown = " ".join(f"<b>{escape(name)}</b>" for name in names)
    return f'<h3>{amount(len(names), "tag")} {escape(title)}</h3><p class="struck">{shown}</p>'


def _uncond(sample: Sample) -> str:
    if sample["uncond"] == "zeros":
        return "zeros in place of all of its text"
    return "the empty prompt, encoded like any other"


def _numbers(sample: Sample) -> str:
    ids = sample["time_ids"]
    snr = "–" if sample["logsnr"] is None else f"{math.exp(sample['logsnr']):.4g}"
    weight = f"{sample['weight']:.4g}"
    if sample["slot_weight"] != 1:
        weight += f" × {sample['slot_weight']:g} (prior)"
    facts = {
        "noise level": f"u {sample['u']:.5f}, {_time(sample)}",
        "SNR": snr,
        "loss weight": weight,
        "share of the step": f"{sample['counts']:.4g} × its loss",
        "original h, w": f"{ids[0]}, {ids[1]}",
        "crop top, left": f"{ids[2]}, {ids[3]}",
        "target h, w": f"{ids[4]}, {ids[5]}",
        "time_ids": " ".join(map(str, ids)) if sample["is_told_sizes"] else None,
        "text of": MODES.get(sample["rendering"]["mode"]),
    }
    return pairs(facts)
