"""The first batches as the model sees them, written down for people to look at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdtrain.batch import Batch
from sdtrain.loader import MicroBatch, load
from sdtrain.pixels import picture_of
from sdtrain.setup import Setup

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; background: #fafafa }
section { display: flex; flex-wrap: wrap; gap: 1rem }
article { background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: .8rem;
          width: min(100%, 34rem); box-sizing: border-box }
img { max-width: 48%; height: auto; image-rendering: auto; vertical-align: top }
p { margin: .5rem 0; overflow-wrap: anywhere } .dim { color: #666 } .none { color: #a33 }
table { border-collapse: collapse; font-size: 13px } td { padding: .1rem .8rem .1rem 0 }
"""


def inspect(setup: Setup, to: Path, num_steps: int) -> dict[str, Any]:
    """Write the samples of the first optimizer steps: pictures, `index.html`, `samples.json`.

    Args:
        setup: the run; nothing of it is trained.
        to: folder, made if absent.
        num_steps: optimizer steps to show.

    Returns:
        path of the page, and every sample as in `samples.json`.
    """
    to.mkdir(parents=True, exist_ok=True)
    samples = list(_samples(setup, to, num_steps))
    text = json.dumps(samples, indent=1, ensure_ascii=False)
    (to / "samples.json").write_text(text + "\n", encoding="utf-8", newline="\n")
    page = to / "index.html"
    page.write_text(_page(setup, samples), encoding="utf-8", newline="\n")
    return {"path": str(page), "samples": samples}


def _samples(setup: Setup, to: Path, num_steps: int) -> Iterator[dict[str, Any]]:
    loaded = load(setup.reader(), setup.micro_batches(), workers=0)
    for index, (_, parts) in enumerate(groupby(loaded, lambda part: part[0].step.samples_seen)):
        if index == num_steps:
            return
        for number, (micro, batch) in enumerate(parts):
            yield from _forward(setup, to, (index, number), micro, batch)


def _forward(
    setup: Setup, to: Path, place: tuple[int, int], micro: MicroBatch, batch: Batch
) -> Iterator[dict[str, Any]]:
    """The samples of one forward; each gets the crop and what the VAE makes of it."""
    family = setup.family
    seen = batch.pixels.to(setup.device)
    decoded = family.decode_latents(family.encode_images(seen)).cpu()
    times = family.model_time(batch.u).tolist()
    for at, slot in enumerate(micro.slots):
        name = f"step{place[0] + 1:02d}-slot{micro.positions[at]:03d}"
        picture_of(batch.pixels[at]).save(to / f"{name}.png")
        picture_of(decoded[at]).save(to / f"{name}-vae.png")
        yield {
            "step": place[0] + 1,
            "forward": place[1] + 1,
            "slot": micro.positions[at],
            "id": slot.sample_id,
            "visit": slot.visit,
            "picture": f"{name}.png",
            "through_vae": f"{name}-vae.png",
            **_mask(batch, at, to / f"{name}-mask.png"),
            "prompt": slot.text.prompt,
            "dropped": slot.text.is_dropped,
            "chunks": slot.text.num_chunks,
            "bucket": str(slot.bucket),
            "time_ids": batch.micro[at].time_ids(),
            "u": float(batch.u[at]),
            "timestep": times[at],
        }


def _mask(batch: Batch, at: int, path: Path) -> dict[str, Any]:
    """The loss mask of one sample as a picture of the crop's size: white counts, black does not."""
    if batch.mask is None:
        return {}
    height, width = batch.micro[at].target_size_hw
    grey = (batch.mask[at, 0] * 255).round().to(torch.uint8).numpy()
    Image.fromarray(grey, "L").resize((width, height), Image.Resampling.NEAREST).save(path)
    return {"mask": path.name, "mask_mean": float(batch.mask[at].mean())}


def _page(setup: Setup, samples: list[dict[str, Any]]) -> str:
    body = [f"<h1>What {escape(setup.family.name)} is shown first</h1>"]
    body.append(
        f'<p class="dim">{escape(setup.data.origin)}; left the crop, right the same '
        "through the VAE.</p>"
    )
    for step, members in groupby(samples, key=lambda sample: sample["step"]):
        cards = "".join(_card(sample) for sample in members)
        body.append(f"<h2>Step {step}</h2><section>{cards}</section>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>sdtrain inspect</title>'
        f"<style>{STYLE}</style>{''.join(body)}</html>\n"
    )


def _card(sample: dict[str, Any]) -> str:
    if sample["dropped"]:
        prompt = '<p class="none">caption dropped: the empty prompt</p>'
    elif not sample["prompt"]:
        prompt = '<p class="none">the row has no text: the empty prompt</p>'
    else:
        prompt = f"<p>{escape(sample['prompt'])}</p>"
    shown = ("id", "visit", "bucket", "chunks", "time_ids", "timestep", "u", "forward")
    cells = "".join(f"<tr><td>{key}</td><td>{escape(str(sample[key]))}</td></tr>" for key in shown)
    mask = ""
    if "mask" in sample:
        mask = f'<img src="{sample["mask"]}" alt="loss mask: white counts">'
        mask += f"<p>of the loss counts {sample['mask_mean']:.1%}</p>"
    return (
        f'<article><img src="{sample["picture"]}" alt="after the crop"> '
        f'<img src="{sample["through_vae"]}" alt="through the VAE">'
        f"{mask}{prompt}<table>{cells}</table></article>"
    )
