"""The first batches as the model sees them, written down for people to look at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdprep.buckets import fit
from sdprep.prompt_explained import explain_prompt
from sdtrain.batch import Batch
from sdtrain.buckets import Slot
from sdtrain.cut_text import CutText
from sdtrain.inspect_page import page_of
from sdtrain.loader import MicroBatch, load
from sdtrain.outputs import require_folder
from sdtrain.pixels import picture_of
from sdtrain.prior import PREFIX
from sdtrain.setup import Setup

SOURCE_SIDE_PX = 768
"""Longest side of the pictures of whole sources."""

MOST_CHUNKS = 100
"""For texts as they would be if they had room."""

MASK_COLOUR = (214, 40, 57)
MASK_OPACITY = 0.6


def inspect(setup: Setup, to: Path, num_steps: int) -> dict[str, Any]:
    """Write the samples of the first optimizer steps: pictures, `index.html`, `samples.json`.

    Args:
        setup: the run; nothing of it is trained.
        to: folder, made if absent.
        num_steps: optimizer steps to show.

    Returns:
        path of the page, every sample as in `samples.json`, and every step.

    Raises:
        UserError: `to` can be no folder.
    """
    require_folder(to).mkdir(parents=True, exist_ok=True)
    samples: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    for index, parts in enumerate(_parts(setup, num_steps)):
        shown = [
            sample
            for number, (micro, batch) in enumerate(parts)
            for sample in _forward(setup, to, (index, number), micro, batch)
        ]
        samples += shown
        steps.append(_step(setup, index, parts[0][0], shown))
    _write(to / "samples.json", json.dumps(samples, indent=1, ensure_ascii=False) + "\n")
    _write(to / "index.html", page_of(setup, steps, samples))
    return {"path": str(to / "index.html"), "samples": samples, "steps": steps}


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _parts(setup: Setup, num_steps: int) -> Iterator[list[tuple[MicroBatch, Batch]]]:
    """The forwards of one step after the other."""
    loaded = load(setup.reader(), setup.micro_batches(), workers=0)
    for index, (_, parts) in enumerate(groupby(loaded, lambda part: part[0].step.samples_seen)):
        if index == num_steps:
            return
        yield list(parts)


def _step(
    setup: Setup, index: int, micro: MicroBatch, samples: list[dict[str, Any]]
) -> dict[str, Any]:
    """What holds for a whole optimizer step."""
    slots, clock = micro.step.slots, micro.step.samples_seen
    area = sum(slot.bucket.width * slot.bucket.height for slot in slots) / len(slots)
    edges = torch.arange(len(slots) + 1, dtype=torch.float64) / len(slots)
    edges = edges.clamp(max=1 - 2**-53)
    strata = setup.family.density(edges, torch.full_like(edges, area)).tolist()
    factor = setup.schedule()(clock)
    return {
        "step": index + 1,
        "samples_seen": clock,
        "samples": len(slots),
        "forwards": max(sample["forward"] for sample in samples),
        "u": [sample["u"] for sample in samples],
        "strata": strata if setup.recipe.train.timesteps == "stratified" else None,
        "cut_text": CutText.of(slots).to_json(),
        "lr": {group.name: group.lr * factor for group in setup.plan.groups},
    }


def _forward(
    setup: Setup, to: Path, place: tuple[int, int], micro: MicroBatch, batch: Batch
) -> Iterator[dict[str, Any]]:
    """The samples of one forward, each with its pictures and all that the model is told."""
    seen, noisy = _through_vae(setup, batch)
    levels, emptied = _levels(setup, micro, batch), _emptied(setup, batch)
    for at, slot in enumerate(micro.slots):
        name = f"step{place[0] + 1:02d}-slot{micro.positions[at]:03d}"
        picture_of(batch.pixels[at]).save(to / f"{name}.png")
        picture_of(seen[at]).save(to / f"{name}-vae.png")
        picture_of(noisy[at]).save(to / f"{name}-noisy.png")
        sizes = emptied[at]["sizes"] if at in emptied else batch.micro[at]
        yield {
            "step": place[0] + 1,
            "forward": place[1] + 1,
            "slot": micro.positions[at],
            "id": slot.sample_id,
            "prior": slot.sample_id.startswith(PREFIX),
            "visit": slot.visit,
            "picture": f"{name}.png",
            "through_vae": f"{name}-vae.png",
            "noisy": f"{name}-noisy.png",
            **_source(setup, slot, to / f"{name}-source.jpg"),
            **_mask(batch, at, to / name),
            "prompt": slot.text.prompt,
            "dropped": slot.text.is_dropped,
            "chunks": slot.text.num_chunks,
            "uncond": emptied[at]["text"] if at in emptied else None,
            "layout": [asdict(chunk) for chunk in setup.family.prompt_layout(slot.text.prompt)],
            "units_removed": slot.text.num_removed,
            "tokens_cut": slot.text.num_cut,
            "rendering": _rendering(setup, slot),
            "bucket": str(slot.bucket),
            "time_ids": sizes.time_ids(),
            "is_told_sizes": setup.family.is_told_sizes,
            **levels[at],
        }


def _through_vae(setup: Setup, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the VAE keeps of the crops, and how they look with the noise of this very visit."""
    family = setup.family
    latents = family.encode_images(batch.pixels.to(setup.device))
    scales = [scale.view(-1, 1, 1, 1).to(setup.device) for scale in family.alpha_sigma(batch.u)]
    noise = batch.noise if batch.input_noise is None else batch.noise + batch.input_noise
    noisy = scales[0] * latents + scales[1] * noise.to(setup.device)
    return family.decode_latents(latents).cpu(), family.decode_latents(noisy).cpu()


