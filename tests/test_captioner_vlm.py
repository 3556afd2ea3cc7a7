"""The captioner `vlm`: a real, tiny LLaVA end to end, and the laws of its sampling."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdprep.annotate import Sample, annotate
from sdprep.captioners._generation import Answer, KeyedSampler, ModelCaptioner, Request, nucleus
from sdprep.captioners.vlm import Config, VlmWriter
from sdprep.cli import main
from sdprep.errors import DataError, UserError
from sdprep.model_files import model_folder
from sdprep.seeding import rng_for
from tests.caption_table import caption_table
from tests.tiny_captioners import save_tiny_llava

PROMPTS = [{"prompt": "a dog", "weight": 1}, {"prompt": "the old red house on the hill . a {length} car", "weight": 1}]  # fmt: skip  # noqa: E501


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("models") / "tiny llava")


def config(model: Path, **given: Any) -> Config:
    given = {"max_new_tokens": 12, "temperature": 1.0, "device": "cpu"} | given
    data = {"model": str(model), "templates": PROMPTS} | given
    return Config.model_validate_json(json.dumps(data))


def requests(count: int, seed: int = 0) -> list[Request]:
    found = []
    for number in range(count):
        pixels = rng_for("vlm test", number).integers(0, 255, (30 + number, 40, 3))
        image = Image.fromarray(pixels.astype(np.uint8))
        prompt = PROMPTS[number % 2]["prompt"]
        found.append(Request(f"{number:032x}", image, number % 2, str(prompt), seed))
    return found


@pytest.fixture(scope="module")
def writer(llava: Path) -> VlmWriter:
    return VlmWriter(model_folder(str(llava), None, ["*"]), config(llava), "cpu")


def test_the_command_line_captions_with_a_model_from_a_folder(
    tmp_path: Path, llava: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = caption_table(tmp_path, [None] * 5)
    arguments = ["caption", table.path, "--with", "vlm", "--model", llava, "--device", "cpu"]
    settings = ["max_new_tokens=12", "temperature=1.0", 'templates=[{prompt="a {length} dog"}]']
    for setting in settings:
        arguments += ["--set", setting]
    reports = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["sdprep", *map(str, arguments), "--json"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert stop.value.code == 0, captured.err
        reports.append(json.loads(captured.out))
    assert reports[0]["done"] + reports[0]["failed"] == 5
    assert reports[0]["done"] >= 4
    assert (reports[1]["done"], reports[1]["skipped"]) == (0, 5)
    table.refresh()
    rows = [row for row in table.read(["caption_vlm"])["caption_vlm"].to_pylist() if row["text"]]
    assert len({row["text"] for row in rows}) == len(rows)
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert {row["seed"] for row in rows} <= {0, 1}
    assert all(row["prompt"].startswith("a ") and row["prompt"].endswith(" dog") for row in rows)
    assert table.has("caption_check")


def test_a_caption_does_not_depend_on_its_batch_mates(writer: VlmWriter) -> None:
    wanted = requests(9)
    alone = [writer.write([request])[0] for request in wanted]
    assert writer.write(wanted) == alone
    assert writer.write(wanted[::-1])[::-1] == alone
    assert writer.write(wanted[:4]) + writer.write(wanted[4:]) == alone
    assert len({answer.text for answer in alone}) == 9
    assert writer.write(requests(9, seed=1)) != alone


def test_generation_is_plain_sampling_with_keyed_noise(writer: VlmWriter) -> None:
    """Twenty lines that know nothing of `generate`: a whole forward for each token."""
    import torch

    tokenizer = writer.processor.tokenizer
    compared = 0
    for request in requests(10):
        text = f"USER : <image> {request.prompt} ASSISTANT : "
        inputs = writer.processor(text=text, images=request.image, return_tensors="pt")
        tokens, new = inputs["input_ids"], []
        for step in range(12):
            with torch.no_grad():
                pixels = inputs["pixel_values"]
                logits = writer.model(input_ids=tokens, pixel_values=pixels).logits[0, -1]
            p = logits.double().softmax(0).numpy()
            order = np.argsort(-p, kind="stable")
            enough = int(np.searchsorted(np.cumsum(p[order]), 0.9)) + 1
            u = rng_for(0, "caption", request.id, request.template, step).random(
                len(p), dtype=np.float32
            )
            best = max(
                order[:enough], key=lambda token: np.log(p[token]) - np.log(-np.log(u[token]))
            )
            if best in (tokenizer.eos_token_id, writer.model.config.image_token_id):
                break
            new.append(int(best))
            tokens = torch.cat([tokens, torch.tensor([[best]])], 1)
        if best == writer.model.config.image_token_id:
            continue  # a forward over such a token would want a second picture
        reason = "length" if len(new) == 12 else "stop"
        expected = Answer(tokenizer.decode(new, skip_special_tokens=True).strip(), reason)
        assert writer.write([request]) == [expected]
        compared += 1
    assert compared >= 3


def test_the_keyed_draw_has_the_law_of_sampling() -> None:
    import torch

    logits = torch.tensor([[2.0, 1.5, 0.3, -1.0, -4.0]])
    count, image = 4000, Image.new("RGB", (1, 1))
    rows = [Request(str(n), image, 0, None, 7) for n in range(count)]
    drawn = KeyedSampler(rows, 0.6, 0.9)(torch.zeros(count, 3), logits.repeat(count, 1))
    counts = Counter(drawn.argmax(1).tolist())
    p = (logits[0] / 0.6).softmax(0)
    assert p.cumsum(0)[1] > 0.9 > p[0]  # two tokens make up the nucleus
    p = p[:2] / p[:2].sum()
    assert set(counts) == {0, 1}
    assert abs(counts[0] / count - float(p[0])) < 4 * float((p[0] * p[1] / count) ** 0.5)
    greedy = KeyedSampler(rows[:1], 0, 0.9)(torch.zeros(1, 3), logits)
    assert torch.equal(greedy, logits)
    assert torch.isfinite(nucleus(logits, 1.0)).all()
    assert int(torch.isfinite(nucleus(logits, 1e-6)).sum()) == 1


def test_the_token_limit_shows_in_the_finish_reason(llava: Path) -> None:
    short = VlmWriter(model_folder(str(llava), None, ["*"]), config(llava, max_new_tokens=2), "cpu")
    answers = short.write(requests(8))
    assert "length" in {answer.finish_reason for answer in answers}
    assert all(len(answer.text.split()) <= 2 for answer in answers)


class Scripted:
    """Writes what it is told for a seed."""

    def __init__(self, texts: dict[int, str]) -> None:
        self.texts, self.seen = texts, [[0]]

    def write(self, requests: Sequence[Request]) -> list[Answer]:
        self.seen.append([request.seed for request in requests])
        return [Answer(self.texts[request.seed], "stop") for request in requests]


def test_rubbish_is_tried_once_more_with_the_next_seed_and_then_fails() -> None:
    texts = {5: "", 6: "A dog sits here.", 7: "I'm sorry, I cannot.", 8: "a dog " * 20}
    scripted = Scripted(texts)

    def draw(sample: Sample) -> tuple[int, str]:
        if sample.id == "none":
            raise DataError("the image has no tags")
        return 0, "Describe."

    captioner = ModelCaptioner("test", "f", 4, 5, draw, lambda: scripted)
    image = Image.new("RGB", (8, 8))
    batch = [Sample("a", {}, image), Sample("b", {}, image, attempt=1), Sample("none", {}, image)]
    rows = captioner.annotate(batch).to_pylist()
    assert scripted.seen[1:] == [[5, 7], [6, 8]]
    assert rows[0]["text"] == "A dog sits here."
    assert (rows[0]["seed"], rows[0]["attempt"], rows[0]["error"]) == (6, 0, None)
    assert rows[1]["text"] is None
    assert "malformed twice; repetition" in rows[1]["error"]
    assert rows[1]["attempt"] == 1
    assert "no tags" in rows[2]["error"]


def test_trying_again_draws_from_another_seed(tmp_path: Path, llava: Path) -> None:
    table = caption_table(tmp_path, [None] * 4)
    captioner = config(llava).build()
    annotate(table, {"caption_vlm": captioner})
    ids = table.read(["id"])["id"].to_pylist()
    first = table.read(["caption_vlm"])["caption_vlm"].to_pylist()
    import pyarrow as pa

    from sdprep.caption_check import CHECK

    check = {"flags": ["length"], "columns": ["caption_vlm"]}
    with table.writer():
        table.write_fold(ids[:1], {"caption_check": pa.array([check], CHECK)}, stage="test")
    [report] = annotate(
        table, {"caption_vlm": captioner}, retry_failed=True, where=f"id = '{ids[0]}'"
    )
    assert report.done + report.failed == 1
    second = table.read(["caption_vlm"])["caption_vlm"].to_pylist()
    assert second[0]["attempt"] == first[0]["attempt"] + 1
    assert second[0]["seed"] in (2, 3)
    assert second[0]["text"] != first[0]["text"]
    assert second[1:] == first[1:]


def test_a_model_that_cannot_be_used_is_named_with_what_to_do(tmp_path: Path, llava: Path) -> None:
    mute = save_tiny_llava(tmp_path / "mute", chat_template=None)
    with pytest.raises(DataError, match="no chat template"):
        VlmWriter(model_folder(str(mute), None, ["*"]), config(mute), "cpu")
    with pytest.raises(UserError) as stop:
        config(Path("nobody/no-such-model")).build()
    assert "nobody/no-such-model" in str(stop.value)
    assert "hf download" in str(stop.value)
    (mute / "model.safetensors").rename(mute / "pytorch_model.bin")
    with pytest.raises(DataError, match="does not load"):
        VlmWriter(model_folder(str(mute), None, ["*"]), config(mute), "cpu")
