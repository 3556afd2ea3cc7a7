"""Loss masks: they lie where the pixels lie, and what they cover does not train."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageDraw

from sdprep.boxes import COLUMNS
from sdprep.errors import DataError, RecipeError
from sdprep.plugins import config_for
from sdprep.prompt_policy import PromptPolicy
from sdprep.schema import CORE
from sdprep.table import PhotoTable
from sdtrain.adapters.full import Full
from sdtrain.batch import Batch
from sdtrain.check import describe
from sdtrain.check_text import check_text
from sdtrain.checkpoint import read_trained
from sdtrain.dataset import open_data
from sdtrain.freezing import Rule, build_plan
from sdtrain.inspect import inspect
from sdtrain.loss_masks import mean_per_sample
from sdtrain.losses.mse import mse
from sdtrain.recipe import DataSection, load_train_recipe
from sdtrain.run import Run
from sdtrain.run_folder import RunFolder
from sdtrain.setup import Setup, open_setup
from sdtrain.step import denoising_loss
from sdtrain.trainer import steps, train
from sdtrain.update import take_step
from tests.tiny import as_trained, load_tiny, tiny_batch
from tests.train_data import SIZES, prepared_row, write_prepared

torch.set_num_threads(1)

Recipe = Callable[..., Path]
PLACE = (0.1, 0.25, 0.45, 0.7)
WATERMARKS = 'mask.boxes=["watermark"]'


def box(label: str | None, place: tuple[float, ...] = PLACE) -> dict[str, Any]:
    return {"label": label, "score": 0.9, **dict(zip(("x0", "y0", "x1", "y1"), place, strict=True))}


def painted(size: tuple[int, int], number: int) -> bytes:
    """A white picture that is black inside the box."""
    image = Image.new("RGB", size, "white")
    x0, y0, x1, y1 = (round(at * side) for at, side in zip(PLACE, size * 2, strict=True))
    ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), fill="black")
    image.putpixel((size[0] - 1, size[1] - 1), (number, 0, 0))  # no two alike
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight photos: every third with a watermark, every fourth with writing, one all watermark."""
    rows = []
    for number in range(8):
        boxes = [box("watermark")] * (number % 3 == 0) + [box("text", (0, 0, 1, 0.2))] * (
            number % 4 == 0
        )
        whole = [box("watermark", (0, 0, 1, 1))]
        rows.append(prepared_row(number, boxes=whole if number == 1 else boxes or None))
    return write_prepared(tmp_path_factory.mktemp("boxed") / "prepared", rows)


def fresh(path: Path, *overrides: str) -> Run:
    recipe = load_train_recipe(path, overrides)
    return Run(open_setup(recipe), RunFolder(recipe.output))


def with_the_whole_one(setup: Setup) -> int:
    """Clock of the first step that holds the image that is all watermark."""
    whole = prepared_row(1)["id"]
    planned = setup.order.steps(0, 22, 4)
    return next(s.samples_seen for s in planned if whole in {slot.sample_id for slot in s.slots})


# --- where a mask lies ----------------------------------------------------------------------------


@pytest.mark.parametrize("flip_prob", [0.0, 0.5])
def test_a_mask_lies_where_the_pixels_lie(
    train_recipe: Recipe, tmp_path: Path, flip_prob: float
) -> None:
    sizes = [(300, 200), (200, 310), (257, 260)]
    rows = [
        prepared_row(n, size=size, data=painted(size, n), boxes=[box("watermark"), box("face")])
        for n, size in enumerate(sizes)
    ]
    data = write_prepared(tmp_path / "painted", rows)
    wanted = (WATERMARKS, "data.resolution_px=128", f"data.flip_prob={flip_prob}")
    setup = open_setup(load_train_recipe(train_recipe(data=data), wanted))
    crops = set()
    for _, slot in zip(range(12), setup.order.slots(), strict=False):
        batch = setup.reader().batch([slot], [0.5])
        assert batch.mask is not None
        assert batch.mask.shape == (1, 1, *batch.noise.shape[2:])
        cell = slot.bucket.height // batch.mask.shape[2]
        seen = (batch.pixels[0, 0].numpy() + 1) / 2
        down, across = batch.mask.shape[2:]
        cells = seen.reshape(down, cell, across, cell).mean((1, 3))
        mask = batch.mask[0, 0].numpy()
        assert 0.05 < 1 - mask.mean() < 0.5
        assert np.abs(mask - cells).max() < 0.15
        assert np.abs(mask - cells).mean() < 0.01
        crops.add(batch.micro[0].crop_top_left)
    assert len(crops) > 4


