"""The captioner `tipo`: its prompt, and a real, tiny language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdprep.annotate import annotate
from sdprep.captioners._generation import Answer, Request, likeliest
from sdprep.captioners.tipo import Config, TipoWriter, _first_line, tipo_prompt
from sdprep.errors import DataError
from sdprep.model_files import model_folder
from tests.caption_table import caption_table
from tests.tiny_captioners import save_tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny tipo")


def config(model: Path) -> Config:
    return Config(model=str(model), device="cpu", temperature=1.0, max_new_tokens=12)


def tags(*pairs: tuple[str, str | None]) -> dict[str, Any]:
    return {"tags": [{"name": name, "category": category} for name, category in pairs]}


def test_the_prompt_has_the_lines_of_tipo() -> None:
    row = tags(
        ("1girl", "general"),
        ("hatsune_miku", "character"),
        ("long_hair", None),
        ("vocaloid", "copyright"),
        ("ke-ta", "artist"),
        ("explicit", "rating"),
        ("highres", "meta"),
    )
    assert tipo_prompt(row, "masterpiece", "long") == (
        "meta: highres\nrating: nsfw, explicit\nartist: ke-ta\ncharacters: hatsune miku\n"
        "copyrights: vocaloid\nquality: masterpiece\ntarget: <|long|> <|tag_to_long|>\n"
        "tag: 1girl, long hair\nlong:"
    )
    assert tipo_prompt(tags(("sea", "general")), None, "short") == (
        "target: <|short|> <|tag_to_long|>\ntag: sea\nlong:"
    )
    for empty in ({}, {"tags": []}, tags(("highres", "meta"))):
        with pytest.raises(DataError, match="has none"):
            tipo_prompt(empty, None, "long")


def test_only_the_first_line_is_the_caption() -> None:
    assert _first_line(Answer("A dog.\ntag: cat", "length")) == Answer("A dog.", "stop")
    assert _first_line(Answer("A dog", "length")) == Answer("A dog", "length")


def test_top_k_and_min_p_leave_the_likeliest() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.04, 0.01]]))
    assert torch.isfinite(likeliest(logits, 2, 0)).sum() == 2
    assert torch.isfinite(likeliest(logits, 0, 0.1)).sum() == 3
    assert torch.isfinite(likeliest(logits, 0, 0)).sum() == 5
    assert torch.isfinite(likeliest(logits, 99, 0)).sum() == 5


def test_tipo_writes_from_the_tags_of_a_table(tmp_path: Path, llama: Path) -> None:
    table = caption_table(tmp_path, [None] * 4)
    [report] = annotate(table, {"caption_tipo": config(llama).build()})
    assert (report.done, report.failed) == (0, 4)
    assert "Run sdprep tag first" in report.first_error
    ids = table.read(["id"])["id"].to_pylist()
    import pyarrow as pa

    from sdprep.schema import FOLDS

    names = ["old house", "red car", "dog", "sea"]
    lists = [[{"name": name, "category": "general"}] for name in names]
    with table.writer():
        table.write_fold(ids, {"tags": pa.array(lists, FOLDS["tags"])}, stage="test")
    [again] = annotate(table, {"caption_tipo": config(llama).build()}, retry_failed=True)
    assert again.done >= 3, again.first_error
    rows = table.read(["caption_tipo"])["caption_tipo"].to_pylist()
    for name, row in zip(names, rows, strict=True):
        assert row["attempt"] == 1
        if row["error"] is None:
            assert f"tag: {name}\n" in row["prompt"]
            assert "\n" not in row["text"]


def test_a_caption_does_not_depend_on_its_batch_mates(llama: Path) -> None:
    writer = TipoWriter(model_folder(str(llama), None, ["*"]), config(llama), "cpu")
    texts = ["dog", "the old red house, car", "sea, sky, sand", "cat", "boat"]
    wanted = [
        Request(f"{n:032x}", None, 0, tipo_prompt(tags((text, None)), None, "long"), 0)
        for n, text in enumerate(texts)
    ]
    alone = [writer.write([request])[0] for request in wanted]
    assert writer.write(wanted) == alone
    assert writer.write(wanted[::-1])[::-1] == alone
    assert len({answer.text for answer in alone}) == 5
