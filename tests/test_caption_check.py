"""The monitors of captions: what was planted is found, what people wrote is left alone."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.spatial.distance import jensenshannon

from sdprep.annotate import PixelNeeds, Sample, annotate
from sdprep.caption_check import (
    COLUMN,
    caption_counts,
    check_captions,
    check_row,
    habits_of,
    review_queue,
)
from sdprep.caption_claims import Seen, check_claims, people_claimed
from sdprep.caption_drift import describe_set, keyed_sample
from sdprep.caption_monitors import Habits, check_text, malformed, words_of
from sdprep.caption_rows import Caption
from sdprep.cli import main
from sdprep.seeding import integer
from sdprep.stages import compose_stage, watch_captions
from tests.caption_table import caption_table

Folder = Callable[[str], Path]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def human(shared_data: Folder) -> dict[str, list[str]]:
    texts = shared_data("texts")
    pairs = lines(texts / "docci_pairs.jsonl")
    return {
        "coco": [c for row in lines(texts / "coco_captions.jsonl") for c in row["captions"]],
        "iiw": [row["human"] for row in lines(texts / "iiw_long_captions.jsonl")],
        "docci": [row[key] for row in pairs for key in ("short", "long")],
    }


def test_human_captions_are_left_alone(human: dict[str, list[str]]) -> None:
    rates = {}
    for name, texts in human.items():
        habits = habits_of([Caption("text", text) for text in texts])
        flagged = [text for text in texts if check_text(text, habits=habits)]
        rates[name] = len(flagged) / len(texts)
        print(f"{name}: {len(flagged)} of {len(texts)} flagged")
    assert len(rates) == 3
    assert max(rates.values()) < 0.02, rates
    assert rates["coco"] < 0.006  # measured .0042, refusals of COCO's own writers among them


PLANTED: dict[str, list[Callable[[str], str]]] = {
    "repetition": [
        lambda text: text + " a dog" * 6,
        lambda text: " ".join([text] * 3),
        lambda text: text + " very very very very very big.",
    ],
    "unfinished": [
        lambda text: text.rstrip(". ") + " and the",
        lambda text: text.rstrip(". ") + ",",
        lambda text: text.rstrip(". ") + " next to a",
    ],
    "refusal": [
        lambda text: "I'm sorry, but I can't help with that request.",
        lambda text: "I cannot describe the people in this photo.",
        lambda text: "As an AI language model, I do not see pictures.",
    ],
    "boilerplate": [
        lambda text: "The image shows " + text,
        lambda text: text.rstrip(". ") + ". Overall, the image conveys a calm mood.",
        lambda text: "This image depicts " + text,
    ],
    "preamble": [
        lambda text: "Sure! " + text,
        lambda text: "Here is a detailed caption for your image: " + text,
        lambda text: "Caption: " + text,
        lambda text: text + "<|im_end|>",
    ],
    "markdown": [
        lambda text: "**" + text + "**",
        lambda text: "# Description\n" + text,
        lambda text: "- a dog\n- a ball\n" + text,
    ],
    "json": [
        lambda text: json.dumps({"caption": text}),
        lambda text: '{"caption": "' + text[:20],
        lambda text: json.dumps([text]),
    ],
    "url": [
        lambda text: text + " See https://example.com/photo.",
        lambda text: "www.me.com " + text,
    ],
    "script": [
        lambda text: "一只狗坐在草地上的照片。",
        lambda text: text.rstrip(". ") + " 的照片在草地上。",
        lambda text: "Собака сидит на траве.",
    ],
    "language": [
        lambda text: "Ein Hund sitzt auf dem Rasen und eine Katze steht vor der Tür.",
        lambda text: "Le chien est assis sur la pelouse avec une balle et un chat.",
        lambda text: "Un perro en la playa.",
    ],
    "length": [lambda text: "Dog.", lambda text: "A dog."],
    "word_list": [
        lambda text: "1girl, solo, long_hair, blue_eyes, smile, outdoors",
        lambda text: "dog, grass, ball, sunny day, park, trees, happy",
    ],
    "empty": [lambda text: "...", lambda text: "  \n"],
}


def test_every_planted_fault_is_found_among_200_captions(human: dict[str, list[str]]) -> None:
    texts = sorted(human["coco"], key=lambda text: integer("plant", text))[:200]
    faults = [(flag, plant) for flag, plants in PLANTED.items() for plant in plants]
    planted = {5 * at: fault for at, fault in enumerate(faults)}
    assert len(planted) == len(faults) == 36
    set_ = [planted[at][1](text) if at in planted else text for at, text in enumerate(texts)]
    habits = habits_of([Caption("text", text) for text in set_])
    assert habits.language == "en"
    for at, text in enumerate(set_):
        found = check_text(text, habits=habits)
        if at in planted:
            assert planted[at][0] in found, (planted[at][0], text, found)
    wrong = [t for at, t in enumerate(set_) if at not in planted and check_text(t, habits=habits)]
    assert len(wrong) <= 3, wrong


def test_no_part_of_200_human_captions_is_flagged_by_its_habits(
    human: dict[str, list[str]],
) -> None:
    shares = []
    for start in range(0, 12_000, 200):
        part = human["coco"][start : start + 200]
        habits = habits_of([Caption("text", text) for text in part])
        shares.append(sum(bool(check_text(text, habits=habits)) for text in part) / 200)
    assert len(shares) == 60
    assert max(shares) < 0.02


def test_a_token_limit_counts_where_the_sentence_is_open() -> None:
    assert "unfinished" in check_text("A dog runs over green grass", finish_reason="length")
    assert not check_text("A dog runs over green grass.", finish_reason="length")
    assert not check_text("A dog runs over green grass", finish_reason="stop")
    usual = Habits(ends_with_mark=True)
    assert "unfinished" in check_text("A dog runs over green grass", habits=usual)


def test_habits_come_from_the_column_itself() -> None:
    japanese = [Caption("caption_x", f"草の上に座っている犬の写真{n}。") for n in range(30)]
    habits = habits_of(japanese)
    assert habits.script != "LATIN"
    assert habits.ends_with_mark
    german = "Der Hund ist auf dem Rasen und eine Katze sitzt neben der Tür."
    assert habits_of([Caption("caption_x", german)] * 25).language == "de"
    assert habits_of([Caption("caption_x", german)] * 5) == Habits()
    prompt = "Describe the picture."
    short = [Caption("caption_x", "A dog sits on grass here.", prompt)] * 40
    assert "length" in check_text(" ".join(f"w{n}" for n in range(90)), habits=habits_of(short))


@pytest.mark.parametrize(
    ("count", "is_flagged"), [(9, True), (10, False), (20, False), (30, False), (31, True)]
)
def test_length_is_held_against_the_request(count: int, is_flagged: bool) -> None:
    text = " ".join(f"word{n}" for n in range(count)) + "."
    found = check_text(text, prompt="Write a caption within 20 words.")
    assert ("length" in found) == is_flagged


def test_an_image_prompt_may_be_a_list() -> None:
    text = "1girl, solo, long_hair, blue_eyes, smile, outdoors"
    assert "word_list" in check_text(text, prompt="Describe this image.")
    assert "word_list" not in check_text(text, prompt="Write a stable diffusion prompt.")


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ('{"caption": "A dog sits on the grass.", "tags": ["dog", "grass", "day", "park"]}', []),
        ('```json\n{"caption": "A dog sits on the grass."}\n```', []),
        ('[{"caption": "A dog sits on the grass."}]', []),
        ('{"caption": "A dog sits on the', ["json"]),
        ("A dog sits on the grass.", ["json"]),
        ('"A dog"', ["json"]),
        ('{"caption": "I cannot describe this picture."}', ["refusal"]),
        ('{"people": 2}', ["empty"]),
    ],
)
def test_json_that_was_asked_for_must_be_whole(text: str, flags: list[str]) -> None:
    asked = 'Answer as JSON: {"caption": "…"}'
    assert list(check_text(text, prompt=asked)) == flags
    assert (malformed(text, asked) is not None) == bool(flags)
    if text.startswith("{"):
        assert malformed(text), "nobody asked for it"


@pytest.mark.parametrize(
    ("text", "claimed"),
    [
        ("A man and a woman cut a cake.", (2, 2)),
        ("Two young men ride horses.", (2, 2)),
        ("A woman sits. The woman smiles.", (1, 2)),
        ("People on a beach.", (2, math.inf)),
        ("A man stands in a crowd.", (1, math.inf)),
        ("A boy and two girls play.", (3, 3)),
        ("3 people wait.", (3, 3)),
    ],
)
def test_people_are_counted_as_an_interval(text: str, claimed: tuple[int, float]) -> None:
    found = people_claimed(text.lower())
    assert found is not None
    assert found[:2] == claimed


def test_a_caption_without_people_claims_none() -> None:
    assert people_claimed("a dog sits on the grass.") is None
    assert check_claims("A dog sits on the grass.", Seen(frozenset({"1girl"}))) == []


def seen(*tags: str, **more: Any) -> Seen:
    return Seen(frozenset(tags), **more)


PERSON, TWO = ("person", 0.9), [("person", 0.9), ("person", 0.8)]
CLAIMS: list[tuple[str, Seen, str, bool]] = [
    ("Two women sit.", seen("1girl", "solo"), "people_tags", True),
    ("A woman sits.", seen("1girl", "solo"), "people_tags", False),
    ("A man sits.", seen("1girl"), "sex", True),
    ("Two girls sit.", seen("2girls"), "sex", False),
    ("Three people sit.", seen("6+girls"), "people_tags", True),
    ("A woman sits.", seen("no_humans"), "people_tags", True),
    ("A man stands by a wall.", seen(boxes=TWO), "people_boxes", True),
    ("Two men stand by a wall.", seen(boxes=TWO), "people_boxes", False),
    ("Three men stand.", seen(boxes=[PERSON]), "people_boxes", False),  # one is enough to be seen
    ("A man stands.", seen(looked_for_people=True), "people_boxes", True),
    ("There is no text.", seen("watermark"), "text", True),
    ("There is no watermark.", seen(looked_for_text=True), "text", False),
    ("A sign reads STOP.", seen(looked_for_text=True), "text", True),
    ("A sign reads STOP.", seen(boxes=[("text", 0.9)]), "text", False),
    ("A girl with red hair.", seen("blue_hair"), "colour_hair", True),
    ("A girl with long blonde hair.", seen("blonde_hair"), "colour_hair", False),
    ("A girl with golden hair.", seen("blonde_hair", "red_hair"), "colour_hair", False),
    ("A cat outdoors.", seen("indoors"), "place", True),
    ("A cat outdoors.", seen("outdoors"), "place", False),
    ("A black and white photo of a cat.", seen(looked_for_colour=True), "monochrome", True),
    ("A black and white photo of a cat.", seen("monochrome"), "monochrome", False),
    ("A cat on a red rug.", seen("greyscale", "monochrome"), "monochrome", True),
]


@pytest.mark.parametrize(("text", "what", "check", "is_against"), CLAIMS)
def test_claims_are_held_against_tags_and_boxes(
    text: str, what: Seen, check: str, is_against: bool
) -> None:
    found = {finding.check: finding.reason for finding in check_claims(text, what)}
    assert check in found
    assert bool(found[check]) == is_against, found


def test_the_score_is_contradictions_over_checks() -> None:
    what = seen("1girl", "solo", "indoors", "blue_hair")
    caption = Caption("caption_vlm", "A girl with red hair stands outdoors.")
    row = check_row([caption], {}, what)
    # people and sex agree, place and hair do not
    assert (row["checks"], row["score"]) == (4, 0.5)
    assert row["flags"] == ["contradiction"]
    assert row["columns"] == ["caption_vlm"]
    assert len(row["reasons"]) == 2
    assert check_row([Caption("text", "A cat sleeps.")], {}, Seen())["score"] is None


def test_drift_is_the_jensen_shannon_divergence() -> None:
    new = ["a red dog sits here now"] * 3 + ["a blue cat runs there often"] * 2
    old = ["a red dog sits here now", "an old house stands on a hill"]
    found = describe_set(new, old)
    for size in range(1, 6):
        grams = [[tuple(w[i : i + size]) for t in ts for w in [words_of(t)] for i in range(len(w) - size + 1)] for ts in (new, old)]  # fmt: skip  # noqa: E501
        every = sorted(set(grams[0]) | set(grams[1]))
        p, q = ([g.count(each) / len(g) for each in every] for g in grams)
        assert found["drift"][str(size)] == pytest.approx(jensenshannon(p, q, 2) ** 2, abs=1e-4)
    phrases = [row["phrase"] for row in found["risers"]]
    assert "a blue" in phrases
    assert "old house" not in phrases
    assert len(phrases) <= 50
    assert all(row["share"] > row["reference_share"] for row in found["risers"])


def test_a_common_opening_is_a_warning_of_the_set() -> None:
    texts = [f"In the middle stands thing {n}." for n in range(9)]
    texts += [f"Thing {n} is what one sees here." for n in range(21)]
    found = describe_set(texts)
    assert found["opening"] == "in the middle"
    assert found["opening_share"] == 0.3
    assert len(found["warnings"]) == 1
    assert describe_set(texts[6:])["warnings"] == []  # 3 of 24
    assert found["distinct_2"] == pytest.approx(0.4, abs=0.2)
    assert describe_set([])["opening"] is None


def test_the_sample_of_a_large_set_ignores_the_order() -> None:
    pairs = [(f"{n:04d}", f"text {n}") for n in range(500)]
    chosen = keyed_sample(pairs, 50)
    assert len(chosen) == 50
    assert keyed_sample(pairs[::-1], 50) == chosen


# --- over a table ---------------------------------------------------------------------------------


class Writer:
    """Writes a bad caption at first and a good one at another attempt; may fail instead."""

    columns = pa.schema([("text", pa.string()), ("seed", pa.int64()), ("attempt", pa.int32())])
    pixels = PixelNeeds(pixels=False, columns=("tags", "not_there"))
    fingerprint = "writer"
    batch_size = 4
    is_thread_safe = False

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.announced: list[int] = []

    def foresee(self, count: int) -> None:
        self.announced.append(count)

    def annotate(self, batch: Sequence[Sample]) -> pa.RecordBatch:
        rows = []
        for sample in batch:
            self.asked.append((sample.id, sample.attempt))
            assert "not_there" not in sample.row
            number = int(sample.row["sources"][0]["key"][:3])
            row = {"text": f"Picture {number} shows a dog.", "seed": sample.attempt, "error": None}
            if number % 3 == 1 and sample.attempt == 0:
                row["text"] = "I'm sorry, but I cannot describe this."
            if number % 3 == 2 and sample.attempt < 2:
                row = {"text": None, "seed": None, "error": "out of words"}
            rows.append(row | {"attempt": sample.attempt})
        schema = self.columns.append(pa.field("error", pa.string()))
        return pa.RecordBatch.from_pylist(rows, schema=schema)


def test_failed_and_flagged_captions_are_tried_again_with_another_seed(tmp_path: Path) -> None:
    table = caption_table(tmp_path, [None] * 12)
    writer = Writer()
    [first] = annotate(table, {"caption_writer": writer})
    assert (first.done, first.failed) == (8, 4)
    assert writer.announced == [12]
    report = watch_captions(table)
    assert report is not None
    assert (report["captioned"], report["flagged"], report["flags"]) == (8, 4, {"refusal": 4})
    assert table.read([f"{COLUMN}.columns"], f"{COLUMN} IS NOT NULL").num_rows == 8

    [again] = annotate(table, {"caption_writer": writer})
    assert (again.done, again.failed, again.skipped) == (0, 0, 12)
    [second] = annotate(table, {"caption_writer": writer}, retry_failed=True)
    assert (second.done, second.failed, second.skipped) == (4, 4, 4)
    assert {attempt for _, attempt in writer.asked[12:]} == {1}
    check_captions(table)
    counts = caption_counts(table)
    assert counts is not None
    assert (counts["captioned"], counts["flagged"]) == (8, 0)
    [third] = annotate(table, {"caption_writer": writer}, retry_failed=True)
    assert (third.done, third.failed, third.skipped) == (4, 0, 8)
    rows = table.read(["caption_writer"])["caption_writer"].to_pylist()
    assert [row["attempt"] for row in rows] == [0, 1, 2] * 4
    assert all(row["error"] is None for row in rows)


def test_what_a_person_wrote_is_not_doubted(tmp_path: Path) -> None:
    table = caption_table(tmp_path, ["Sure! A dog sits on the grass.", "A dog sits on the grass."])
    report = compose_stage(table, None)
    assert report["images"] == 2
    assert caption_counts(table)["flags"] == {"preamble": 1}  # type: ignore[index]
    version = table.version
    watch_captions(table)
    assert table.version == version, "nothing changed, so nothing is written"
    [bad] = review_queue(table, 10)["rows"]
    edit = {"action": "set_caption", "id": bad["id"], "caption": "Sure! A dog, I say."}
    table.journal().append(edit)
    check_captions(table)
    counts = caption_counts(table)
    assert counts is not None
    assert (counts["captioned"], counts["flagged"]) == (1, 0)


def test_a_table_without_captions_gets_no_column(tmp_path: Path) -> None:
    table = caption_table(tmp_path, [None, None])
    assert watch_captions(table) is None
    compose_stage(table, None)
    assert not table.has(COLUMN)
    assert caption_counts(table) is None
    assert review_queue(table, 5)["rows"] == []


def test_show_flagged_walks_through_them_worst_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = [f"A dog number {n} sits on the grass." for n in range(6)]
    captions[2] = "Sure! **A dog** is at https://example.com and the"
    captions[4] = "A dog is next to a"
    table = caption_table(tmp_path, captions)
    compose_stage(table, None)

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["sdprep", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        return capsys.readouterr().out

    found = json.loads(call("show", table.path, "--flagged", "--json"))
    assert (found["flagged"], found["captioned"]) == (2, 6)
    assert [row["file"] for row in found["rows"]] == ["002.png", "004.png"]
    assert found["rows"][0]["flags"] == ["unfinished", "preamble", "markdown", "url"]
    assert found["rows"][0]["captions"] == [{"source": "sidecar", "text": captions[2]}]
    sheet = tmp_path / "flagged.png"
    text = call("show", table.path, "--flagged", "--count", 1, "--to", sheet)
    assert "and 1 more" in text
    assert "002.png" in text
    assert sheet.stat().st_size > 1000
    state = json.loads(call("status", table.path, "--json"))
    assert state["captions"]["flagged"] == 2
    assert "2 flagged" in call("status", table.path)


def test_boxes_and_tags_of_the_table_speak_against_a_caption(tmp_path: Path) -> None:
    table = caption_table(tmp_path, ["A man waits by the wall.", "A dog sits on the grass."])
    ids = table.read(["id"])["id"].to_pylist()
    from sdprep.schema import BOX

    corner = {"x0": 0.0, "y0": 0.0, "x1": 0.5, "y1": 0.5}
    two = [{"label": "person", "score": 0.9, **corner}, {"label": "person", "score": 0.8, **corner}]
    values = pa.array([{"boxes": two}, {"boxes": []}], pa.struct({"boxes": pa.list_(BOX)}))
    with table.writer():
        table.write_fold(ids, {"boxes_yolo": values}, stage="test")
    check_captions(table)
    first, second = table.read([COLUMN])[COLUMN].to_pylist()
    assert first["flags"] == ["contradiction"]
    assert first["score"] == 1.0
    assert first["reasons"] == ["sidecar: contradiction: 1 people, 2 boxed"]
    assert second["flags"] == []
    assert np.isnan(np.float32(second["score"] or np.nan))