def test_a_weight_inside_and_other_labels(boxed: Path, train_recipe: Recipe) -> None:
    def masks(*wanted: str) -> dict[str, torch.Tensor]:
        setup = open_setup(load_train_recipe(train_recipe(data=boxed), wanted))
        slots = [slot for _, slot in zip(range(8), setup.order.slots(), strict=False)]
        found = {slot.sample_id: setup.reader().batch([slot], [0.5]).mask for slot in slots}
        return {id_: mask[0, 0] for id_, mask in found.items() if mask is not None}

    nothing, quarter, every = (
        masks(WATERMARKS),
        masks(WATERMARKS, "mask.weight=0.25"),
        masks('mask.boxes=["*"]'),
    )
    first, whole, plain = (prepared_row(n)["id"] for n in (0, 1, 2))
    assert nothing[first].min() == 0
    assert nothing[first].max() == 1
    torch.testing.assert_close(quarter[first], 0.25 + 0.75 * nothing[first])
    assert bool((nothing[whole] == 0).all())
    assert bool((nothing[plain] == 1).all())
    assert every[first].sum() < nothing[first].sum()


def test_a_curated_table_has_boxes_of_all_detectors(tmp_path: Path) -> None:
    rows = [prepared_row(number) for number in range(2)]
    ids = [row["id"] for row in rows]
    core = [
        {"id": row["id"], "width": row["width"], "height": row["height"]}
        | {"image": row["image"]["bytes"], "format": "JPEG", "mode": "RGB", "frames": 1}
        | {"exif_orientation": 1, "has_alpha": False, "text": {"caption": "a dog", "tags": []}}
        | {"sources": [{"source": "photos", "key": f"{row['id']}.jpg"}]}
        for row in rows
    ]
    table = PhotoTable.open(tmp_path / "photos.lance", create=True)
    with table.writer():
        table.add_images(pa.Table.from_pylist(core, schema=CORE))
        for name, found in (
            ("boxes_owlv2", [{"boxes": [box("watermark")]}, None]),
            ("boxes_ocr", [{"boxes": [box("text")]}, {"boxes": []}]),
        ):
            table.ensure_annotator(name, COLUMNS, "some fingerprint")
            table.update_rows(ids, {name: pa.array(found, table.schema.field(name).type)})
    section = DataSection(path=str(table.path), splits="all")
    train = open_data(section, PromptPolicy(), with_boxes=True).train
    labels = [[b["label"] for b in boxes] for boxes in train.boxes([1, 0])]
    assert [sorted(found) for found in labels] == [[], ["text", "watermark"]]
    assert train.records([0]) == open_data(section, PromptPolicy()).train.records([0])


# --- what a mask does -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mse", "huber", "smooth_l1"])
def test_losses_average_what_the_mask_leaves(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 5, 6, generator=generator)
    mask = torch.rand(3, 1, 5, 6, generator=generator)
    mask[0, 0, 1:3, 2:5] = 0
    mask[2] = 0
    level = {"u": torch.full((3,), 0.5), "logsnr": torch.zeros(3)}
    d = (prediction - target).double()
    root = (d**2 + 0.01).sqrt() - 0.1
    each = {"mse": d**2, "huber": 0.2 * root, "smooth_l1": 2 * root}[name]
    loss = config_for("loss", name)().build()
    got = loss(prediction, target, **level, mask=mask)
    expected = [(mask[i].double() * each[i]).sum() / (4 * mask[i].sum()) for i in (0, 1)]
    torch.testing.assert_close(got.double(), torch.stack([*expected, torch.tensor(0.0).double()]))

    gradients = []
    for shift in (0.0, 7.0):
        moved = target.clone()
        moved[0, :, 1:3, 2:5] += shift
        moved[2] += shift
        leaf = prediction.clone().requires_grad_()
        loss(leaf, moved, **level, mask=mask).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert bool((gradients[0][0, :, 1:3, 2:5] == 0).all())
    assert bool((gradients[0][2] == 0).all())
    assert bool((gradients[0][1] != 0).any())


