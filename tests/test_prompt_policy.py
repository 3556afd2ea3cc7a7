"""Policies and records: where they come from, and validation prompts."""

import json

import pytest

from sdprep.errors import DataError, RecipeError
from sdprep.prompt_policy import load_policy
from sdprep.prompt_stats import changed_knobs
from sdprep.prompts import (
    PromptCaption,
    PromptPolicy,
    PromptRecord,
    PromptTag,
    render_prompt,
    validation_prompt,
)
from sdprep.recipe import validate
from tests.prompt_cases import policy, record


def test_rows_of_table_and_published_set():
    published = {
        "id": "c" * 32,
        "tags": [
            {"name": "Long Hair", "category": None, "score": 0.5, "source": "wd"},
            {"name": "long_hair", "category": "general", "score": None, "source": "sidecar"},
        ],
        "caption": "a cat",
        "captions": [{"text": "a cat", "source": "sidecar"}, {"text": "the cat", "source": None}],
        "score": 4,
        "image": b"ignored",
    }
    found = PromptRecord.from_row(published)
    assert found.tags == (PromptTag("long_hair", "general"),)
    assert found.captions == (PromptCaption("a cat", "sidecar"), PromptCaption("the cat", ""))
    assert found.score == 4
    empty = {"id": "d", "tags": None, "caption": None, "captions": None, "score": None}
    assert PromptRecord.from_row(empty) == PromptRecord("d")
    assert PromptRecord.from_row({"id": "d", "caption": "x"}).captions == (PromptCaption("x"),)
    assert PromptRecord.from_row({"id": "d", "score": 0}).score is None
    assert PromptRecord.from_row({"id": "d", "score": float("nan")}).score is None
    assert render_prompt(published, policy(), 1, 0) == render_prompt(found, policy(), 1, 0)
    for bad in (10, -1, 4.5):
        with pytest.raises(DataError, match="row d: score"):
            PromptRecord.from_row({"id": "d", "score": bad})


def test_policy_round_trips_through_json():
    how = policy(
        mode="pick",
        tag_style="spaces",
        length={"law": "empirical", "weights": {"4": 2.0}},
        triggers=["sks"],
    ).with_aliases({"a": ["b"]}, ["a"])
    again = validate(json.loads(how.model_dump_json(by_alias=True)), PromptPolicy, "sdprep.json")
    assert again == how
    assert json.loads(json.dumps(how.model_dump(mode="json"))) == how.model_dump(mode="json")


def test_overrides_change_only_what_they_name():
    base = policy(dropout_p=0.3, length={"law": "all", "mean": 20.0}, triggers=["sks"])
    over = validate({"length": {"mean": 10.0}, "mode": "concat"}, PromptPolicy, "[prompt]")
    merged = base.overridden(over)
    assert (merged.dropout_p, merged.triggers, merged.mode) == (0.3, ("sks",), "concat")
    assert (merged.length.law, merged.length.mean) == ("all", 10.0)
    assert set(changed_knobs(base, merged)) == {"length.mean", "mode"}


def test_policy_files_and_their_mistakes(tmp_path):
    file = tmp_path / "my policy.toml"
    file.write_text('[policy]\nmode = "concat"\n[policy.score]\nposition = "back"\n', "utf-8")
    assert load_policy(file).score.position == "back"
    file.write_text('mode = "caption"\n', "utf-8")
    assert load_policy(file).mode == "caption"
    file.write_text('mod = "caption"\ndropout_p = 2.0\n[length]\nlaw = "empirical"\n', "utf-8")
    with pytest.raises(RecipeError) as error:
        load_policy(file)
    for part in ("did you mean mode?", "dropout_p", "must be <= 1", "length.weights"):
        assert part in str(error.value)
    with pytest.raises(RecipeError, match="no recipe"):
        load_policy(tmp_path / "absent.toml")


def test_validation_prompts_have_no_noise():
    image = record("red_dress", "long_hair", "1girl", score=3)
    noisy = validate(
        {"dropout_p": 1.0, "score": {"drop_p": 1.0}, "alias_p": 1.0}, PromptPolicy, "t"
    )
    noisy = noisy.with_aliases({"red_dress": ["gown"]}, ["red_dress"])
    texts = {validation_prompt(image, noisy, 1) for _ in range(3)}
    assert len(texts) == 1
    text = texts.pop()
    assert {"red dress", "long hair", "1girl"} <= set(text.split(", "))
    assert "score_" in text
    lined = validate(
        {"tag_style": "underscores", "delimiter": {"comma_p": 0.0, "mixed_comma_p": 0.0}},
        PromptPolicy,
        "t",
    )
    assert "red_dress" in validation_prompt(image, lined, 1).split(" ")
    many = [record("a_bcd", "b_cde", "c_def", id_=str(at)) for at in range(200)]
    assert all(validation_prompt(each, PromptPolicy(), 1).count(", ") == 2 for each in many)
