"""Zero-shot labels: cosines and shares against plain transformers, and what reaches prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdprep.annotate import Sample, annotate
from sdprep.errors import DataError, RecipeError, UserError
from sdprep.images import open_image
from sdprep.recipe import validate
from sdprep.taggers import zero_shot
from sdprep.tags import TagsConfig, compose_tags
from tests.tiny_contrastive import save_tiny_contrastive

torch.set_num_threads(1)
LABELS = [
    {"name": "photo", "group": "medium", "templates": ["a photograph", "taken with a camera"]},
    {"name": "line_art", "group": "medium"},
    {"name": "painting", "group": "medium", "negatives": ["a blank page"]},
    {"name": "watermark", "negatives": ["a clean picture", "no text at all"]},
]
TEMPLATES = ["a picture of {}.", "{}"]
NEGATIVES = {"medium": ["a blank page"], "watermark": ["a clean picture", "no text at all"]}
PROMPTS = {
    "photo": ["a photograph", "taken with a camera"],
    "line_art": ["a picture of line art.", "line art"],
    "painting": ["a picture of painting.", "painting"],
    "watermark": ["a picture of watermark.", "watermark"],
}
GROUPS = {"medium": ["photo", "line_art", "painting"], "watermark": ["watermark"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models of ours")
    return {kind: save_tiny_contrastive(root / kind, kind) for kind in ("clip", "siglip")}


@pytest.fixture(scope="module")
def photos(shared_data) -> list[Image.Image]:
    names = ("astronaut.png", "coffee.png", "rocket.jpg", "page.png")
    return [open_image(shared_data("skimage") / name).image for name in names]


def tagger_of(folder: Path, **given):
    data = {"type": "zero_shot", "model": str(folder), "device": "cpu", "labels": LABELS}
    data |= {"templates": TEMPLATES} | given
    return validate(data, zero_shot.Config, "the test").build()


def samples(images: list[Image.Image]) -> list[Sample]:
    return [Sample(str(index), {}, image) for index, image in enumerate(images)]


def rows_of(tagger, images: list[Image.Image]) -> list[dict]:
    batch = tagger.annotate(samples(images))
    assert batch.schema == tagger.columns
    return batch.to_pylist()


def reference(folder: Path, kind: str, images: list[Image.Image]) -> list[dict]:
    """Cosine and share of each label, with transformers' own forward for every prompt."""
    from transformers import AutoTokenizer, CLIPModel, SiglipModel

    model = (CLIPModel if kind == "clip" else SiglipModel).from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind == "clip":
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    else:
        mean = std = (0.5, 0.5, 0.5)

    def pixels(image: Image.Image) -> torch.Tensor:
        if kind == "clip":
            short = min(image.size)
            size = tuple(int(32 * side / short) for side in image.size)
            left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
            small = image.resize(size, Image.BICUBIC).crop((left, top, left + 32, top + 32))
        else:
            small = image.resize((32, 32), Image.BICUBIC)
        values = (np.asarray(small) / 255 - mean) / std
        return torch.tensor(values, dtype=torch.float32).permute(2, 0, 1)[None]

    def cosines(texts: list[str], image: Image.Image) -> torch.Tensor:
        length = {"padding": "max_length", "max_length": 64} if kind == "siglip" else {}
        found = []
        for text in texts:
            ids = tokenizer([text], return_tensors="pt", **length)["input_ids"]
            with torch.no_grad():
                out = model(input_ids=ids, pixel_values=pixels(image))
            found.append(out.text_embeds[0] / out.text_embeds.norm())
            seen = out.image_embeds[0] / out.image_embeds.norm()
        mean_text = torch.stack(found).mean(0)
        return seen @ (mean_text / mean_text.norm())

    rows = []
    for image in images:
        row = {}
        for group, names in GROUPS.items():
            texts = [PROMPTS[name] for name in names] + [[text] for text in NEGATIVES[group]]
            each = torch.stack([cosines(text, image) for text in texts])
            shares = torch.softmax(model.logit_scale.detach().exp() * each, 0)
            for name, cosine, share in zip(names, each, shares, strict=False):
                row[name] = (group, float(cosine), float(share))
        rows.append(row)
    return rows


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_parity_with_plain_transformers_on_real_photos(folders, photos, kind):
    found = rows_of(tagger_of(folders[kind]), photos)
    wanted = reference(folders[kind], kind, photos)
    for row, right in zip(found, wanted, strict=True):
        assert [label["name"] for label in row["labels"]] == list(right)
        for label in row["labels"]:
            group, cosine, share = right[label["name"]]
            assert label["group"] == group
            assert abs(label["cosine"] - cosine) <= 1e-3
            assert abs(label["p"] - share) <= 1e-3
        assert {tag["name"] for tag in row["tags"]} == {
            label["name"] for label in row["labels"] if label["p"] >= 0.1
        }
    spread = np.std([[share for _, _, share in row.values()] for row in wanted], axis=0)
    assert spread.max() > 0.01, "the model must tell photos apart"


def test_batch_size_changes_nothing(folders, photos):
    tagger = tagger_of(folders["clip"])
    together = rows_of(tagger, photos)
    for photo, row in zip(photos, together, strict=True):
        (alone,) = rows_of(tagger, [photo])
        assert alone == row  # to the last bit, on a CPU
    assert tagger.annotate([]).num_rows == 0


