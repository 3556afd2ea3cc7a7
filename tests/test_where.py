"""Where two models differ is found where it was planted, and drawn."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdprep.errors import UserError
from sdtrain.compare import compare_measured, text
from sdtrain.forest import draw, rows
from sdtrain.labels import FEWEST_IMAGES, Labels, extremes, groups
from sdtrain.lattice import FLAT
from sdtrain.matrices import Measured
from sdtrain.probe import LossMatrix, Probe, ProbeImage

N, M = 16, 4
LABELS = tuple(
    Labels(("solo", "car" if k < 6 else "dog", *(["rare"] if k < 3 else [])), f"set{k % 2}")
    for k in range(N)
)
IMAGES = tuple(ProbeImage(f"id{k:02d}", f"prompt $x_{k}$ <b>", (64, 64)) for k in range(N))
PROBE = Probe("validation", 1, IMAGES, M, FLAT, "tiny", "epsilon", "no", "hash", labels=LABELS)


def matrix(seed: int, of_car: float = 0.0, noisy: float = 0.0, image: float = 0.0) -> LossMatrix:
    rng = np.random.default_rng(0)
    u = PROBE.u()
    loss = np.exp(-2 * u) * rng.gamma(50, 0.02, (N, 1))
    own = np.random.default_rng(seed).standard_normal((N, M)) * 0.002 * (seed > 0)
    change = own + noisy * (u > 0.7)
    change[:6] += of_car
    change[9] += image
    return LossMatrix((loss * (1 + change)).astype(np.float32), u, np.ones((N, M)))


def pair(folder: Path, b: LossMatrix, probe: Probe = PROBE) -> list:
    place = probe.save(folder)
    for name, each in (("a", matrix(0)), ("b", b)):
        each.save(place / f"{name}.npz", [i.id for i in IMAGES])
    return compare_measured([(Measured(place / "a.npz", probe), Measured(place / "b.npz", probe))])


def test_the_tag_that_changed_is_named(tmp_path: Path) -> None:
    (found,) = pair(tmp_path, matrix(1, of_car=-0.03))
    by_name = {g.name: g for g in found.where.groups}
    assert set(by_name) == {"car", "dog", "set0", "set1"}, "solo is everything, rare too few"
    assert by_name["car"].differs
    assert not by_name["dog"].differs
    assert by_name["car"].found.change_percent == pytest.approx(-3, abs=0.3)
    assert by_name["car"].found.num_images == 6 >= FEWEST_IMAGES
    assert re.search(r"tags that differ +car -(2\.[89]|3\.[012])", text([found]))
    data = json.loads(json.dumps(found.to_json()))
    assert data["tags"][0]["name"] == "car"
    assert [g["name"] for g in data["sources"]] in (["set0", "set1"], ["set1", "set0"])


def test_nothing_differs_in_nothing(tmp_path: Path) -> None:
    """Tags by the dozen, no change: hardly ever is one called different."""
    wrong = 0
    for seed in range(1, 60):
        rng = np.random.default_rng(seed)
        tags = [Labels(tuple(f"t{k}" for k in range(12) if rng.random() < 0.5)) for _ in range(N)]
        found = groups(matrix(0).weighted, matrix(seed).weighted, tags)
        assert len(found) > 6
        wrong += any(group.differs for group in found)
    assert wrong <= 8


def test_the_noise_levels_that_changed_are_found(tmp_path: Path) -> None:
    (found,) = pair(tmp_path, matrix(1, noisy=-0.05))
    for each in found.where.bins:
        assert each.change_percent is not None
        assert each.ci95_percent is not None
        low, high = each.ci95_percent
        expected = -5.0 if each.start >= 0.7 else 0.0
        assert each.change_percent == pytest.approx(expected, abs=0.6)
        assert (high < 0) == (each.start >= 0.7) or low < 0 < high


def test_the_image_that_changed_is_named(tmp_path: Path) -> None:
    (found,) = pair(tmp_path, matrix(1, image=0.2))
    assert len(found.where.images) == 10
    assert found.where.images[-1].id == "id09"
    assert found.where.images[-1].change_percent == pytest.approx(20, abs=1)
    assert re.search(r"least so +id09 \+(19|20)", text([found]))


def test_labels_stand_in_the_file_and_not_in_the_name(tmp_path: Path) -> None:
    plain = replace(PROBE, labels=())
    assert plain.probe_id == PROBE.probe_id
    assert plain == PROBE
    assert Probe.load(PROBE.save(tmp_path)).labels == LABELS
    file = plain.save(tmp_path / "old") / "probe.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    del data["labels"]  # as earlier releases wrote it
    file.write_text(json.dumps(data), encoding="utf-8")
    assert Probe.load(file).labels == ()
    (found,) = pair(tmp_path / "none", matrix(1), plain)
    assert found.where.groups == []


def test_of_many_tags_the_ends_are_shown() -> None:
    tags = [Labels(tuple(f"t{k:02d}" for k in range(40) if (i + k) % 3)) for i in range(N)]
    found = groups(matrix(0).weighted, matrix(1).weighted, tags)
    shown = extremes(found, "tag", 3)
    assert len(found) == 40
    assert [g.name for g in shown] == [g.name for g in [*found[:3], *found[-3:]]]


def test_the_forest_is_drawn_with_every_part(tmp_path: Path) -> None:
    (found,) = pair(tmp_path, matrix(1, of_car=-0.03, noisy=0.02))
    labels = [row.label for row in rows(found)]
    assert labels[0] == "all images and noise levels"
    assert {"by noise level u", "0.9 to 1.0", "by tag", "car", "by source", "set1"} <= set(labels)
    for ending in (".png", ".svg"):
        path = draw([found, found], tmp_path / "a folder" / f"forest{ending}")
        assert path.stat().st_size > 10_000
    with Image.open(tmp_path / "a folder" / "forest.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1_000_000) or []) > 50
    with pytest.raises(UserError, match="must end in"):
        draw([found], tmp_path / "forest.txt")


def test_the_verdict_for_new_images_needs_more_than_these(tmp_path: Path) -> None:
    b = matrix(1)
    own = np.where(np.arange(N) % 3 == 0, 1.05, 0.985)[:, None]
    b = LossMatrix((b.loss * own * 1.001).astype(np.float32), b.u, b.density)
    (found,) = pair(tmp_path, b)
    assert (found.direction, found.new_direction) == (1, 0)
    data = found.to_json()
    assert (data["verdict"], data["verdict_new_images"]) == ("worse", "cannot tell")