def _levels(setup: Setup, micro: MicroBatch, batch: Batch) -> list[dict[str, Any]]:
    """Noise level and weight of each sample of a forward."""
    family = setup.family
    logsnr = family.logsnr(batch.u)
    weights = setup.weighting()(logsnr.exp(), family.prediction_type).tolist()
    num_left = max(1, setup.reader().num_left(micro.step.slots))
    times = family.model_time(batch.u).tolist()
    return [
        {
            "u": float(batch.u[at]),
            "timestep": times[at],
            "logsnr": float(logsnr[at]) if bool(logsnr[at].isfinite()) else None,
            "weight": weights[at],
            "slot_weight": slot.weight,
            "counts": weights[at] * slot.weight / num_left,
        }
        for at, slot in enumerate(micro.slots)
    ]


def _emptied(setup: Setup, batch: Batch) -> dict[int, dict[str, Any]]:
    """What the model gets in place of an empty prompt, by position; asked of the family itself."""
    empty = [at for at, prompt in enumerate(batch.prompts) if prompt == ""]
    if not empty:
        return {}
    family, prompts = setup.family, [""] * len(empty)
    draws = None if batch.text_draws is None else batch.text_draws[empty]
    with torch.no_grad(), family.autocast():
        made = family.encode_prompts(prompts)
        made, sizes = family.as_dropped(made, [batch.micro[at] for at in empty], prompts, draws)
    found = {}
    for at, entry, size in zip(empty, family.split_conditioning(made), sizes, strict=True):
        is_zero = not any(bool(tensor.any()) for tensor in entry.values())
        found[at] = {"text": "zeros" if is_zero else "empty prompt", "sizes": size}
    return found


def _source(setup: Setup, slot: Slot, path: Path) -> dict[str, Any]:
    """The whole source picture, and where the crop lies in it, as fractions of its sides."""
    image = setup.rows.image(slot.row)
    key = (setup.recipe.seed, slot.sample_id, slot.visit)
    crop = setup.recipe.data.crops.crop((image.height, image.width), slot.bucket, key)
    fitted = fit(image.width, image.height, slot.bucket)
    height, width = fitted.resized_hw
    top, left = crop.top_left
    masks = setup.recipe.mask.build()
    boxes = setup.rows.boxes([slot.row])[0] if masks else []
    small = image.copy()
    small.thumbnail((SOURCE_SIDE_PX, SOURCE_SIDE_PX))
    small.save(path, "JPEG", quality=90)
    return {
        "source": path.name,
        "source_size_hw": [image.height, image.width],
        "scale": fitted.scale,
        "crop": [top / height, left / width, slot.bucket.height / height]
        + [slot.bucket.width / width],
        "crop_percent": round(100 * fitted.crop_fraction, 3),
        "flipped": crop.is_flipped,
        "boxes": [box for box in boxes if masks and masks.takes(box["label"])],
    }


def _mask(batch: Batch, at: int, name: Path) -> dict[str, Any]:
    """The loss mask of one sample, of the crop's size: white counts, black does not.

    A second picture tints what does not count, to be laid over the crop.
    """
    if batch.mask is None:
        return {}
    height, width = batch.micro[at].target_size_hw
    grey = (batch.mask[at, 0] * 255).round().to(torch.uint8).numpy()
    mask = Image.fromarray(grey, "L").resize((width, height), Image.Resampling.NEAREST)
    plain, tinted = name.with_name(f"{name.name}-mask.png"), f"{name.name}-masked.png"
    mask.save(plain)
    tint = Image.new("RGBA", mask.size, MASK_COLOUR)
    tint.putalpha(mask.point(lambda value: round((255 - value) * MASK_OPACITY)))
    tint.save(name.with_name(tinted))
    mean = float(batch.mask[at].mean())
    return {"mask": plain.name, "masked": tinted, "mask_mean": mean}


def _rendering(setup: Setup, slot: Slot) -> dict[str, Any]:
    """How the prompt came about, from the record and policy that it was rendered from."""
    rows: Any = setup.data.train
    policy, row = setup.data.policy, slot.row
    if slot.sample_id.startswith(PREFIX):
        assert setup.prior is not None, "it is one of its samples"
        rows, policy = setup.prior.texts, setup.prior.data.policy
        row -= len(setup.data.train)
    record = rows.records([row])[0]
    found = explain_prompt(record, policy, setup.recipe.seed, slot.visit)
    assert found.rendered.text == slot.text.prompt, "rendering is a pure function"
    whole = slot.text.prompt
    if slot.text.is_dropped or slot.text.num_removed:
        roomy = policy.model_copy(update={"dropout_p": 0.0, "max_chunks": MOST_CHUNKS})
        whole = explain_prompt(record, roomy, setup.recipe.seed, slot.visit).rendered.text
    return {
        "whole": whole,
        "mode": found.rendered.mode,
        "missing": found.rendered.missing,
        "tags": list(found.rendered.tags),
        "score_tags": list(found.rendered.score_tags),
        "left_out": list(found.left_out),
        "never": list(found.never),
        "spelled": dict(found.spelled or {}),
    }
