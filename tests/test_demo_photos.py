"""The photos of the demo: enough of them, small, credited, and with what they should contain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from sdprep.annotate import Sample
from sdprep.images import ImageRejected, open_image
from sdprep.plugins import config_for

FOLDER = Path(__file__).resolve().parent.parent / "tools" / "demo_photos"
PHOTOS = FOLDER / "photos"
AGAIN = PHOTOS / "found_again"


def test_enough_real_photos_in_little_space():
    photos = [path for path in PHOTOS.glob("*/*.jpg") if path.parent != AGAIN]
    assert len(photos) >= 72
    for path in photos:
        opened = open_image(path)
        assert max(opened.image.size) <= 512
        assert path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        assert path.with_suffix(".caption").read_text(encoding="utf-8").strip()
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 5_000_000


def test_every_subject_is_credited():
    text = (FOLDER / "LICENSE.md").read_text(encoding="utf-8")
    assert "CC BY 4.0" in text
    assert "unsplash.com/license" in text
    table = text.partition("## Credits by subject")[2]
    subjects = [path.name for path in PHOTOS.iterdir() if path != AGAIN]
    assert len(subjects) == 18
    for subject in subjects:
        assert subject in table.replace(",", "").split(), subject


def test_nothing_but_one_invented_position_is_in_the_files():
    for path in PHOTOS.glob("*/*.jpg"):
        with Image.open(path) as image:
            exif = image.getexif()
            if path == PHOTOS / "monster_toy" / "00.jpg":
                assert exif[0x0112] == 6
                assert exif.get_ifd(0x8825)[1] == "N"
            else:
                assert not dict(exif), path
                assert "icc_profile" not in image.info


def test_what_was_put_in_is_what_source_md_says():
    told = (FOLDER / "SOURCE.md").read_text(encoding="utf-8")
    names = sorted(path.name for path in AGAIN.glob("*.jpg"))
    assert len(names) == 6
    assert all(f"`found_again/{name}`" in told for name in names)
    copy, first = AGAIN / "vase_00_copy.jpg", PHOTOS / "vase" / "00.jpg"
    assert copy.read_bytes() == first.read_bytes()
    with pytest.raises(ImageRejected) as error:
        open_image(AGAIN / "clock_00_broken.jpg")
    assert error.value.reason == "truncated"
    assert open_image(AGAIN / "teapot_02_smaller.jpg").image.size == (320, 320)
    for name, other in (("cat_00_reencoded", "cat/00"), ("dog_01_mirrored", "dog/01")):
        found = open_image(AGAIN / f"{name}.jpg").image
        found = ImageOps.mirror(found) if "mirrored" in name else found
        original = open_image(PHOTOS / f"{other}.jpg").image
        difference = np.asarray(found, dtype=int) - np.asarray(original, dtype=int)
        assert 0 < np.abs(difference).mean() < 4


def test_the_blurred_one_alone_scores_below_2():
    scorer = config_for("scorer", "technical")().build()
    low = []
    for path in sorted(PHOTOS.glob("*/*.jpg")):
        if path.name == "clock_00_broken.jpg":
            continue
        opened = open_image(path)
        row = {"exif_orientation": opened.info.exif_orientation}
        batch = scorer.annotate([Sample("x", row, opened.image, None, path.read_bytes())])
        if batch.column("score")[0].as_py() < 2:
            low.append(path.name)
    assert low == ["rc_car_01_blurred.jpg"]