def test_a_target_inside_a_box_moves_no_parameter(tiny_model: Callable[[str], Path]) -> None:
    """Through the one forward: what the VAE sees is held, only the target inside differs."""
    family = load_tiny(tiny_model("sd15"))
    build_plan(family, [Rule("unet.**", lr=1e-3)], Full())
    batch = tiny_batch(family, 2)
    mask = torch.ones(2, 1, *batch.noise.shape[2:])
    mask[:, :, 1:3] = 0
    masked = Batch(**{**vars(batch), "mask": mask})
    target, found = family.target, []
    for shift in (0.0, 3.0):
        family.target = lambda *args, by=shift: target(*args) + by * (1 - mask)
        losses = [denoising_loss(family, b, mse) for b in (masked, batch)]
        gradients = []
        for loss in losses:
            family.parts["unet"].zero_grad()
            loss.sum().backward()
            gradients.append(family.parts["unet"].conv_in.weight.grad.clone())
        found.append(gradients)
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1])


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_a_step_equals_plain_torch_without_the_sample_that_is_all_box(
    boxed: Path, train_recipe: Recipe, micro_batch: int
) -> None:
    run = fresh(train_recipe(data=boxed), WATERMARKS, f"data.micro_batch_size={micro_batch}")
    setup = run.setup
    run.samples_seen = with_the_whole_one(setup)
    parts = [part for _, part in zip(range(1), steps(run), strict=False)]
    planned = list(setup.micro_batches(run.samples_seen))
    unet = setup.family.parts["unet"]
    total, num = torch.zeros(()), 0
    for micro in planned[: next(i for i, m in enumerate(planned) if m.is_last) + 1]:
        for slot, u in zip(micro.slots, micro.u, strict=True):
            batch = setup.reader().batch([slot], [u])
            if slot.sample_id == prepared_row(1)["id"]:
                continue
            with torch.no_grad():
                latents, text = as_trained(setup.family, batch)
            alpha, sigma = setup.family.alpha_sigma(batch.u)
            noisy = alpha * latents + sigma * batch.noise
            d = setup.family.predict(noisy, batch.u, text, batch.micro) - batch.noise
            w = batch.mask.expand_as(d)
            total = total + min(1.0, 5 * float(sigma / alpha) ** 2) * (w * d * d).sum() / w.sum()
            num += 1
    assert num == 3
    (total / num).backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in unet.parameters()))
    unet.zero_grad()
    line = take_step(run, parts[0])
    assert line["masked_out"] == run.masked_out == 1
    assert line["loss"] == pytest.approx(float(total.detach()) / num, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert run.samples_seen % 4 == 0  # the clock counts every sample


def test_without_normalising_masked_pictures_train_more_weakly(
    boxed: Path, train_recipe: Recipe
) -> None:
    """Σ w·d² over all latents and over every sample of the step, as sd-scripts has it."""
    run = fresh(train_recipe(data=boxed), WATERMARKS, "mask.normalise=false")
    setup = run.setup
    run.samples_seen = with_the_whole_one(setup)
    total = 0.0
    for micro in setup.micro_batches(run.samples_seen):
        batch = setup.reader().batch(micro.slots, micro.u)
        with torch.no_grad():
            latents, text = as_trained(setup.family, batch)
            alpha, sigma = (s.view(-1, 1, 1, 1) for s in setup.family.alpha_sigma(batch.u))
            noisy = alpha * latents + sigma * batch.noise
            d = setup.family.predict(noisy, batch.u, text, batch.micro) - batch.noise
        weights = (5 * (sigma / alpha).flatten() ** 2).clamp(max=1)
        total += float((weights * (batch.mask * d * d).mean((1, 2, 3))).sum())
        if micro.is_last:
            break
    line = take_step(run, next(steps(run)))
    assert line["loss"] == pytest.approx(total / 4, rel=1e-5)
    assert line["masked_out"] == run.masked_out == 0


def test_a_step_of_nothing_but_boxes_is_no_error(train_recipe: Recipe, tmp_path: Path) -> None:
    rows = [prepared_row(n, boxes=[box("watermark", (0, 0, 1, 1))]) for n in range(4)]
    run = fresh(train_recipe(data=write_prepared(tmp_path / "whole", rows)), WATERMARKS)
    line = take_step(run, next(steps(run)))
    assert (line["loss"], line["loss_debiased"], line["masked_out"]) == (None, None, 4)
    assert line["grad_norm"] == 0


def test_without_masks_everything_is_as_it_was(boxed: Path, train_recipe: Recipe) -> None:
    run = fresh(train_recipe(data=boxed))
    assert run.setup.boxes is None
    assert "mask" not in run.setup.conditions()
    parts = next(steps(run))
    assert "masked_out" not in take_step(run, parts)
    batch = run.setup.reader().batch([next(run.setup.order.slots())], [0.5])
    assert batch.mask is None
    assert batch.is_masked_out == [False]
    values = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mean_per_sample(values, None), values.flatten(1).mean(1))


# --- what is said ---------------------------------------------------------------------------------


