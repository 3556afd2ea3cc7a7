"""JoyTag: parity with a plain re-implementation, the layout of its folder, thresholds later."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from sdprep.annotate import Sample
from sdprep.errors import DataError, UserError
from sdprep.images import open_image
from sdprep.recipe import validate
from sdprep.taggers import _white_square, joytag
from sdprep.taggers._joytag_vit import ViTConfig, shapes
from sdprep.taggers._white_square import white_square

torch.set_num_threads(1)
SIDE, TAGS = 32, ["1girl", "solo", ":3", "日本", "no_humans", "sky", "cat", "o_o", "tree", "red"]
STEM = "conv:c=6;ln;relu;conv:c=8,k=3,s=2,p=1;bn;gelu;conv:c=16,k=1,s=1,p=0"
PUBLISHED = {
    "class": "ViT",
    "n_tags": len(TAGS),
    "image_size": SIDE,
    "num_blocks": 2,
    "patch_size": 4,
    "d_model": 16,
    "mlp_dim": 24,
    "num_heads": 2,
    "stochdepth_rate": 0.05,
    "use_sine": True,
    "loss_type": "focal2",
    "layerscale_init": None,
    "head_mean_after": False,
    "cnn_stem": STEM,
    "patch_dropout": 0.0,
}
VARIANTS = {
    "published": {},
    "patches": {"cnn_stem": None, "image_size": 64, "patch_size": 16},
    "learnt": {"use_sine": False},
    "mean_after": {"head_mean_after": True, "cnn_stem": None},
}


def weights_of(config: dict, old_rows: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name, shape in shapes(ViTConfig.model_validate(config)).items():
        if name.startswith("head."):
            shape = (shape[0] + old_rows, *shape[1:])
        values = torch.randn(shape, generator=generator)
        if name.endswith("running_var"):
            values = values.abs() + 0.5
        elif len(shape) > 1:
            values = (
                values * (5 if name == "head.weight" else 1.5) / math.sqrt(math.prod(shape[1:]))
            )
        elif name.endswith((".bias", "_mean")):
            values = 0.2 * values
        else:  # scales of norms and skips
            values = 1 + 0.2 * values
        found[name] = values.contiguous()
    if old_rows:  # such a file holds what the model computes, in the first rows
        new = weights_of(config)
        found |= {key: value for key, value in new.items() if not key.startswith("head.")}
        for key in ("head.weight", "head.bias"):
            found[key][: len(TAGS)] = new[key]
    return found


def folder_of(path: Path, *, old_rows: int = 0, **changes) -> Path:
    config = PUBLISHED | changes
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "top_tags.txt").write_text("\n".join(TAGS) + "\n", encoding="utf-8")
    save_file(weights_of(config, old_rows), path / "model.safetensors")
    return path


def tagger_of(folder: Path, **given):
    data = {"type": "joytag", "model": str(folder), "device": "cpu"} | given
    return validate(data, joytag.Config, "the test").build()


@pytest.fixture(scope="module")
def photos(shared_data) -> list[Image.Image]:
    names = ("astronaut.png", "coffee.png", "rocket.jpg", "chelsea.png", "camera.png", "page.png")
    images = [open_image(shared_data("skimage") / name).image for name in names]
    narrow = images[0].crop((100, 0, 241, 512))
    return [*images, narrow, images[1].resize((SIDE, SIDE)), images[2].resize((5, 1))]


# --- an independent reference -------------------------------------------------------------------


def reference_pixels(image: Image.Image, side: int) -> torch.Tensor:
    longest = max(image.size)
    canvas = Image.new("RGB", (longest, longest), "white")
    canvas.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    if longest != side:
        canvas = canvas.resize((side, side), Image.BICUBIC)
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return ((pixels - mean) / std)[None]


def reference_logits(pixels: torch.Tensor, c: dict, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """Everything spelled out: no attention function, no layer norm, positions in loops."""

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    if c["cnn_stem"] is None:
        kernel = w["patch_embeddings.weight"]
        x = functional.conv2d(pixels, kernel, w["patch_embeddings.bias"], stride=c["patch_size"])
    else:
        at = "patch_embeddings.conv"
        x = functional.conv2d(pixels, w[f"{at}.0.weight"], w[f"{at}.0.bias"], 2, 1)
        x = norm(x.permute(0, 2, 3, 1), f"{at}.1.norm").permute(0, 3, 1, 2).clamp(min=0)
        x = functional.conv2d(x, w[f"{at}.3.weight"], w[f"{at}.3.bias"], 2, 1)
        mean, var = w[f"{at}.4.running_mean"], w[f"{at}.4.running_var"]
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        x = x * w[f"{at}.4.weight"][:, None, None] + w[f"{at}.4.bias"][:, None, None]
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        x = functional.conv2d(x, w[f"{at}.6.weight"], w[f"{at}.6.bias"])
    side, width = x.shape[-1], c["d_model"]
    tokens = torch.stack([x[0, :, row, col] for row in range(side) for col in range(side)])
    for place in range(side * side):
        if not c["use_sine"]:
            tokens[place] += w["pos_embedding.embedding.weight"][place]
            continue
        row, col = divmod(place, side)
        waves = [10000 ** -(k / (width // 4 - 1)) for k in range(width // 4)]
        parts = [math.sin(col * f) for f in waves] + [math.cos(col * f) for f in waves]
        parts += [math.sin(row * f) for f in waves] + [math.cos(row * f) for f in waves]
        tokens[place] += torch.tensor(parts)
    for number in range(c["num_blocks"]):
        at, head = f"blocks.{number}.", width // c["num_heads"]
        q, k, v = linear(norm(tokens, at + "norm1"), at + "qkv_proj").chunk(3, dim=-1)
        outs = []
        for h in range(c["num_heads"]):
            part = slice(h * head, (h + 1) * head)
            outs.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(head), -1) @ v[:, part])
        mixed = linear(torch.cat(outs, -1), at + "out_proj")
        tokens = tokens + mixed * w[at + "skip_init1.skip"]
        hidden = linear(norm(tokens, at + "norm2"), at + "mlp.linear1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        tokens = tokens + linear(hidden, at + "mlp.linear2") * w[at + "skip_init2.skip"]
    tokens = norm(tokens, "norm")
    if c["head_mean_after"]:
        return linear(tokens, "head").mean(0)
    return linear(tokens.mean(0), "head")


def reference(image: Image.Image, config: dict) -> np.ndarray:
    pixels = reference_pixels(image, config["image_size"])
    return torch.sigmoid(reference_logits(pixels, config, weights_of(config))).numpy()


def probabilities(tagger, images: list[Image.Image]) -> np.ndarray:
    batch = tagger.annotate([Sample(str(i), {}, image) for i, image in enumerate(images)])
    assert batch.schema == tagger.columns
    rows = [{tag["name"]: tag["p"] for tag in tags} for tags in batch["tags"].to_pylist()]
    return np.array([[row[name] for name in TAGS] for row in rows], np.float32)


def expected(images: list[Image.Image], config: dict) -> np.ndarray:
    return np.stack([reference(image, config) for image in images])


# --- parity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_with_the_reference_on_real_photos(tmp_path, photos, variant):
    changes = VARIANTS[variant]
    tagger = tagger_of(folder_of(tmp_path / "a model", **changes), store_above=0.0)
    found, wanted = probabilities(tagger, photos), expected(photos, PUBLISHED | changes)
    assert np.abs(found - wanted).max() <= 1e-3
    assert wanted.std(axis=0).max() > 0.02, "the model must tell photos apart"


def test_channel_order_padding_colour_and_resampling_would_be_noticed(tmp_path, photos):
    tagger = tagger_of(folder_of(tmp_path / "m"), store_above=0.0)
    right = probabilities(tagger, photos)
    swapped = [Image.merge("RGB", image.split()[::-1]) for image in photos]
    assert np.abs(probabilities(tagger, swapped) - right).max() > 1e-3
    black = []
    for image in photos:
        canvas = Image.new("RGB", (max(image.size),) * 2)
        canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.width - image.height) // 2))
        black.append(canvas)
    assert np.abs(probabilities(tagger, black) - right).max() > 1e-3
    stretched = [image.resize((SIDE, SIDE), Image.BICUBIC) for image in photos]
    assert np.abs(probabilities(tagger, stretched) - right).max() > 1e-3


def test_old_heads_with_nine_more_rows_give_the_same(tmp_path, photos):
    new = tagger_of(folder_of(tmp_path / "new"), store_above=0.0)
    old = tagger_of(folder_of(tmp_path / "old", old_rows=9), store_above=0.0)
    np.testing.assert_array_equal(probabilities(old, photos), probabilities(new, photos))
    wrong = tagger_of(folder_of(tmp_path / "wrong", old_rows=8))
    with pytest.raises(DataError, match=r"head\.weight is \(18, 16\), expected \(10, 16\)"):
        probabilities(wrong, photos)


def test_the_square_is_the_same_in_parts(monkeypatch):
    rng = np.random.default_rng(1)
    for size in ((300, 41), (41, 300), (299, 300), (1, 97), (97, 1), (32, 20), (448, 448)):
        image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        longest = max(size)
        canvas = Image.new("RGB", (longest, longest), "white")
        canvas.paste(image, ((longest - size[0]) // 2, (longest - size[1]) // 2))
        whole = np.asarray(canvas.resize((32, 32), Image.BICUBIC))
        for pixels_at_once in (1, 1000, 1 << 24):
            monkeypatch.setattr(_white_square, "_PIXELS_AT_ONCE", pixels_at_once)
            np.testing.assert_array_equal(white_square(image, 32), whole)
    with pytest.raises(ValueError, match="40000x1"):
        white_square(Image.new("RGB", (40_000, 1)), 32)


def test_batch_size_changes_nothing(tmp_path, photos):
    tagger = tagger_of(folder_of(tmp_path / "m"), store_above=0.0)
    together = probabilities(tagger, photos)
    alone = np.concatenate([probabilities(tagger, [photo]) for photo in photos])
    np.testing.assert_array_equal(alone, together)  # to the last bit, on a CPU
    assert tagger.annotate([]).num_rows == 0


# --- what is stored -----------------------------------------------------------------------------


def test_all_at_or_above_the_storing_threshold_and_no_category(tmp_path, photos):
    folder = folder_of(tmp_path / "m")
    truth = probabilities(tagger_of(folder, store_above=0.0), photos)
    batch = tagger_of(folder).annotate([Sample(str(i), {}, im) for i, im in enumerate(photos)])
    for row, all_p in zip(batch["tags"].to_pylist(), truth, strict=True):
        names = {name for name, p in zip(TAGS, all_p, strict=True) if p >= 0.1}
        assert {tag["name"] for tag in row} == names
        assert len(names) < len(TAGS)
        assert all(tag["category"] is None for tag in row)
        scores = [tag["p"] for tag in row]
        assert scores == sorted(scores, reverse=True)


def test_fingerprint_names_weights_and_options_but_no_place(tmp_path):
    first = tagger_of(folder_of(tmp_path / "one"), batch_size=4)
    same = tagger_of(folder_of(tmp_path / "two"), batch_size=8)
    assert first.fingerprint == same.fingerprint
    assert json.loads(first.fingerprint)["name"] == "joytag"
    other = tagger_of(folder_of(tmp_path / "three", old_rows=9))
    assert other.fingerprint != first.fingerprint
    assert tagger_of(tmp_path / "one", store_above=0.2).fingerprint != first.fingerprint


def test_thresholds_move_without_running_again(tmp_path, shared_data, monkeypatch):
    from sdprep.annotate import annotate
    from sdprep.ingest import ingest
    from sdprep.sources.folder import Config as Folder
    from sdprep.table import PhotoTable
    from sdprep.tags import TagsConfig, compose_tags

    (tmp_path / "photos").mkdir()
    for name in ("astronaut.png", "coffee.png", "rocket.jpg"):
        (tmp_path / "photos" / name).write_bytes((shared_data("skimage") / name).read_bytes())
    table = PhotoTable.open(tmp_path / "t.lance", create=True)
    ingest(table, Folder(type="folder", path=tmp_path / "photos").build())
    tagger = tagger_of(folder_of(tmp_path / "m"))
    for column in ("tags_joytag", "tags_mine"):  # a name of one's own keeps JoyTag's threshold
        (report,) = annotate(table, {column: tagger})
        assert (report.done, report.failed) == (3, 0)
    monkeypatch.setattr(tagger, "annotate", None)  # no inference from here on

    def composed(**thresholds) -> list[set[str]]:
        compose_tags(table, TagsConfig(thresholds=thresholds))
        return [{t["name"] for t in row} for row in table.read(["tags"])["tags"].to_pylist()]

    stored = table.read(["tags_joytag.tags"])[0].to_pylist()
    for least in (0.4, 0.2, 0.9):
        given = {"default": least}
        wanted = [{tag["name"] for tag in row if tag["p"] >= least} for row in stored]
        found = composed() if least == 0.4 else composed(joytag=given, mine=given)
        assert found == wanted
    assert composed() != composed(joytag={"default": 0.1})


# --- what cannot be used ------------------------------------------------------------------------


@pytest.mark.parametrize("file", joytag.FILES)
def test_a_missing_file_is_named(tmp_path, file):
    folder = folder_of(tmp_path / "m")
    (folder / file).unlink()
    with pytest.raises(DataError, match=f"has no {file}; found: ") as caught:
        tagger_of(folder)
    assert len(str(caught.value).splitlines()) <= 2


def test_pickled_weights_are_refused(tmp_path):
    folder = folder_of(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pytorch_model\.bin and no model\.safetensors.*safeten"):
        tagger_of(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class": "CLIPLikeModel"}, "class is 'CLIPLikeModel', expected 'ViT'"),
        ({"class": None}, "class is None"),
        ({"num_heads": 3}, "no multiple of num_heads 3"),
        ({"patch_size": 5}, "no multiple of patch_size 5"),
        ({"patch_size": 8}, "cnn_stem gives 8 tokens a side, the patches 4"),
        ({"cnn_stem": "conv:c=16;swish"}, "layer 'swish'"),
        ({"cnn_stem": "conv:k=3"}, "c, k and s must be 1 at least"),
        ({"d_model": "16"}, "d_model"),
        ({"n_tags": 11}, "lists 10 tags, config.json says n_tags 11"),
        ({"num_registers": 4}, "num_registers"),
    ],
)
def test_another_model_is_one_clear_error(tmp_path, changes, message):
    folder = folder_of(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(PUBLISHED | changes), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        tagger_of(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop("norm.bias"), r"lacks norm\.bias"),
        (lambda w: w.update({"extra.weight": torch.zeros(1)}), r"has extra\.weight"),
        (lambda w: w.update({"norm.bias": torch.zeros(3)}), r"norm\.bias is \(3,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, photos, damage, message):
    folder = folder_of(tmp_path / "m")
    weights = weights_of(PUBLISHED)
    damage(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(DataError, match=message):
        probabilities(tagger_of(folder), photos[:1])


def test_values_that_are_not_finite_fail_the_image_not_the_run(tmp_path, photos):
    folder = folder_of(tmp_path / "m")
    weights = weights_of(PUBLISHED)
    weights["head.bias"][3] = torch.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="not finite") as caught:
        probabilities(tagger_of(folder), photos[:1])
    assert not isinstance(caught.value, UserError)


def test_half_precision_files_and_stray_buffers_are_read(tmp_path, photos):
    folder = folder_of(tmp_path / "m")
    weights = {name: tensor.half() for name, tensor in weights_of(PUBLISHED).items()}
    weights["patch_embeddings.conv.4.num_batches_tracked"] = torch.tensor(9)
    weights["pos_embedding.position_ids"] = torch.arange(64)
    save_file(weights, folder / "model.safetensors")
    found = probabilities(tagger_of(folder, store_above=0.0), photos[:2])
    assert np.abs(found - expected(photos[:2], PUBLISHED)).max() < 0.02


def test_an_upright_composited_picture_is_what_it_sees(tmp_path):
    clear = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    buffer = io.BytesIO()
    clear.save(buffer, "PNG")
    seen = open_image(buffer.getvalue()).image
    np.testing.assert_array_equal(white_square(seen, SIDE), np.full((SIDE, SIDE, 3), 255))
    assert pa.schema(joytag.JoyTagTagger.columns) == joytag.COLUMNS