def test_shares_of_a_group_and_its_negatives_add_up(folders, photos):
    labels = [{"name": "cat", "group": "animal"}, {"name": "dog", "group": "animal"}]
    for row in rows_of(tagger_of(folders["clip"], labels=labels), photos):
        assert abs(sum(label["p"] for label in row["labels"]) - 1) < 1e-5
    for row in rows_of(tagger_of(folders["clip"]), photos):
        assert sum(label["p"] for label in row["labels"][:3]) < 1


# --- what reaches prompts -------------------------------------------------------------------------


def test_only_labels_with_a_threshold_of_their_own_reach_prompts(
    tmp_path, folders, shared_data, capsys
):
    column = "tags_quality"  # a name of one's own must not open a way around
    from sdprep.ingest import ingest
    from sdprep.sources.folder import Config as Folder
    from sdprep.table import PhotoTable

    (tmp_path / "photos").mkdir()
    for name in ("astronaut.png", "coffee.png"):
        (tmp_path / "photos" / name).write_bytes((shared_data("skimage") / name).read_bytes())
    table = PhotoTable.open(tmp_path / "t.lance", create=True)
    ingest(table, Folder(type="folder", path=tmp_path / "photos").build())
    (report,) = annotate(table, {column: tagger_of(folders["clip"], store_above=0.0)})
    assert (report.done, report.failed) == (2, 0)
    tagger = column.removeprefix("tags_")
    stored = table.read([f"{column}.tags"])[0].to_pylist()

    def composed(**given) -> list[set[str]]:
        compose_tags(table, TagsConfig(**given))
        return [{tag["name"] for tag in row} for row in table.read(["tags"])["tags"].to_pylist()]

    assert len(stored[0]) == len(LABELS)
    assert composed() == [set(), set()]
    middle = sorted(p["p"] for row in stored for p in row if p["name"] == "photo")[1]
    for least in (0.0, middle, 1.0):
        wanted = [
            {tag["name"] for tag in row if tag["name"] == "photo" and tag["p"] >= least}
            for row in stored
        ]
        assert composed(label_thresholds={tagger: {"photo": least}}) == wanted
    assert composed(label_thresholds={tagger: {"photo": 0.0}}) != [set(), set()]
    with pytest.raises(UserError, match="too much for one threshold"):
        composed(thresholds={tagger: {"default": 0.2}})
    composed(label_thresholds={"nobody": {"photo": 0.5}})
    assert "tags.label_thresholds.nobody: no such tagger has run" in capsys.readouterr().err


# --- configuration and files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "labels"),
        ([{"name": "cat"}], "cat has no rival"),
        ([{"name": "cat", "group": "animal"}], "animal has no rival"),
        ([*LABELS, LABELS[0]], "photo is there twice"),
        ([{"name": "cat", "negatives": [" "]}], "a prompt is empty"),
        ([{"name": "cat", "negative": ["a dog"]}], "did you mean .*negatives"),
    ],
)
def test_labels_that_cannot_be_judged_are_refused(tmp_path, labels, message):
    with pytest.raises(RecipeError, match=message):
        tagger_of(tmp_path, labels=labels)


def test_a_lone_label_stays_out_of_a_group_of_its_name(folders, photos):
    labels = [
        {"name": "cat", "group": "dog"},
        {"name": "bird", "group": "dog"},
        {"name": "dog", "negatives": ["no dog"]},
    ]
    (row,) = rows_of(tagger_of(folders["clip"], labels=labels), photos[:1])
    groups = [label["group"] for label in row["labels"]]
    assert groups[0] == groups[1] != groups[2]
    assert abs(sum(label["p"] for label in row["labels"][:2]) - 1) < 1e-5


def test_fingerprint_names_model_and_prompts(folders):
    first = tagger_of(folders["clip"]).fingerprint
    assert tagger_of(folders["clip"], batch_size=2).fingerprint == first
    assert tagger_of(folders["siglip"]).fingerprint != first
    assert tagger_of(folders["clip"], templates=["a {}"]).fingerprint != first
    assert tagger_of(folders["clip"], labels=LABELS[:3]).fingerprint != first


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_files_of_another_kind_are_refused(folders, tmp_path):
    folder = copied(folders["clip"], tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pytorch_model\.bin and no model\.safetensors"):
        tagger_of(folder)
    folder = copied(folders["clip"], tmp_path / "n")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match=r"has no preprocessor_config\.json"):
        tagger_of(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}), "utf-8")
    with pytest.raises(DataError, match="is of type 'bert', expected clip or siglip"):
        tagger_of(folder)


def test_missing_weights_are_never_made_up(folders, tmp_path, photos):
    folder = copied(folders["clip"], tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"does not fit its config\.json: .* as visual_projection"):
        rows_of(tagger_of(folder), photos[:1])


def test_a_prompt_longer_than_the_model_reads_is_named(folders, photos):
    labels = [{"name": "cat", "templates": ["very " * 80 + "cat"], "negatives": ["a dog"]}]
    with pytest.raises(UserError, match="reads 77 tokens, and this prompt of a label has 83"):
        rows_of(tagger_of(folders["clip"], labels=labels), photos[:1])