def test_check_counts_and_inspect_shows(boxed: Path, train_recipe: Recipe, tmp_path: Path) -> None:
    setup = open_setup(load_train_recipe(train_recipe(data=boxed), [WATERMARKS]))
    found = describe(setup)
    assert found["data"]["masks"] == {
        "boxes": ["watermark"],
        "weight": 0.0,
        "rows": 4,
        "rows_by_label": {"text": 2, "watermark": 4},
    }
    assert "masks: 4 rows of train have boxes of watermark" in check_text(found, "")
    shown = inspect(setup, tmp_path / "look", 2)["samples"]
    by_id = {sample["id"]: sample for sample in shown}
    with Image.open(tmp_path / "look" / by_id[prepared_row(1)["id"]]["mask"]) as mask:
        assert mask.getextrema() == (0, 0)
        assert f"{mask.width}x{mask.height}" == by_id[prepared_row(1)["id"]]["bucket"]
    page = (tmp_path / "look" / "index.html").read_text(encoding="utf-8")
    assert page.count("loss mask") == len(shown) == 8
    conditions = setup.conditions()
    assert conditions["mask"] == {"boxes": ["watermark"], "weight": 0.0, "normalise": True}
    other = open_setup(load_train_recipe(train_recipe(data=boxed), ['mask.boxes=["text"]']))
    assert other.conditions()["boxes_fingerprint"] != conditions["boxes_fingerprint"]


def test_a_label_that_is_nowhere_names_those_that_are(boxed: Path, train_recipe: Recipe) -> None:
    wanted = ['mask.boxes=["watermark", "logo"]']
    with pytest.raises(DataError) as caught:
        open_setup(load_train_recipe(train_recipe(data=boxed), wanted))
    assert "'logo'" in caught.value.message
    assert "'text' (2 rows), 'watermark' (4 rows)" in caught.value.message
    with pytest.raises(DataError, match="the labels are: none"):
        open_setup(load_train_recipe(train_recipe(), ['mask.boxes=["*"]']))


@pytest.mark.parametrize("place", [(0.5, 0, 0.2, 1), (0, 0, math.nan, 1), (None, 0, 1, 1)])
def test_what_is_no_box_names_its_image(train_recipe: Recipe, tmp_path: Path, place: Any) -> None:
    row = prepared_row(0, boxes=[box("watermark", place)])
    data = write_prepared(tmp_path / "broken", [row, prepared_row(1)])
    with pytest.raises(DataError, match=row["id"]):
        open_setup(load_train_recipe(train_recipe(data=data), [WATERMARKS]))


def test_a_picture_of_another_size_than_its_row_is_refused(
    train_recipe: Recipe, tmp_path: Path
) -> None:
    rows = [prepared_row(0, boxes=[box("watermark")], width=SIZES[0][0] + 16)]
    setup = open_setup(
        load_train_recipe(
            train_recipe(data=write_prepared(tmp_path / "odd", rows)),
            [WATERMARKS, "data.max_upscale=4.0"],
        )
    )
    with pytest.raises(DataError, match="its row says"):
        setup.reader().batch([next(setup.order.slots())], [0.5])


@pytest.mark.parametrize(
    "wrong",
    [
        *('mask.boxes=["*", "text"]', 'mask.boxes=["a", "a"]', 'mask.boxes=[""]'),
        *("mask.weight=1.5", "mask.weight=0.5", "mask.normalise=false"),
    ],
)
def test_a_recipe_with_a_senseless_mask_is_refused(train_recipe: Recipe, wrong: str) -> None:
    with pytest.raises(RecipeError, match="mask"):
        load_train_recipe(train_recipe(), [wrong])


@pytest.mark.slow
def test_a_masked_run_is_the_same_with_workers_and_over_a_stop(
    boxed: Path, train_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = train_recipe(data=boxed)
    masked = ('mask.boxes=["watermark"]', "train.samples=8", "checkpoint.every_samples=4")
    results = []
    for name, more in (("whole", ()), ("workers", ("data.workers=1",))):
        output = f"output={str(tmp_path / name)!r}"
        results.append(train(load_train_recipe(recipe, (*masked, *more, output))))
    first = Path(results[0].output) / "checkpoints"
    resumed = tmp_path / "resumed"
    shutil.copytree(results[0].output, resumed)
    shutil.rmtree(resumed / "checkpoints" / "8")
    again = load_train_recipe(recipe, (*masked, f"output={str(resumed)!r}"))
    results.append(train(again))
    expected = read_trained(first / "8")
    for result in results[1:]:
        found = read_trained(Path(result.output) / "checkpoints" / "8")
        assert all(found[name].equal(tensor) for name, tensor in expected.items())
    plain = load_train_recipe(recipe, (*masked[1:], f"output={str(tmp_path / 'plain')!r}"))
    other = read_trained(Path(train(plain).output) / "checkpoints" / "8")
    assert not all(other[name].equal(tensor) for name, tensor in expected.items())
