"""The spread between seeds, by its formula, in a grid and in a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sdprep.errors import DataError
from sdtrain import variety
from sdtrain.recipe import load_train_recipe
from sdtrain.trainer import train
from tests.tiny_contrastive import save_tiny_contrastive


def drawn(*latents: Any) -> list[Any]:
    return [SimpleNamespace(latents=torch.tensor(each, dtype=torch.float32)) for each in latents]


def test_the_spread_is_the_mean_of_the_pairs_root_mean_squares() -> None:
    a, b, c = [[0.0, 0.0], [0.0, 0.0]], [[2.0, 2.0], [2.0, 2.0]], [[0.0, 0.0], [0.0, 4.0]]
    # a-b: 2; a-c: sqrt(16/4) = 2; b-c: sqrt((4 + 4 + 4 + 4)/4) = 2
    assert variety.latent_spread(drawn(a, b, c)) == pytest.approx(2.0)
    assert variety.latent_spread(drawn(a, b)) == pytest.approx(2.0)
    assert variety.latent_spread(drawn(a, a)) == 0.0
    assert variety.latent_spread(drawn(a)) is None
    noise = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(1)).tolist()
    assert variety.latent_spread(drawn(*noise)) == pytest.approx(2**0.5, rel=0.02)


def test_relative_to_nothing_is_nothing() -> None:
    assert variety.relative(1.0, 2.0) == 0.5
    assert variety.relative(1.0, 0.0) is None
    assert variety.relative(None, 1.0) is None
    assert variety.mean([None, 1.0, 2.0]) == 1.5
    assert variety.mean([None]) is None


def test_the_unit_is_the_first_line_that_was_drawn_in_the_same_way() -> None:
    first = variety.metrics_line(0, {"steps": 2}, {"a": 2.0, "b": 0.0}, [])
    assert first["mean_relative"] == 1.0
    other = variety.metrics_line(4, {"steps": 3}, {"a": 9.0}, [first])
    line = variety.metrics_line(8, {"steps": 2}, {"a": 1.0, "b": 1.0, "c": 5.0}, [first, other])
    assert [entry["relative"] for entry in line["prompts"]] == [0.5, None, 1.0]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_an_embedding_measures_one_minus_the_cosine(kind: str, tmp_path: Path) -> None:
    from PIL import Image

    from sdprep.contrastive import FILES, ContrastiveModel
    from sdprep.model_files import model_folder

    folder = save_tiny_contrastive(tmp_path / kind, kind)
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue", "white")]
    spread = variety.EmbeddingSpread(str(folder), "cpu")
    found = spread([SimpleNamespace(picture=picture) for picture in pictures])
    a, b, c = ContrastiveModel(model_folder(str(folder), None, FILES), "cpu").image_embeddings(
        pictures
    )
    assert found == pytest.approx(np.mean([1 - a @ b, 1 - a @ c, 1 - b @ c]), abs=1e-6)
    assert spread([SimpleNamespace(picture=pictures[0])]) is None
    (folder / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(DataError, match="expected clip or siglip"):
        variety.EmbeddingSpread(str(folder), "cpu")


def lines(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [x for x in map(json.loads, text.splitlines()) if x["kind"] == "variety"]


@pytest.mark.slow
def test_a_run_with_several_seeds_logs_its_variety_also_after_a_resume(
    train_recipe: Callable[..., Path],
) -> None:
    wanted = (
        *('sampling.prompts=["", "red car"]', "sampling.seeds=2", "sampling.every_samples=8"),
        *("sampling.num_inference_steps=2", "train.samples=12"),
    )
    whole = train_recipe(output="whole")
    train(load_train_recipe(whole, wanted))
    found = lines(whole.with_name("whole"))
    assert [line["samples_seen"] for line in found] == [0, 8, 12]
    assert found[0]["mean_relative"] == 1.0
    last = found[-1]["prompts"]
    assert [entry["prompt"] for entry in last] == ["", "red car"]
    assert all(entry["relative"] not in (None, 1.0) for entry in last)
    place = whole.with_name("whole") / "samples" / "12"
    entries = json.loads((place / "prompts.json").read_text(encoding="utf-8"))
    assert [(entry["prompt"], entry["seed"]) for entry in entries] == [
        *(("", 7), ("", 8)),
        *(("red car", 7), ("red car", 8)),
    ]
    assert len({(place / entry["file"]).read_bytes() for entry in entries}) == 4

    halves = train_recipe(output="halves")
    train(load_train_recipe(halves, (*wanted, "train.samples=12")), keeps_model=False)
    # Back to 8, and from there to the end once more: the unit is still that of the start.
    run = halves.with_name("halves")
    train(load_train_recipe(halves, wanted), resume=str(run / "checkpoints" / "8"))
    assert lines(run) == found
