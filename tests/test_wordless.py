"""Pictures without text, and a folder that is no data set yet, are told before anything trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sdprep.errors import DataError
from sdtrain.recipe import load_train_recipe
from sdtrain.setup import open_setup
from tests.train_data import prepared_row, small_jpeg, write_prepared

Recipe = Callable[..., Path]


@pytest.mark.parametrize(
    ("without", "words"),
    [(0, None), (1, None), (2, "2 of 10 training pictures"), (10, "all 10 training pictures")],
)
def test_pictures_without_text_are_warned_of(
    train_recipe: Recipe,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    without: int,
    words: str | None,
) -> None:
    rows = [
        prepared_row(n, **({"caption": None, "captions": []} if n < without else {}))
        for n in range(10)
    ]
    policy = {"mode": "caption", "dropout_p": 1.0}  # a dropped caption is no missing one
    data = write_prepared(tmp_path / "set", rows, policy=policy)
    open_setup(load_train_recipe(train_recipe(data=data)))
    said = " ".join(capfd.readouterr().err.split())
    assert ("have no text" in said) == (words is not None)
    assert words is None or f"warning {words} that were looked at have no text" in said


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_a_folder_of_pictures_with_texts_is_told_how_to_become_a_set(
    train_recipe: Recipe, tmp_path: Path, suffix: str
) -> None:
    folder = tmp_path / "my photos"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(small_jpeg(number, (64, 64)))
        (folder / f"{number}{suffix}").write_text("a dog", encoding="utf-8")
    with pytest.raises(DataError) as stop:
        open_setup(load_train_recipe(train_recipe(data=folder)))
    assert f"0{suffix}, …" in stop.value.message
    assert "sdprep ingest" in str(stop.value.hint)
    assert 'data.path = "my photos.lance"' in str(stop.value.hint)
