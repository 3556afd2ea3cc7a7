"""Run the annotators with a model on CUDA and on the CPU, compare their numbers, and time them.

    python tools/bench/annotators_cuda.py [--tiny] [--images 64] [--only NAME…]

Models have random weights and the sizes of the published ones (`--tiny`: a few layers), saved in
their layouts in a temporary folder, so nothing is fetched. Prints one JSON line an annotator: the
largest difference between the devices over four photos, its tolerance, and images a second on CUDA
(decoded pictures to stored values; captioners in bfloat16, 32 tokens). A package that is missing
leaves out what needs it, aloud; exit status 1: a difference is above its tolerance.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from sdprep.annotate import Sample
from sdprep.captioners import blip, vlm
from sdprep.clip_tokens import VOCABULARY
from sdprep.detectors import owlv2
from sdprep.images import ImageRejected, open_image
from sdprep.recipe import validate
from sdprep.taggers import joytag, wd, zero_shot
from sdprep.taggers._joytag_vit import ViTConfig, shapes

PHOTOS = Path(__file__).resolve().parent.parent / "demo_photos" / "photos"
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True)
class Case:
    """One annotator: its model, its options, and how far the devices may lie apart."""

    module: Any
    save: Callable[[Path, bool], dict[str, Any]]  # writes the model, gives more options
    tolerance: float  # of probabilities, cosines, box corners; of captions: share that differ
    needs: tuple[str, ...] = ()
    is_captioner: bool = False


# --- models ---------------------------------------------------------------------------------------


def save_joytag(folder: Path, is_tiny: bool) -> dict[str, Any]:
    """The published sizes: ViT-B/16 behind a stem of convolutions, 448 px, 5,813 tags."""
    width = 64 if is_tiny else 768
    config = {
        "class": "ViT",
        "n_tags": 20 if is_tiny else 5813,
        "image_size": 448,
        "num_blocks": 2 if is_tiny else 12,
        "patch_size": 16,
        "d_model": width,
        "mlp_dim": 4 * width,
        "num_heads": width // 64,
        "use_sine": True,
        "cnn_stem": "conv:c=64;ln;relu;conv:c=128;ln;relu;conv:c=256;ln;relu;"
        f"conv:c=512;ln;relu;conv:c={width},s=1,k=1,p=0",
    }
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, shape in shapes(ViTConfig.model_validate(config)).items():
        values = torch.randn(shape, generator=generator)
        spread = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
        weights[name] = values * spread + (0.0 if len(shape) > 1 or "bias" in name else 1.0)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tags = "\n".join(f"tag_{number}" for number in range(config["n_tags"]))  # type: ignore[call-overload]
    (folder / "top_tags.txt").write_text(tags, encoding="utf-8")
    return {"store_above": 0.0}


def save_wd(folder: Path, is_tiny: bool) -> dict[str, Any]:
    """WD's ViT-B/16 at 448 px in timm's layout."""
    import timm

    count = 20 if is_tiny else 10861
    model_args = {"img_size": 448, "class_token": False, "global_pool": "avg", "fc_norm": False}
    model_args |= {"depth": 2} if is_tiny else {}
    name = "vit_base_patch16_224"
    torch.manual_seed(7)
    model = timm.create_model(name, num_classes=count, **model_args)
    save_file(model.state_dict(), folder / "model.safetensors")
    trained = {"input_size": [3, 448, 448], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": name, "num_classes": count, "model_args": model_args}
    text = json.dumps(config | {"pretrained_cfg": trained})
    (folder / "config.json").write_text(text, encoding="utf-8")
    rows = [f"{at},tag_{at},{9 if at < 4 else 0},{count - at}" for at in range(count)]
    lines = "\n".join(["tag_id,name,category,count", *rows])
    (folder / "selected_tags.csv").write_text(lines, encoding="utf-8")
    return {"store_above": 0.0, "backend": "timm"}


def save_clip(folder: Path, is_tiny: bool) -> dict[str, Any]:
    """CLIP ViT-L/14."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    text, vision = transformer(768, 12, is_tiny), transformer(1024, 24, is_tiny)
    vision |= {"image_size": 224, "patch_size": 14}
    torch.manual_seed(7)
    config = CLIPConfig(text_config=text | ends, vision_config=vision, projection_dim=768)
    CLIPModel(config).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(VOCABULARY).save_pretrained(folder)
    pictures = {"image_processor_type": "CLIPImageProcessor", "resample": 3, "do_resize": True}
    pictures |= {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    pictures |= {"image_mean": MEAN, "image_std": STD, "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures), encoding="utf-8")
    return {}


def save_zero_shot(folder: Path, is_tiny: bool) -> dict[str, Any]:
    """CLIP with two labels."""
    labels = [{"name": "dog", "group": "thing"}, {"name": "teapot", "group": "thing"}]
    return save_clip(folder, is_tiny) | {"labels": labels, "store_above": 0.0}


def save_owlv2(folder: Path, is_tiny: bool) -> dict[str, Any]:
    """OWLv2 base/16 at 960 px."""
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection

    text = transformer(512, 12, is_tiny) | {"max_position_embeddings": 16}
    vision = transformer(768, 12, is_tiny) | {"image_size": 960, "patch_size": 16}
    torch.manual_seed(7)
    width = text["hidden_size"]
    config = Owlv2Config(text_config=text, vision_config=vision, projection_dim=width)
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(VOCABULARY, model_max_length=16).save_pretrained(folder)
    return {"min_score": 0.0}


def transformer(width: int, layers: int, is_tiny: bool) -> dict[str, Any]:
    """Sizes of an encoder, as CLIP's and OWLv2's configurations name them."""
    width, layers = (64, 2) if is_tiny else (width, layers)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": max(1, width // 64)}


def save_vlm(folder: Path, is_tiny: bool) -> dict[str, Any]:
    """A LLaVA of two layers: what is tried is the way through the chat model, not its speed."""
    from tests.tiny_captioners import save_tiny_llava

    save_tiny_llava(folder)
    return {"precision": "float32", "max_new_tokens": 32}


def save_blip(folder: Path, is_tiny: bool) -> dict[str, Any]:
    """A BLIP of two layers."""
    from tests.tiny_captioners import save_tiny_blip

    save_tiny_blip(folder)
    return {"precision": "float32", "max_new_tokens": 32}


CASES = {
    "joytag": Case(joytag, save_joytag, 0.01),
    "wd": Case(wd, save_wd, 0.01, needs=("timm",)),
    "zero_shot": Case(zero_shot, save_zero_shot, 0.01),
    "owlv2": Case(owlv2, save_owlv2, 0.01),
    "blip": Case(blip, save_blip, 0.25, is_captioner=True),
    "vlm": Case(vlm, save_vlm, 0.25, is_captioner=True),
}


# --- what is measured -----------------------------------------------------------------------------


def main() -> None:
    """Run every case that can run here."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="few layers: for a trial")
    parser.add_argument("--images", type=int, default=64, help="pictures that are timed")
    parser.add_argument("--only", nargs="*", choices=sorted(CASES), default=sorted(CASES))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA here: only the CPU's side is run, and nothing is compared", file=sys.stderr)
    photos = sorted(PHOTOS.rglob("*.jpg"))
    whole = [photo for photo in photos if opens(photo)]
    samples = [read(whole[at % len(whole)], at) for at in range(max(4, arguments.images))]
    is_wrong = False
    for name in arguments.only:
        missing = [each for each in CASES[name].needs if importlib.util.find_spec(each) is None]
        if missing:
            print(f"{name}: left out, {', '.join(missing)} is not installed", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = measured(name, CASES[name], Path(folder), samples, arguments.tiny)
        print(json.dumps({"annotator": name, **found}), flush=True)
        is_wrong |= found.get("difference", 0.0) > CASES[name].tolerance
    raise SystemExit(int(is_wrong))


def opens(path: Path) -> bool:
    """Whether a photo decodes; one of the demonstration's is broken on purpose."""
    try:
        open_image(path.read_bytes())
    except ImageRejected:
        return False
    return True


def read(path: Path, number: int) -> Sample:
    """A photo, cut to a square: then every box that OWLv2 finds lies in the picture."""
    image = open_image(path.read_bytes()).image
    side = min(image.size)
    image = image.crop((0, 0, side, side)).resize((512, 512), Image.Resampling.BICUBIC)
    caption = "a dog sits on the grass"
    return Sample(f"{number:032x}", {"tags": None, "text": {"caption": caption}}, image)


def measured(
    name: str, case: Case, folder: Path, samples: list[Sample], is_tiny: bool
) -> dict[str, Any]:
    """Difference between the devices, and images a second."""
    options = {"model": str(folder), **case.save(folder, is_tiny)}

    def annotator(device: str, **more: Any) -> Any:
        data = {"type": name, "device": device, **options, **more}
        return validate(data, case.module.Config, name).build()

    on_cpu = annotator("cpu").annotate(samples[:4]).to_pylist()
    if not torch.cuda.is_available():
        return {"values": len(list(numbers(on_cpu))), "cuda": "skipped"}
    on_cuda = annotator("cuda").annotate(samples[:4]).to_pylist()
    found: dict[str, Any] = {"difference": difference(on_cpu, on_cuda, case.is_captioner)}
    found |= {"tolerance": case.tolerance, "device": torch.cuda.get_device_name()}
    more = {"precision": "auto"} if case.is_captioner else {"store_above": 0.35}
    more = {} if name == "owlv2" else more
    timed = annotator("cuda", **more, batch_size=32)
    timed.annotate(samples[:32])  # loads the model, and lets CUDA choose its kernels
    torch.cuda.synchronize()
    start = time.perf_counter()
    for at in range(0, len(samples), 32):
        timed.annotate(samples[at : at + 32])
    torch.cuda.synchronize()
    return found | {"images_per_second": round(len(samples) / (time.perf_counter() - start), 1)}


def difference(one: list[dict], other: list[dict], is_captioner: bool) -> float:
    """Largest distance between two numbers of one place; of captions the share that differ."""
    if is_captioner:
        same = [a["text"] == b["text"] for a, b in zip(one, other, strict=True)]
        return 1 - sum(same) / len(same)
    pairs = zip(numbers(one), numbers(other), strict=True)
    return max(abs(a - b) if key == same else math.inf for (key, a), (same, b) in pairs)


def numbers(value: Any, key: str = "") -> list[tuple[str, float]]:
    """Every number in nested values with its place; lists are ordered by the names in them."""
    if isinstance(value, dict):
        return [each for name, inner in value.items() for each in numbers(inner, f"{key}.{name}")]
    if isinstance(value, list):
        named = all(isinstance(each, dict) and "name" in each for each in value)
        value = sorted(value, key=lambda each: each["name"]) if named else value
        return [each for at, inner in enumerate(value) for each in numbers(inner, f"{key}.{at}")]
    return [(key, float(value))] if isinstance(value, int | float) else []


if __name__ == "__main__":
    main()
